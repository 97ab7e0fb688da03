"""Numbers and names as a person reads them: a unit everywhere, one precision, no surprises.

Everything is composed in Unicode, one character per cell wherever possible, and
:func:`ascii_only` turns a finished line into ASCII of the same width. Thousands are
set apart by a narrow no-break space, units by a plain space.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Final, Optional

from rich.cells import cell_len, set_cell_size

from ctrace import units
from ctrace.model.snapshot import Culprit, Residence
from ctrace.names import clean
from ctrace.view.letters import ARROW, EIGHTHS, ELLIPSIS, RAMP, THIN, ascii_only, wants_ascii

__all__ = ("ARROW", "ELLIPSIS", "RAMP", "THIN", "ascii_only", "clean", "wants_ascii")
"""Of other modules, which views say as ``fmt.clean``."""
UNKNOWN: Final = "-"
_COMMAS: Final = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
"""Between thousands, where nothing but three digits follows."""


def count(number: float) -> str:
    """``262 144``, with narrow no-break spaces."""
    return f"{round(number):,}".replace(",", THIN)


def decimal(number: float, digits: int) -> str:
    """``1 234.5``: so many digits behind the point."""
    return f"{number:,.{digits}f}".replace(",", THIN)


def short(number: float) -> str:
    """At most five cells: ``812``, ``9 812``, ``98.1k``, ``981k``, ``1.2M``."""
    if abs(number) < 9999.5:
        return count(number)
    for unit in ("k", "M", "G", "T"):
        number /= 1000
        if abs(number) < 99.95:
            return f"{number:.1f}{unit}"
        if abs(number) < 999.5:
            return f"{number:.0f}{unit}"
    return f"{number:.0e}"


def rate(per_second: Optional[float]) -> str:
    """A rate without its unit (the column's head has it): ``0``, ``0.4``, ``1 820``."""
    if per_second is None:
        return UNKNOWN
    if per_second == 0:
        return "0"
    if abs(per_second) < 0.05:
        return "<0.1"
    if abs(per_second) < 9.95:
        return f"{per_second:.1f}"
    return count(per_second)


def per_second(value: Optional[float]) -> str:
    """``1 820/s``."""
    return UNKNOWN if value is None else rate(value) + "/s"


def share(part: Optional[float]) -> str:
    """``83 %``, ``2.7 %``, ``<0.1 %``; never ``100 %`` for less than all."""
    return UNKNOWN if part is None else units.share(part)


def duration(seconds: Optional[float]) -> str:
    """``350 µs``, ``4 ms``, ``1.5 s``, ``120 s``, ``12 min``, ``3 h``, ``4 d``."""
    return UNKNOWN if seconds is None or not math.isfinite(seconds) else units.duration(seconds)


def held(culprit: Culprit) -> str:
    """Entries held; ``~`` before them while events that were lost may make them wrong."""
    return ("~" if culprit.stale else "") + count(culprit.held)


def stays(residence: Residence) -> str:
    """How long entries stay: the median, or ``>15 s`` while only that much is known."""
    if residence.p50 is None and residence.at_least is not None:
        return ">" + duration(residence.at_least)
    return duration(residence.p50)


def span(seconds: float) -> str:
    """An elapsed time in two units: ``45 s``, ``2 min 10 s``, ``3 h 05 min``, ``2 d 4 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(octets: int) -> str:
    """Memory in binary units: ``812 B``, ``46 MiB``, ``1.5 GiB``."""
    number = float(octets)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 999.5:
            return f"{units.figures(number)} {unit}"
        number /= 1024
    return f"{units.figures(number)} TiB"


def clock(utc: float) -> str:
    """The time of day of a UTC time in seconds: ``14:03:27``."""
    return datetime.fromtimestamp(utc, timezone.utc).strftime("%H:%M:%S")


def prose(text: str) -> str:
    """A sentence of ours that names may be part of: harmless, its thousands set apart as here."""
    return _COMMAS.sub(THIN, clean(text))


def cut(text: str, width: int) -> str:
    """At most ``width`` cells, losing the middle: both ends of a name tell most."""
    if width <= 0:
        return ""
    if cell_len(text) <= width:
        return text
    if width == 1:
        return ELLIPSIS
    tail = (width - 1) // 2
    head = width - 1 - tail
    return _head(text, head) + ELLIPSIS + _tail(text, tail)


def _head(text: str, width: int) -> str:
    used, end = 0, 0
    for index, char in enumerate(text):
        used += cell_len(char)
        if used > width:
            break
        end = index + 1
    return text[:end]


def _tail(text: str, width: int) -> str:
    used, start = 0, len(text)
    for index in range(len(text) - 1, -1, -1):
        used += cell_len(text[index])
        if used > width:
            break
        start = index
    return text[start:]


def address(text: str, width: int) -> str:
    """An address in at most ``width`` cells: IPv6 loses whole groups from its middle."""
    if len(text) <= width or text.count(":") < 2:
        return cut(text, width)
    groups = text.split(":")
    for dropped in range(1, len(groups) - 1):
        keep = len(groups) - dropped
        head = (keep + 1) // 2
        fitted = (
            f"{':'.join(groups[:head])}{ELLIPSIS}{':'.join(groups[len(groups) - keep + head :])}"
        )
        if len(fitted) <= width:
            return fitted
    return cut(text, width)


def arrowed(text: str) -> str:
    """Harmless, with the arrow between two ends as every view draws it."""
    return clean(text).replace(" -> ", f" {ARROW} ")


def key(text: str, width: int) -> str:
    """A culprit's or victim's key: the service stays whole as long as it can."""
    text = arrowed(text)
    if cell_len(text) <= width:
        return text
    left, arrow, right = text.partition(f" {ARROW} ")
    room = width - 3 - cell_len(right)
    if not arrow or room < 7:
        return cut(text, width)
    return address(left, room) + f" {ARROW} " + right


def fit(text: str, width: int, right: bool = False) -> str:
    """Exactly ``width`` cells: cut or padded."""
    text = cut(text, width)
    pad = width - cell_len(text)
    if pad <= 0:
        return set_cell_size(text, width)
    return " " * pad + text if right else text + " " * pad


def sparkline(values: Sequence[float], width: int, top: Optional[float] = None) -> str:
    """The last ``width`` values as bars; ``top`` is the value of a full bar.

    A steady series runs at half height, so that a rise or a burst stands out. A value
    that is not zero never looks like zero: zero is the lowest bar alone.
    """
    shown = values[-width:] if width > 0 else ()
    highest = max(shown, default=0.0) if top is None else top
    if top is None and shown:
        highest = max(highest, 2 * sum(shown) / len(shown))
    bars = []
    for value in shown:
        if value <= 0 or highest <= 0:
            bars.append(RAMP[0])
        else:
            bars.append(RAMP[min(7, 1 + int(value / highest * 6.999))])
    return "".join(bars).rjust(width) if width > 0 else ""


def bar(parts: Sequence[float], width: int) -> tuple[int, ...]:
    """How many of ``width`` cells each part (a share of the whole) gets.

    A part that is not zero gets a cell if there is one left; the sum never exceeds
    ``width``, and reaches it only when the parts reach 1.
    """
    cells: list[int] = []
    used, reached = 0, 0.0
    for part in parts:
        reached = min(1.0, reached + max(0.0, part))
        upto = int(reached * width + 1e-9)
        if part > 0:
            upto = max(upto, used + 1)
        upto = min(width, upto)
        cells.append(max(0, upto - used))
        used = max(used, upto)
    return tuple(cells)


def hbar(part: float, width: int) -> str:
    """A bar of eighths of a cell for a share: a thousandth still leaves a trace."""
    eighths = min(width * 8, round(max(0.0, part) * width * 8))
    if part > 0 and not eighths:
        eighths = 1
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (EIGHTHS[rest - 1] if rest else "")


def plural(number: int, one: str, many: str = "") -> str:
    """``1 namespace``, ``3 namespaces``."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def nameless(family: str, refused: int) -> str:
    """Text in place of victims, under hooks that do not see which flow a refused packet belonged
    to."""
    return f"{plural(refused, 'packet')} refused; {clean(family)} hooks cannot name who is"
