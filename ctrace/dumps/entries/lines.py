"""Lines of conntrack entries, from /proc, ``conntrack -L`` or ``-E``, to records.

A line becomes a :data:`Row` of byte strings: most by one compiled pattern, the others
(vendors' extra words, a prefix) word by word, with the same result. Rows become columns
together, so that a dump of a million lines takes seconds.

The kernel prints entries in ct_seq_show (net/netfilter/nf_conntrack_standalone.c);
conntrack-tools in libnetfilter_conntrack's src/conntrack/snprintf_default.c.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

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

Row = tuple[Optional[bytes], ...]
"""time, tag, family, protocol number, seconds left, state, then of each direction: src, dst,
ports, type, code, id, and after the first direction [UNREPLIED]; then the rest."""
COLUMNS: Final = 22

_FLOW: Final = (
    rb"src=([0-9a-fA-F:.]+) dst=([0-9a-fA-F:.]+)"
    rb"(?: sport=(\d+) dport=(\d+)| type=(\d+) code=(\d+) id=(\d+))?"
    rb"(?: packets=\d+ bytes=\d+)?"
)
_FAST: Final = re.compile(
    rb"\s*(?:\[(\d+(?:\.\d+)?)\]\s+)?(?:\[(NEW|UPDATE|DESTROY)\] )?(?:ipv(4|6) +\d+ )?"
    rb"[a-z]\w* +(\d+) (?:(\d+) )?(?:([A-Z][A-Z0-9_]*) )?"
    + _FLOW + rb"( \[UNREPLIED\])? " + _FLOW + rb"((?![^ ]).*)",
    re.DOTALL,
)  # fmt: skip
_HEAD: Final = re.compile(
    rb"(?:^|(?<=[\s:\]|]))(?:(ipv4|ipv6)\s+\d+\s+)?([a-z][\w-]*)\s+(\d{1,3})\s+(?:(\d+)\s+)?"
    rb"(?:([A-Z][A-Z0-9_]*)\s+)?(?=(?:[^\s=]+=\S*\s+|\[[^\]]*\]\s+){0,4}src=)"
)
_TIME: Final = re.compile(rb"\[\s*(\d+(?:\.\d+)?)\]")
_TAG: Final = re.compile(rb"\[(NEW|UPDATE|DESTROY)\]")
_TCP: Final = {name.encode(): at for at, name in enumerate(TCP_STATES)}
_BITS: Final = {
    b"ASSURED": Status.ASSURED,
    b"OFFLOAD": Status.OFFLOAD,
    b"HW_OFFLOAD": Status.HW_OFFLOAD,
    b"EXPECTED": Status.EXPECTED,
    b"DYING": Status.DYING,
    b"FIXED_TIMEOUT": Status.FIXED_TIMEOUT,
}
TAGS: Final = (b"", b"NEW", b"UPDATE", b"DESTROY")


@dataclass(frozen=True)
class Entries:
    """Entries of one dump or stretch of events, aligned arrays."""

    events: Events
    """Tuples, protocol, family, zone, status, state; ``ct`` tells entries apart, kind is
    EXISTING, ``ts`` zero."""
    left: npt.NDArray[np.int64]
    """Seconds until it expires; -1 where the line does not say."""
    mark: npt.NDArray[np.int64]
    """-1 where the line does not say."""
    age: npt.NDArray[np.int64]
    """Seconds since it was made (``delta-time``); -1 where the line does not say."""
    tag: npt.NDArray[np.uint8]
    """Index into :data:`TAGS`."""
    time: npt.NDArray[np.int64]
    """UTC ns of an event; 0 where the line does not say."""
    user: npt.NDArray[np.bool_]
    """Whether a program caused the event (``-o userspace``)."""
    state: list[bytes]
    """The state's word, of any protocol; empty where the line has none."""

    def __len__(self) -> int:
        return len(self.events)


def row(line: bytes) -> Optional[Row]:
    """The line's row by the one pattern; None when it needs :func:`slow_row` or is no entry."""
    found = _FAST.match(line)
    return found.groups() if found else None


def looks_like_entry(line: bytes) -> bool:
    """Whether a line is worth :func:`slow_row`."""
    return b"src=" in line and b"dst=" in line


def slow_row(line: bytes) -> Row:
    """The row of a line in any order of words. Raises Bad with the reason."""
    head = _HEAD.search(line)
    if head is None:
        raise Bad("no protocol and number before the addresses")
    family, _, proto, left, state = head.groups()
    flows: list[dict[bytes, bytes]] = [{}, {}]
    at, rest, unreplied = -1, [], None
    for word in line[head.end() :].split():
        name, is_, value = word.partition(b"=")
        if name == b"src" and is_:
            at += 1
        if word == b"[UNREPLIED]":
            unreplied = word
        elif at in (0, 1) and is_ and _of_flow(name, flows[at]):
            flows[at][name] = value
        else:
            rest.append(word)
    if at < 1:
        raise Bad("cut off before the reply's addresses")
    if at > 1:
        raise Bad("more than two directions")
    time, tag = _TIME.search(line[: head.start()]), _TAG.search(line[: head.start()])
    one, other = (_flow(flow) for flow in flows)
    return (
        time and time[1], tag and tag[1], family and family[3:], proto, left, state,
        *one, unreplied, *other, b" ".join(rest),
    )  # fmt: skip


_FLOW_WORDS: Final = frozenset(
    (b"src", b"dst", b"sport", b"dport", b"type", b"code", b"id", b"srckey", b"dstkey")
)


def _of_flow(name: bytes, flow: dict[bytes, bytes]) -> bool:
    """Whether a word belongs to the direction: ``id`` may be ICMP's, or the entry's own."""
    return name in _FLOW_WORDS and name not in flow and (name != b"id" or b"type" in flow)


def _flow(flow: dict[bytes, bytes]) -> tuple[Optional[bytes], ...]:
    """src, dst, sport, dport, type, code, id of one direction."""
    if b"dst" not in flow:
        raise Bad("a direction without its destination")
    ports = [flow.get(b"sport"), flow.get(b"dport")]
    if b"srckey" in flow:
        ports = [gre_key(flow.get(key)) for key in (b"srckey", b"dstkey")]
    return (
        flow[b"src"], flow[b"dst"], *ports, *(flow.get(n) for n in (b"type", b"code", b"id"))
    )  # fmt: skip


def gre_key(text: Optional[bytes]) -> Optional[bytes]:
    """GRE's key, printed in hexadecimal, as the port that it takes the place of. Raises Bad."""
    if text is None:
        return None
    if not re.fullmatch(rb"(0x)?[0-9a-fA-F]{1,8}", text):
        raise Bad("a GRE key that is no number")
    return b"%d" % (int(text, 16) & 0xFFFF)


def entries(rows: Sequence[Row]) -> tuple[Entries, dict[int, str]]:
    """The entries of rows, and (row number: reason) for those that make none.

    The result has a place for each row that makes one, in their order.
    """
    bad: dict[int, str] = {}
    columns = [list(map(itemgetter(at), rows)) for at in range(COLUMNS)]
    n = len(rows)
    events = empty(n)
    octets = events.view(np.uint8).reshape(n, RECORD.itemsize)
    for at, column in ((16, 6), (32, 7), (48, 14), (64, 15)):
        octets[:, at : at + 16] = addresses(columns[column], bad)
    proto = number(columns[3], 0, 255, bad, "protocol number")
    events["proto"] = proto
    _ports(events, columns, proto, bad)
    mapped = (octets[:, 16:28] == np.frombuffer(MAPPED_PREFIX, np.uint8)).all(axis=1)
    events["family"] = np.where(mapped, 2, 10)
    for at, family in enumerate(columns[2]):
        if family is not None and (family == b"4") != mapped[at]:
            bad.setdefault(at, "an address of another family")
    state = [one or b"" for one in columns[5]]
    codes = _each(state, lambda one: _TCP.get(one or b"", STATE_UNKNOWN))
    events["state"] = np.where(proto == 6, codes, STATE_UNKNOWN)
    rest, of = _rests(columns[21], bad)
    replied = np.fromiter((one is None for one in columns[13]), bool, n)
    events["zone"] = rest[:, 2][of]
    events["status"] = rest[:, 0][of] | replied * int(Status.SEEN_REPLY) | _translated(events)
    events["kind"] = Kind.EXISTING
    made = Entries(
        events,
        number(columns[4], -1, (1 << 31) - 1, bad, "timeout"),
        rest[:, 1][of],
        rest[:, 3][of],
        _each(columns[1], lambda tag: TAGS.index(tag or b"")).astype(np.uint8),
        _each(columns[0], _nanoseconds),
        rest[:, 4][of] != 0,
        state,
    )
    if n:
        events["ct"] = identity(words(events)) ^ _nameless(columns, rest[:, 5][of])
    return (_without(made, bad) if bad else made), bad


def _without(made: Entries, bad: dict[int, str]) -> Entries:
    keep = np.ones(len(made), bool)
    keep[list(bad)] = False
    at = np.flatnonzero(keep)
    return take(made, at)


def take(made: Entries, at: npt.NDArray[np.intp]) -> Entries:
    """Some of the entries."""
    events: Events = words(made.events)[at].view(RECORD).reshape(-1)
    return Entries(
        events, made.left[at], made.mark[at], made.age[at], made.tag[at], made.time[at],
        made.user[at], [made.state[i] for i in at.tolist()],
    )  # fmt: skip


def _ports(
    events: Events, columns: list[list[Optional[bytes]]], proto: npt.NDArray[np.int64],
    bad: dict[int, str],
) -> None:  # fmt: skip
    """Ports; for ICMP the identifier, and type << 8 | code, as in ctrace.host.ctmessage."""
    icmp = (proto == PROTO_NUMBERS["icmp"]) | (proto == PROTO_NUMBERS["icmpv6"])
    for first, prefix in ((8, ""), (16, "reply_")):
        sport, dport, kind, code, ident = (columns[first + i] for i in range(5))
        source = number(sport, 0, 65535, bad, "port")
        target = number(dport, 0, 65535, bad, "port")
        if icmp.any():
            ident_ = number(ident, 0, 65535, bad, "number of ICMP")
            what = number(kind, 0, 255, bad, "type") << 8 | number(code, 0, 255, bad, "code")
            source, target = np.where(icmp, ident_, source), np.where(icmp, what, target)
        events[prefix + "sport"], events[prefix + "dport"] = source, target


def _translated(events: Events) -> npt.NDArray[np.int64]:
    """SRC_NAT and DST_NAT where the reply is no mirror of the original direction."""
    w = words(events)
    ports = events["proto"]
    with_ports = (ports != 1) & (ports != 58)
    source = (w[:, 2:4] != w[:, 8:10]).any(axis=1)
    source |= with_ports & (events["sport"] != events["reply_dport"])
    target = (w[:, 4:6] != w[:, 6:8]).any(axis=1)
    target |= with_ports & (events["dport"] != events["reply_sport"])
    out: npt.NDArray[np.int64] = source * int(Status.SRC_NAT) | target * int(Status.DST_NAT)
    return out


def _each(
    column: Sequence[Optional[bytes]], value: Callable[[Optional[bytes]], int]
) -> npt.NDArray[np.int64]:
    """A number for each word, worked out once for those that are alike."""
    known = {word: value(word) for word in dict.fromkeys(column)}
    return np.fromiter(map(known.__getitem__, column), np.int64, len(column))


def _rests(
    column: Sequence[Optional[bytes]], bad: dict[int, str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Status, mark, zone, age, whether a program did it, id: one row for each distinct end of
    a line, and which one each entry has."""
    distinct = {text: at for at, text in enumerate(dict.fromkeys(column))}
    table, wrong = np.zeros((len(distinct), 6), np.int64), {}
    for text, at in distinct.items():
        try:
            table[at] = _parse_rest(text or b"")
        except Bad as error:
            wrong[at] = str(error)
    of = np.fromiter(map(distinct.__getitem__, column), np.int64, len(column))
    if wrong:
        for at in np.flatnonzero(np.isin(of, list(wrong))).tolist():
            bad.setdefault(at, wrong[int(of[at])])
    return table, of


def _nameless(
    columns: list[list[Optional[bytes]]], ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """The kernel's own id tells apart what has neither ports nor identifier (XML's ICMP)."""
    if columns[8].count(None) + columns[12].count(None) <= len(ids):
        return np.zeros(len(ids), np.uint64)
    bare = [one is None and other is None for one, other in map(_two, columns[8], columns[12])]
    return np.where(np.array(bare), np.maximum(ids, 0), 0).astype(np.uint64) << np.uint64(24)


def _two(one: Optional[bytes], other: Optional[bytes]) -> tuple[Optional[bytes], Optional[bytes]]:
    return one, other


def _parse_rest(text: bytes) -> tuple[int, int, int, int, bool, int]:
    status = int(Status.CONFIRMED)
    said = Words(text)
    for flag in said.flags:
        status |= int(_BITS.get(flag, 0))
    if said.get(b"helper"):
        status |= int(Status.HELPER)
    zone = next((z for z in (said.whole(n, 65535) for n in _ZONES) if z >= 0), 0)
    user = b"USERSPACE" in said.flags or said.get(b"portid") is not None
    mark, age = said.whole(b"mark", (1 << 32) - 1), said.whole(b"delta-time", 1 << 31)
    return status, mark, zone, age, user, said.whole(b"id", (1 << 32) - 1)


_ZONES: Final = (b"zone", b"zone-orig", b"zone-reply")


def _nanoseconds(text: Optional[bytes]) -> int:
    """Exact, which a float would not be."""
    if text is None:
        return 0
    whole, _, part = text.partition(b".")
    if len(whole) > 10:
        return 0
    return int(whole) * 10**9 + int(part[:9].ljust(9, b"0") or b"0")
