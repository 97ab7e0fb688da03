"""What is asked to end while it works ends as by an error, so that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final, NoReturn, Optional

ASKING: Final = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit inside, where nobody else heeds or ignores them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = [one for one in ASKING if signal.getsignal(one) is signal.SIG_DFL]
    for one in mine:
        signal.signal(one, _end)
    try:
        yield
    finally:
        for one in mine:
            signal.signal(one, signal.SIG_DFL)


def _end(number: int, frame: Optional[FrameType]) -> NoReturn:
    del frame
    raise SystemExit(128 + number)
