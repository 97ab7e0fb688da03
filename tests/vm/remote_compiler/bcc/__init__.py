"""BCC as the emulated machines of scripts/vm see it: the real one, run by the host.

LLVM is thirty times slower in software emulation. The same BCC compiles the same
text with the same flags outside; the instructions come back through a shared folder.
"""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path


class BPF:
    """As much of bcc.BPF as ctrace uses."""

    def __init__(self, text: str, cflags: list[str]) -> None:
        folder = Path(os.environ["CTRACE_VM_COMPILER"])
        name = f"{os.getpid()}-{time.monotonic_ns()}"
        request = {"text": text, "cflags": cflags, "source": os.environ["BCC_KERNEL_SOURCE"]}
        (folder / f"{name}.new").write_text(json.dumps(request))
        (folder / f"{name}.new").rename(folder / f"{name}.request")
        deadline = time.monotonic() + 120
        while f"{name}.answer" not in os.listdir(folder):
            if time.monotonic() > deadline:
                raise TimeoutError("the host does not compile")
            time.sleep(0.1)
        answer = json.loads((folder / f"{name}.answer").read_text())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        self._functions: dict[str, str] = answer["functions"]

    def dump_func(self, name: bytes) -> bytes:
        """A program's instructions."""
        return base64.b64decode(self._functions[name.decode()])
