"""Messages that stand on several lines, a field on each, or in one object of JSON: journalctl with
``-o export``, ``verbose`` or ``json-pretty``, and ``dmesg --json``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Optional

Told = tuple[str, Optional[float], Optional[float], str]
"""(message, seconds since boot, UTC seconds, the time as it stands)."""
_FIELD: Final = re.compile(
    r'\s*(?:"(?P<quoted>_{0,2}[A-Z][A-Z0-9_]*|pri|fac|time|msg|caller)"\s*:\s*"?'
    r'|(?P<bare>_{0,2}[A-Z][A-Z0-9_]*)=)(?P<value>.*?)"?,?'
)
_OBJECT: Final = re.compile(r'"(?:MESSAGE|pri)"\s*:')
_PAIR: Final = re.compile(
    r'"(MESSAGE|__REALTIME_TIMESTAMP|msg|time)"\s*:\s*'
    r'(?:"([^"]{0,400})"|([\d.]{1,30})|\[([\d, ]{1,1900})\])'
)
"""A text that is not UTF-8 is a list of its bytes."""
_EDGE: Final = re.compile(r'\s*(?:"dmesg"\s*:\s*\[|[\[\]{}],?|\},\{)?')
_BEGINS: Final = re.compile(
    r'\s*(?:__CURSOR=|"(?:_[A-Z_]+|MESSAGE|PRIORITY|SYSLOG_[A-Z_]+)"\s*:|"dmesg"\s*:)'
)


def _text(listed: str) -> str:
    """The ASCII of a list of bytes."""
    return "".join(chr(int(one)) for one in re.findall(r"\d{1,3}", listed) if 31 < int(one) < 127)


class Fields:
    """Gathers the fields of one message; ``told`` gives it once it has ended."""

    def __init__(self) -> None:
        self._open = False
        self._have: dict[str, str] = {}
        self._done: list[Told] = []

    def begin(self, when: str) -> None:
        """A heading with the time: fields follow."""
        self._end()
        self._open, self._have = True, {"when": when}

    def take(self, line: str) -> bool:
        """Whether the line is a part of such a message."""
        begins = line.find("{")
        if begins >= 0 and _OBJECT.search(line, begins):
            self._end()
            self._have = {
                name: text or bare or _text(listed)
                for name, text, bare, listed in _PAIR.findall(line)
            }
            self._end()
            return True
        if not self._open and not _BEGINS.match(line):
            return False
        if _EDGE.fullmatch(line):
            self._end()
            self._open = self._open or bool(line.strip())
            return True
        said = _FIELD.fullmatch(line)
        if said is None:
            self._end()
            self._open = False
            return False
        name = said["quoted"] or said["bare"]
        if name in self._have or name == "__CURSOR":
            self._end()
        self._open = True
        self._have[name] = said["value"]
        if {"MESSAGE", "__REALTIME_TIMESTAMP"} <= self._have.keys() or (
            {"msg", "time"} <= self._have.keys() or {"MESSAGE", "when"} <= self._have.keys()
        ):
            self._end()
        return True

    def told(self) -> Iterator[Told]:
        """Those that are whole; each once."""
        done, self._done = self._done, []
        yield from done

    def _end(self) -> None:
        have, self._have = self._have, {}
        text = have.get("MESSAGE") or have.get("msg")
        if not text:
            return
        real, boot = have.get("__REALTIME_TIMESTAMP", ""), have.get("time", "")
        at = int(real) / 1e6 if re.fullmatch(r"\d{10,18}", real) else None
        since = float(boot) if re.fullmatch(r"\d{1,12}(?:\.\d{1,9})?", boot) else None
        when = have.get("when") or (str(int(at)) if at is not None else boot.strip())
        self._done.append((text, since, at, when))
