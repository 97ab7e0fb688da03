"""What conntrack costs, as measured, kept in a recording as JSON (blocks of kind PERF).

A field that a file lacks takes its default, and one that this version does not know is skipped:
either may be the newer one.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from ctrace.cost.result import Perf
from ctrace.recording.format.layout import LIMIT_TIME, Damaged

LIMIT_TEXT: Final = 1 << 14
LIMIT_ROWS: Final = 1 << 12


def to_json(perf: Perf) -> dict[str, Any]:
    """All fields, ready for JSON."""
    return asdict(perf)


def parse(block: Any) -> tuple[str, Perf]:
    """The host (empty: not told) and the measurement of a block. Raises Damaged."""
    if not isinstance(block, dict):
        raise Damaged("a measurement that is none")
    return _made(block.get("host", ""), str), from_json(block.get("perf"))


def from_json(data: Any) -> Perf:
    """The measurement, every value checked. Raises Damaged."""
    found: Perf = _made(data, Perf)
    return found


def _made(data: Any, kind: Any) -> Any:
    if is_dataclass(kind):
        return _record(data, kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin is Union:  # Optional
        return None if data is None else _made(data, args[0])
    if origin is tuple:
        return _row(data, args)
    if kind is str and isinstance(data, str) and len(data) <= LIMIT_TEXT:
        return data
    if kind is int and type(data) is int and abs(data) <= LIMIT_TIME:
        return data
    if kind is float and type(data) in (int, float) and abs(data) <= LIMIT_TIME:  # no NaN is
        return float(data)
    raise Damaged(f"a measurement with {str(data)[:40]!a} for a {kind}")


def _record(data: Any, kind: Any) -> Any:
    if not isinstance(data, dict):
        raise Damaged(f"a measurement without {kind.__name__}")
    hints = get_type_hints(kind)
    values = {}
    for one in fields(kind):
        if one.name in data:
            values[one.name] = _made(data[one.name], hints[one.name])
        elif one.default is MISSING:
            raise Damaged(f"a measurement without {one.name}")
    return kind(**values)


def _row(data: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(data, (list, tuple)) or len(data) > LIMIT_ROWS:
        raise Damaged("a measurement with more rows than the limit")
    if args[-1] is Ellipsis:
        return tuple(_made(item, args[0]) for item in data)
    if len(data) != len(args):
        raise Damaged("a measurement with a short row")
    return tuple(_made(item, kind) for item, kind in zip(data, args))
