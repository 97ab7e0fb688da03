"""The one exception that a user may see, as one line and an exit status."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from subprocess import TimeoutExpired
from typing import Final, Optional

_SHORTAGES: Final = {
    *(errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.ENFILE),
    *(errno.EAGAIN, errno.EINTR, errno.ENOSPC, errno.ETIMEDOUT),
}
"""Of memory, descriptors, processes, namespaces, time: they pass."""


class CtraceError(Exception):
    """A problem that a person can act on.

    ``str(error)`` is one line: what is wrong, then what to do. The command line
    prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 1


class UsageError(CtraceError):
    """The arguments themselves are wrong (exit status 2)."""

    exit_code = 2


class TryAgain(CtraceError):
    """It may succeed later: time or memory ran out, or rules kept changing while they were read."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``; the nearest is tcp`` of what may have been meant, as a user knows it, or nothing."""
    from difflib import get_close_matches

    like = {one.lower(): one for one in known}
    near = get_close_matches(word.lower(), list(like), 1)
    return f"; the nearest is {like[near[0]]}" if near else ""


def passes(error: BaseException) -> bool:
    """Whether what stood in the way may pass, by the error and those that it was made of."""
    one: Optional[BaseException] = error
    while one is not None:
        if isinstance(one, (TryAgain, MemoryError, TimeoutError, TimeoutExpired)):
            return True
        if isinstance(one, OSError) and one.errno in _SHORTAGES:
            return True
        one = one.__cause__ or one.__context__
    return False


def no_thread(error: BaseException) -> bool:
    """Whether the host refused a thread: Python has no error of its own for that."""
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


@contextmanager
def for_later() -> Iterator[None]:
    """Pass over what the host refuses, memory and threads too: for a thread that will try again,
    or whose work can do without."""
    try:
        yield
    except (CtraceError, OSError, MemoryError):
        pass
    except RuntimeError as error:
        if not no_thread(error):
            raise
