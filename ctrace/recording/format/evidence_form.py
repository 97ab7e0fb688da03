"""What evidence may be made of: a recording comes from a stranger, and views take it as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

LONGEST: Final = 1000
"""Characters of a text in it."""
MOST: Final = 1 << 62


class Maybe(NamedTuple):
    """Of this form, or null."""

    form: Any


class Each(NamedTuple):
    """A list or mapping whose values all have this form."""

    of: type
    form: Any


_MOMENT: Final = {"text": str, "boot": Maybe(float), "utc": Maybe(float)}
_DUMP: Final = {
    "source": str,
    "at": float,
    "known_by": str,
    "entries": int,
    "said": Maybe(int),
    "cut": bool,
    "apart": Maybe(float),
}
_TABLE: Final = {"netns": str, "entries": int, "cut": bool, "count": Maybe(int), "max": Maybe(int)}
_LOG: Final = {"full": int, "suppressed": int, "first": Maybe(_MOMENT), "last": Maybe(_MOMENT)}
_LEFT: Final = {"kind": str, "entries": int, "left": (int, int, int)}
_COUNTS: Final = Each(dict, int)
FORMS: Final[Mapping[str, Any]] = {
    "files": Each(list, str),
    "unread": Each(list, (str, int, str)),
    "dumps": Each(list, _DUMP),
    "log": Maybe(_LOG),
    "modules": Each(dict, Each(list, str)),
    "held_by": Each(list, str),
    "rules": Each(dict, bool),
    "rules_listed": Each(list, str),
    "tables": Each(list, _TABLE),
    "counts": Maybe((int, int, int)),
    "entry_bytes": Maybe(int),
    "max": Maybe(int),
    "count": Maybe(int),
    "refused_at_least": Maybe(int),
    "kernel_counted": _COUNTS,
    "counted_between": Maybe({"seconds": Maybe(float), "counts": _COUNTS}),
    "by": _COUNTS,
    "service": str,
    "services": Each(list, (str, str, int)),
    "remaining": Each(list, _LEFT),
    "full_seen": bool,
    "losses_told": bool,
    **dict.fromkeys(
        (
            "passed_over",
            "lines",
            "not_understood",
            "left_out",
            "dying",
            "unconfirmed",
            "deleted",
            "expectations",
            "entries",
            "inserts",
            "updates",
            "destroys",
            "unreplied",
            "assured",
            "src_nat",
            "dst_nat",
            "offloaded",
            "helped",
        ),
        int,
    ),
}
"""The form of each of its parts."""


def well_formed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that have their form."""
    out = {name: part for name, part in data.items() if name in FORMS and fits(part, FORMS[name])}
    if not {"inserts", "destroys"} <= out.keys():
        out.pop("inserts", None)
    log = out.get("log") or {}
    for name, form in (("hosts", str), ("netns", int)):
        if not fits(log.get(name, []), Each(list, form)):
            del log[name]
    for row in out.get("remaining", ()):
        if not (fits(row.get("timeout"), int) and fits(row.get("idle"), (int, int, int))):
            row.pop("idle", None)
    return out


def fits(value: Any, form: Any) -> bool:
    """Whether a value of JSON has a form."""
    if isinstance(form, Maybe):
        return value is None or fits(value, form.form)
    if isinstance(form, Each):
        parts = list(value.values()) if isinstance(value, dict) else value
        names = list(value) if isinstance(value, dict) else []
        return (
            isinstance(value, form.of)
            and all(fits(part, form.form) for part in parts)
            and all(_is_text(name) for name in names)
        )
    if isinstance(form, tuple):
        return isinstance(value, list) and len(value) == len(form) and all(map(fits, value, form))
    if isinstance(form, dict):
        return isinstance(value, dict) and all(fits(value.get(n), f) for n, f in form.items())
    return _is_text(value) if form is str else _is_number(value, form)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST and value.isprintable()


def _is_number(value: Any, form: Any) -> bool:
    """``bool``, ``int`` or ``float``, not negative; a whole number is a float, too."""
    if form is bool or isinstance(value, bool):
        return form is bool and isinstance(value, bool)
    kinds = (int, float) if form is float else (int,)
    return isinstance(value, kinds) and math.isfinite(value) and 0 <= value < MOST
