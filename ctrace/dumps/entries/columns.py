"""Rows of entries to records, as columns, so that a dump of a million lines takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.dumps.entries.lines import COLUMNS, Row
from ctrace.dumps.entries.words import Bad, Words, addresses, number
from ctrace.record import (
    MAPPED_PREFIX,
    PROTO_NUMBERS,
    RECORD,
    STATE_UNKNOWN,
    TCP_STATES,
    Events,
    Kind,
    Status,
    empty,
    identity,
    words,
)

I64 = npt.NDArray[np.int64]
TAGS: Final = (b"", b"NEW", b"UPDATE", b"DESTROY")
_WIDE: Final = ("time", "left", "mark", "age", "id")
NUMBERS: Final = np.dtype([
    (name, np.int64 if name in _WIDE else np.int32)
    for name in (
        "time", "tag", "family", "proto", "left", "state", "replied", "status", "mark", "zone",
        "age", "user", "id", "sport", "dport", "type", "code", "ident", "reply_sport",
        "reply_dport", "reply_type", "reply_code", "reply_ident",
    )
])  # fmt: skip
"""What is a number in an entry: -1 where a line has no such word. ``time`` is UTC ns (0: none),
``tag`` an index into :data:`TAGS`, ``family`` 4, 6 or 0, ``state`` one of TCP's."""
Numbers = npt.NDArray[np.void]
_MOST: Final = {
    "sport": 65535,
    "dport": 65535,
    "type": 255,
    "code": 255,
    "ident": 65535,
    "proto": 255,
    "left": (1 << 31) - 1,
    "zone": 65535,
    "mark": (1 << 32) - 1,
    "age": 1 << 31,
    "id": (1 << 32) - 1,
}
MOST: Final = {name: _MOST.get(name.replace("reply_", "")) for name in NUMBERS.names or ()}
"""The largest valid value of each."""
_CALLED: Final = {"type": "type", "code": "code", "ident": "number of ICMP"}
_TCP: Final = {name.encode(): at for at, name in enumerate(TCP_STATES)}
_BITS: Final = {
    b"ASSURED": Status.ASSURED,
    b"OFFLOAD": Status.OFFLOAD,
    b"HW_OFFLOAD": Status.HW_OFFLOAD,
    b"EXPECTED": Status.EXPECTED,
    b"DYING": Status.DYING,
    b"FIXED_TIMEOUT": Status.FIXED_TIMEOUT,
}


@dataclass(frozen=True)
class Entries:
    """Entries of one dump or stretch of events, aligned arrays."""

    events: Events
    """Tuples, protocol, family, zone, status, state; ``ct`` tells entries apart, kind is
    EXISTING, ``ts`` zero."""
    left: I64
    """Seconds until it expires; -1 where the line does not say."""
    mark: I64
    """-1 where the line does not say."""
    age: I64
    """Seconds since it was made (``delta-time``); -1 where the line does not say."""
    tag: I64
    """Index into :data:`TAGS`."""
    time: I64
    """UTC ns of an event; 0 where the line does not say."""
    user: npt.NDArray[np.bool_]
    """Whether a program caused the event (``-o userspace``)."""

    def __len__(self) -> int:
        return len(self.events)

    def part(self, at: slice) -> Entries:
        """Some of them, one after the other."""
        return Entries(
            self.events[at],
            self.left[at],
            self.mark[at],
            self.age[at],
            self.tag[at],
            self.time[at],
            self.user[at],
        )


def entries(rows: Sequence[Row]) -> tuple[Entries, dict[int, str]]:
    """The entries of rows, and (row number: reason) for rows that are not valid.

    The result has a place for each valid row, in their order.
    """
    bad: dict[int, str] = {}
    columns = [list(map(itemgetter(at), rows)) for at in range(COLUMNS)]
    n = len(rows)
    octets = np.zeros((n, 4, 16), np.uint8)
    for at, column in enumerate((6, 7, 14, 15)):
        octets[:, at] = addresses(columns[column], bad)
    told = np.zeros(n, NUMBERS)

    def whole(name: str, column: int, what: str) -> None:
        told[name] = number(columns[column], -1, MOST[name] or 0, bad, what)

    whole("proto", 3, "protocol number")
    whole("left", 4, "timeout")
    for first, prefix in ((8, ""), (16, "reply_")):
        for at, name in enumerate(("sport", "dport", "type", "code", "ident")):
            whole(prefix + name, first + at, _CALLED.get(name, "port"))
    told["time"] = _each(columns[0], _nanoseconds)
    told["tag"] = _each(columns[1], lambda tag: TAGS.index(tag or b""))
    told["family"] = _each(columns[2], lambda text: int(text or 0))
    told["state"] = _each(columns[5], tcp_state)
    told["replied"] = np.fromiter((one is None for one in columns[13]), bool, n)
    _rests(columns[21], told, bad)
    for at in np.flatnonzero(other_family(octets[:, 0], told["family"])).tolist():
        bad.setdefault(at, "an address of another family")
    if bad:
        keep = np.ones(n, bool)
        keep[list(bad)] = False
        octets, told = octets[keep], told[keep]
    return build(octets, told), bad


def build(octets: npt.NDArray[np.uint8], told: Numbers) -> Entries:
    """Entries of their four addresses, (n, 4, 16), and numbers; all of them are right."""
    events = empty(len(told))
    if len(told):
        raw = events.view(np.uint8).reshape(len(told), RECORD.itemsize)
        raw[:, 16:80] = octets.reshape(-1, 64)
    proto = told["proto"]
    events["proto"] = proto
    # For ICMP the identifier, and type << 8 | code, as in ctrace.host.ctnetlink.message.
    icmp = (proto == PROTO_NUMBERS["icmp"]) | (proto == PROTO_NUMBERS["icmpv6"])
    for prefix in ("", "reply_"):
        source, target, kind, code, ident = (
            np.maximum(told[prefix + name], 0)
            for name in ("sport", "dport", "type", "code", "ident")
        )
        events[prefix + "sport"] = np.where(icmp, ident, source)
        events[prefix + "dport"] = np.where(icmp, kind << 8 | code, target)
    events["family"] = np.where(_mapped(octets[:, 0]), 2, 10)
    events["state"] = np.where(proto == 6, told["state"], STATE_UNKNOWN)
    events["zone"] = np.maximum(told["zone"], 0)
    seen = told["replied"] * int(Status.SEEN_REPLY)
    # An identifier of ICMP that was replaced; XML has none.
    other = icmp & (told["ident"] >= 0) & (told["ident"] != told["reply_ident"])
    events["status"] = told["status"] | seen | _translated(events) | other * int(Status.SRC_NAT)
    events["kind"] = Kind.EXISTING
    if len(told):
        # The kernel's own id tells apart what has neither ports nor identifier (XML's ICMP).
        bare = (told["sport"] < 0) & (told["ident"] < 0)
        own = np.where(bare, np.maximum(told["id"], 0), 0).astype(np.uint64) << np.uint64(24)
        events["ct"] = identity(words(events)) ^ own
    return Entries(
        events,
        told["left"],
        told["mark"],
        told["age"],
        told["tag"],
        told["time"],
        told["user"] != 0,
    )


def _mapped(first: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Whether addresses, (n, 16), are IPv4."""
    found: npt.NDArray[np.bool_] = (first[:, :12] == np.frombuffer(MAPPED_PREFIX, np.uint8)).all(
        axis=1
    )
    return found


def other_family(first: npt.NDArray[np.uint8], family: I64) -> npt.NDArray[np.bool_]:
    """Where the line states a family that does not fit its first address."""
    found: npt.NDArray[np.bool_] = (family > 0) & ((family == 4) != _mapped(first))
    return found


def tcp_state(word: Optional[bytes]) -> int:
    """The number of a TCP state's name; STATE_UNKNOWN for other words."""
    return _TCP.get(word or b"", STATE_UNKNOWN)


def _translated(events: Events) -> I64:
    """SRC_NAT and DST_NAT where the reply is no mirror of the original direction."""
    w = words(events)
    ports = events["proto"]
    with_ports = (ports != 1) & (ports != 58)
    source = (w[:, 2:4] != w[:, 8:10]).any(axis=1)
    source |= with_ports & (events["sport"] != events["reply_dport"])
    target = (w[:, 4:6] != w[:, 6:8]).any(axis=1)
    target |= with_ports & (events["dport"] != events["reply_sport"])
    out: I64 = source * int(Status.SRC_NAT) | target * int(Status.DST_NAT)
    return out


def _each(column: Sequence[Optional[bytes]], value: Callable[[Optional[bytes]], int]) -> I64:
    """A number for each word, computed once for equal words."""
    known = {word: value(word) for word in dict.fromkeys(column)}
    return np.fromiter(map(known.__getitem__, column), np.int64, len(column))


_OF_REST: Final = ("status", "mark", "zone", "age", "user", "id")


def _rests(column: Sequence[Optional[bytes]], told: Numbers, bad: dict[int, str]) -> None:
    """The values in the ends of lines, computed once for equal ends."""
    distinct = {text: at for at, text in enumerate(dict.fromkeys(column))}
    table, wrong = np.zeros((len(distinct), len(_OF_REST)), np.int64), {}
    for text, at in distinct.items():
        try:
            table[at] = parse_rest(text or b"")
        except Bad as error:
            wrong[at] = str(error)
    of = np.fromiter(map(distinct.__getitem__, column), np.int64, len(column))
    for at, name in enumerate(_OF_REST):
        told[name] = table[of, at]
    if wrong:
        for at in np.flatnonzero(np.isin(of, list(wrong))).tolist():
            bad.setdefault(at, wrong[int(of[at])])


def parse_rest(text: bytes) -> tuple[int, int, int, int, bool, int]:
    """Status, mark, zone, age, whether a program did it, id. Raises Bad."""
    status = int(Status.CONFIRMED)
    said = Words(text)
    for flag in said.flags:
        status |= int(_BITS.get(flag, 0))
    if said.get(b"helper"):
        status |= int(Status.HELPER)
    zone = next((z for z in (said.whole(n, 65535) for n in _ZONES) if z >= 0), -1)
    user = b"USERSPACE" in said.flags or said.get(b"portid") is not None
    mark, age = said.whole(b"mark", (1 << 32) - 1, mask=True), said.whole(b"delta-time", 1 << 31)
    return status, mark, zone, age, user, said.whole(b"id", (1 << 32) - 1)


_ZONES: Final = (b"zone", b"zone-orig", b"zone-reply")


def _nanoseconds(text: Optional[bytes]) -> int:
    """Exact nanoseconds; a float would not be exact."""
    if text is None:
        return 0
    whole, _, part = text.partition(b".")
    if len(whole) > 10 or int(whole) >> 32:
        return 0
    return int(whole) * 10**9 + int(part[:9].ljust(9, b"0") or b"0")
