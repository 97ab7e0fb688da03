"""A real browser, driven by real key presses and mouse moves over its debugging pipe."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1200,900", "--remote-debugging-pipe",
)  # fmt: skip
CODES = {"ArrowLeft": 37, "ArrowRight": 39}


class Browser:
    """One page in a browser of its own; a context manager."""

    def __init__(self, page: Path, profile: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._ids = itertools.count(1)
        self._rest = b""
        self._session = ""
        read, theirs_out = os.pipe()
        theirs_in, write = os.pipe()
        # The browser reads its descriptor 3 and writes 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(CHROMIUM), *OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._read, self._write = read, write
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Runtime", "Network", "Page", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=page.as_uri())

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            said = self._message()
            if said.get("id") == number:
                assert "error" not in said, said
                found: dict[str, Any] = said["result"]
                return found
            self.events.append(said)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], 60)[0], "the browser says nothing"
            more = os.read(self._read, 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        whole, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(whole)
        return found

    def value(self, expression: str) -> Any:
        """What a piece of script on the page gives."""
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def until(self, expression: str, timeout: float = 60.0) -> None:
        """Wait until this is true on the page."""
        deadline = time.monotonic() + timeout
        while not self.value(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and let go of one key."""
        more: dict[str, Any] = {"text": key} if len(key) == 1 else {}
        code = CODES.get(key, 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key,
                  windowsVirtualKeyCode=code, **more)  # fmt: skip
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def mouse(self, what: str, x: float, y: float, clicks: int = 1) -> None:
        """Move, press or release the mouse there."""
        kind = {"move": "mouseMoved", "down": "mousePressed", "up": "mouseReleased"}[what]
        held = {"button": "left", "buttons": 1, "clickCount": clicks} if what != "move" else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def drag(self, x: float, y: float, to: float) -> None:
        """Draw the mouse from ``x`` to ``to``."""
        self.mouse("move", x, y)
        self.mouse("down", x, y)
        for step in range(1, 6):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + (to - x) * step / 5,
                      y=y, button="left", buttons=1)  # fmt: skip
        self.mouse("up", to, y)

    def said(self, method: str) -> list[dict[str, Any]]:
        """The events of this kind so far."""
        self.value("0")
        return [one["params"] for one in self.events if one.get("method") == method]
