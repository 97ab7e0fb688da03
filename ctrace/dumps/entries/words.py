"""Words of lines to numbers and addresses, by column; invalid ones are refused."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.record import MAPPED_PREFIX

_WORD: Final = re.compile(rb"\[([^\]=]*)(?:=[^\]]*)?\]|([A-Za-z][\w-]*)=(\S*)")
_CACHED: Final = 1 << 17
_WRONG: Final = b"\xff" * 16
"""Stands for an invalid address: this very object, not an equal one."""


class Bad(Exception):
    """A line that cannot be understood; its text is the reason. Never leaves ctrace.dumps."""


class Words:
    """``[FLAG]`` and ``name=value`` words of the end of a line."""

    def __init__(self, text: bytes) -> None:
        self.flags: list[bytes] = []
        self._values: dict[bytes, bytes] = {}
        for flag, name, value in _WORD.findall(text):
            if name:
                self._values.setdefault(name, value)
            elif flag:
                self.flags.append(flag)

    def get(self, name: bytes) -> Optional[bytes]:
        """A value as it is written; None when it is missing."""
        return self._values.get(name)

    def whole(self, name: bytes, most: int, *, mask: bool = False) -> int:
        """A value as a number, decimal or 0x..., with ``mask`` also before a slash; -1 when it is
        missing. Raises Bad."""
        text = self._values.get(name)
        if text is None:
            return -1
        if mask:
            text = text.partition(b"/")[0]
        if not re.fullmatch(rb"\d{1,20}|0x[0-9a-fA-F]{1,16}", text):
            raise Bad(f"{name.decode('ascii', 'replace')} is no number")
        value = int(text, 16) if text.startswith(b"0x") else int(text)
        if value > most:
            raise Bad(f"{name.decode('ascii', 'replace')} is out of range")
        return value


class _Addresses(dict[bytes, bytes]):
    """Text to the 16 bytes of a record; caches, because a dump repeats each address often."""

    def __missing__(self, text: bytes) -> bytes:
        try:
            if b":" in text:
                found = socket.inet_pton(socket.AF_INET6, text.decode("ascii"))
            else:
                found = MAPPED_PREFIX + socket.inet_pton(socket.AF_INET, text.decode("ascii"))
        except (OSError, ValueError):
            found = _WRONG
        if len(self) >= _CACHED:
            self.clear()
        self[text] = found
        return found


_KNOWN: Final = _Addresses()


def addresses(column: Sequence[Optional[bytes]], bad: dict[int, str]) -> npt.NDArray[np.uint8]:
    """An (n, 16) array; rows with an invalid address are noted in ``bad``."""
    known = _KNOWN
    raw = b"".join([known[text] if text is not None else _WRONG for text in column])
    out = np.frombuffer(raw, np.uint8).reshape(-1, 16)
    if _WRONG in raw:
        for at in np.flatnonzero((out == 0xFF).all(axis=1)).tolist():
            text = column[at]
            if text is None or known[text] is _WRONG:
                bad.setdefault(at, "an address that is none")
    return out


def number(
    column: Sequence[Optional[bytes]], absent: int, most: int, bad: dict[int, str], what: str
) -> npt.NDArray[np.int64]:
    """Numbers from 0 to ``most``; ``absent`` where there is no word. Others go to ``bad``."""
    if column.count(None) == len(column):
        return np.full(len(column), absent, np.int64)
    try:
        found = np.array([absent if text is None else int(text) for text in column], np.int64)
    except (ValueError, OverflowError):  # the pattern or the words let through what is none
        found = np.full(len(column), absent, np.int64)
        for at, text in enumerate(column):
            if text is None:
                continue
            if text.isdigit() and len(text) < 19:
                found[at] = int(text)
            else:
                bad.setdefault(at, f"a {what} that is no number")
    if len(found) and int(found.max()) > most:
        for at in np.flatnonzero(found > most).tolist():
            bad.setdefault(at, f"a {what} out of range")
        found = np.where(found > most, absent, found)
    return found


def is_address(text: str) -> bool:
    """Whether it is an IPv4 or IPv6 address."""
    return _KNOWN[text.encode("ascii", "replace")] is not _WRONG
