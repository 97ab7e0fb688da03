"""Lines that are a time and nothing else: what ``date`` prints between the dumps of a loop."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Final, Optional

from ctrace.dumps.host.log import utc

Clock = tuple[str, float]
"""(zone, seconds): UTC seconds where the zone is empty; else by the clock of a zone that only its
host knows, so good for the time between two of them."""

LONGEST: Final = 64
"""Characters of a date, in whatever language."""
_ZONE: Final = r"(?P<zone>[A-Z]{2,5}|[+-]\d\d(?:\d\d)?)"
_CLOCK: Final = r"(?P<clock>\d\d:\d\d:\d\d)(?: (?P<half>[AP]M))?"
_DATES: Final = (
    re.compile(
        rf"(?:zzz \*+ ?)?[A-Z][a-z]{{2}},? (?P<month>[A-Z][a-z]{{2}}) +(?P<day>\d{{1,2}}) {_CLOCK}"
        rf" {_ZONE} (?P<year>\d{{4}})(?: .{{0,20}})?"
    ),
    # coreutils since 8.31, in a locale
    re.compile(
        rf"[A-Z][a-z]{{2}},? (?P<day>\d{{1,2}}) (?P<month>[A-Z][a-z]{{2}}) (?P<year>\d{{4}}),? "
        rf"{_CLOCK} {_ZONE}"
    ),
)
_ISO: Final = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?")
_EPOCH: Final = re.compile(r"(\d{10})(\.\d{1,9})?")
_DAY: Final = re.compile(r"(\d\d):(\d\d):(\d\d)(\.\d{1,9})?")
_SAYS: Final = re.compile(
    r"(?:[A-Za-z][a-z]{1,11} ){0,2}?(?:date|time|at|ts|timestamp|on)[:=]? ?", re.I
)
"""What stands before the time in a heading: ``Dump at``, ``date:``."""
_MARKS: Final = "#=*- "
"""What stands before a time that is a heading."""
_WORDS: Final = re.compile(
    r"(?:(?P<clock>\d\d:\d\d:\d\d)(?:[.,]\d{1,9})?|(?P<year>(?:19|20)\d\d)\?{0,4}|\d{1,2}\?{0,4}"
    r"|[A-Za-z?]{1,30}|[+-]\d\d(?:\d\d)?)[.,]?"
)
"""A word of a date in any language: a clock, a year, a day, a month's, a day's or a zone's name.
Bytes that are not ASCII stand as question marks."""
_UTC: Final = ("UTC", "GMT", "Z")


def moment(line: str, *, epoch: bool = True) -> Optional[Clock]:
    """The time that a line is, or None; ``epoch``: whether it may be bare seconds."""
    line = line.lstrip(_MARKS)
    said = next((found for one in _DATES if (found := one.fullmatch(line))), None)
    if said is not None:
        return _date(said)
    if _ISO.fullmatch(line):
        known = utc(line)
        if known is not None:
            return "", known
        local = utc(line + "Z")
        return None if local is None else ("local", local)
    bare = _EPOCH.fullmatch(line) if epoch else None
    if bare and 10**9 <= int(bare[1]) < 1 << 32:
        return "", float(line)
    clock = _DAY.fullmatch(line)
    if clock and int(clock[1]) < 24:
        return "some day", _seconds(line) + float(clock[4] or 0)
    return _foreign(line)


def _seconds(clock: str) -> int:
    return int(clock[:2]) * 3600 + int(clock[3:5]) * 60 + int(clock[6:8])


def _foreign(line: str) -> Optional[Clock]:
    """The time of a date in another language: what is around the clock stands for the day and
    zone."""
    words = line.split() if len(line) <= LONGEST else []
    found = [_WORDS.fullmatch(word) for word in words]
    clocks = [one["clock"] for one in found if one and one["clock"]]
    years = [one for one in found if one and one["year"]]
    if not 4 <= len(found) <= 9 or None in found or len(clocks) != 1 or len(years) != 1:
        return None
    before, after = line.split(clocks[0])
    return f"{before} {after}", float(_seconds(clocks[0]))


def heading_time(text: str) -> Optional[Clock]:
    """The time that a heading is of, or None."""
    said = _SAYS.match(text)
    return moment(text) or (moment(text[said.end() :]) if said else None)


def _date(said: re.Match[str]) -> Optional[Clock]:
    text = f"{said['year']} {said['month']} {said['day']} {said['clock']} {said['half'] or ''}"
    form = "%Y %b %d %I:%M:%S %p" if said["half"] else "%Y %b %d %H:%M:%S"
    try:
        read = datetime.strptime(text.strip(), form).replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None
    zone = said["zone"]
    if zone in _UTC:
        return "", read
    if zone[0] in "+-":
        away = int(zone[1:3]) * 3600 + int(zone[3:5] or 0) * 60
        return "", read - (away if zone[0] == "+" else -away)
    return zone, read
