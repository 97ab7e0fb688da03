"""What was read besides the events, as JSON in a block of batches, checked when read."""

from __future__ import annotations

from typing import Any, Final, Optional

from ctrace.beside import (
    EPHEMERAL,
    LIMITS,
    MOST,
    WHY,
    Beside,
    Left,
    PortsTaken,
    Refusing,
    Short,
    Stray,
)
from ctrace.names import clean
from ctrace.record import address_bytes, address_text
from ctrace.recording.format.layout import LIMIT_TIME, Damaged

TEXT: Final = 1024
"""Characters of a name, at most."""
KINDS: Final = ("limit", "invalid")
WHOLE: Final = 1_000_000
"""Parts of a table."""


def to_json(readings: tuple[Beside, ...]) -> list[Any]:
    """Readings of one batch; later versions append to the end of each."""
    return [
        [
            one.netns,
            [[r.place, r.handle, r.kind, r.limit, r.packets, r.since] for r in one.refusing],
            [[e.proto, e.dst, e.port, e.backend, e.entries] for e in one.left],
            [
                [p.proto, p.source, p.dst, p.port, p.used, p.of, p.was, round(p.seconds * 1000)]
                for p in one.ports
            ],
            [[s.src, s.proto, s.port, s.why, s.packets] for s in one.strays],
            [[s.kind, s.name, s.used, s.of, s.since] for s in one.short],
            round(one.part * WHOLE),
            one.echo,
            list(one.ephemeral),
        ]
        for one in readings
    ]


def parse(data: Any) -> tuple[Beside, ...]:
    """The readings of :func:`to_json`. Raises Damaged."""
    return tuple(_reading(one) for one in _list(data, 1 << 16))


def _reading(data: Any) -> Beside:
    netns, refusing, left, ports = _parts(data, 4)
    strays, short, part = data[4:7] if len(data) >= 7 else ([], [], WHOLE)
    return Beside(
        _number(netns, 1 << 32),
        tuple(_refusing(one) for one in _list(refusing)),
        tuple(_left(one) for one in _list(left)),
        tuple(_ports(one) for one in _list(ports)),
        tuple(_stray(one) for one in _list(strays)),
        tuple(_short(one) for one in _list(short)),
        len(data) > 7 and data[7] is True,
        max(1, min(_number(part), WHOLE)) / WHOLE,
        _range(data[8]) if len(data) > 8 else EPHEMERAL,
    )


def _range(data: Any) -> tuple[int, int]:
    first, last = (_number(one, 1 << 16) for one in _parts(data, 2))
    return first, last


def _refusing(data: Any) -> Refusing:
    place, handle, kind, limit, packets, since = _parts(data, 6)
    if kind not in KINDS:
        raise Damaged("a rule of a kind that there is not")
    known = (_text(place), _number(handle), kind, _number(limit))
    return Refusing(*known, _some(packets), _some(since))


def _left(data: Any) -> Left:
    proto, dst, port, backend, entries = _parts(data, 5)
    ends = (_text(proto), _address(dst), _number(port, 1 << 16), _address(backend))
    return Left(*ends, _number(entries))


def _ports(data: Any) -> PortsTaken:
    proto, source, dst, port, used, of, was, ms = _parts(data, 8)
    ends = (_text(proto), _address(source), _address(dst), _number(port, 1 << 16))
    return PortsTaken(*ends, _number(used), max(1, _number(of)), _some(was), _number(ms) / 1000)


def _stray(data: Any) -> Stray:
    src, proto, port, why, packets = _parts(data, 5)
    if why not in WHY:
        raise Damaged("a reason that there is not")
    return Stray(_address(src), _text(proto), _number(port, 1 << 16), why, _number(packets))


def _short(data: Any) -> Short:
    kind, name, used, of, since = _parts(data, 5)
    if kind not in LIMITS:
        raise Damaged("a limit of a kind that there is not")
    return Short(kind, _text(name), _number(used), _number(of), _number(since))


def _parts(data: Any, n: int) -> list[Any]:
    """The first parts of a list; a later version may have more."""
    if not isinstance(data, list) or len(data) < n:
        raise Damaged(f"expected a list of {n}")
    return data[:n]


def _list(data: Any, most: int = MOST) -> list[Any]:
    if not isinstance(data, list) or len(data) > most:
        raise Damaged("expected a shorter list")
    return data


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > TEXT:
        raise Damaged("expected a name")
    return clean(value)


def _address(value: Any) -> str:
    """Commands that are shown to be pasted have it in them."""
    try:
        return address_text(address_bytes(_text(value)))
    except (OSError, ValueError):
        raise Damaged("expected an address") from None


def _number(value: Any, limit: int = LIMIT_TIME) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise Damaged("a number out of range")
    return value


def _some(value: Any) -> Optional[int]:
    return None if value is None else _number(value)
