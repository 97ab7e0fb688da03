"""The process that compiles: BCC (LLVM) is heavy, and only ever loaded in here.

Run by its path, isolated, with whichever Python has BCC: nothing of ctrace is imported. It reads
a request (JSON) on standard input and answers with the instructions as JSON.
"""

import base64
import json
import sys


def main() -> None:
    """Compile ``text`` with ``cflags``; the answer has each of ``programs`` in base64."""
    from bcc import BPF

    request = json.load(sys.stdin)
    built = BPF(text=request["text"], cflags=request["cflags"])
    code = {
        name: base64.b64encode(built.dump_func(name.encode())).decode()
        for name in request["programs"]
    }
    json.dump(code, sys.stdout)


if __name__ == "__main__":
    main()
