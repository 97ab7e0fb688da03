"""Conditions that a copy can't decide as the host would: tried with both answers.

Limits, quotas and meters depend on what happened before; sockets, control groups, times of day
and fields of a packet that are not varied depend on what is not here. Two rehearsals tell
whether that matters: in one all of them are true, in the other none is. Lots among several fall on
the first of them in one, and on the last in the other: drawn, they would differ by chance.
Constants: include/uapi/linux/netfilter/nf_tables.h and x_tables' structs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Final, Optional

from ctrace.host.rawlink import NESTED, attr, be32, nested, number, split, text, word
from ctrace.rehearsal.conditions import recent
from ctrace.rehearsal.nft_copy import ELEMENT, SET, Change, Expression, Thing

_BREAK: Final[Expression] = (
    "immediate",
    [(1, be32(0)), (2, nested(2, attr(1, struct.pack(">i", -2))))],
)
_DROP: Final[Expression] = ("immediate", [(1, be32(0)), (2, nested(2, attr(1, be32(0))))])
_COUNTER: Final = text(1, "counter") + nested(2)
_COUNTS: Final = {7: _COUNTER, 10: nested(1, _COUNTER)}
"""A dynset's expression, and its list of them."""
_DRAWN: Final = {"numgen": (1, 2, 4), "hash": (2, 4, 6)}
"""Lots among several, and the attributes with their register, how many there are, the first."""
_KNOWN: Final = {
    "payload", "cmp", "bitwise", "byteorder", "range", "lookup", "immediate", "counter", "log",
    "meta", "ct", "nat", "masq", "redir", "notrack", "reject", "rt", "fib", "objref", "queue",
    "dynset", "exthdr", "tproxy", "dup", "fwd", "synproxy", "match", "target", "connlimit",
    "flow_offload", "limit", "quota", "socket", "osf", "xfrm", "numgen", "hash", "last",
}  # fmt: skip
_META_VARIED: Final = {1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 16, 19, 21, 22}
"""protocol, mark, iif, oif and their names and types, uid, gid, trace, families, packet type,
groups."""
MEASURES: Final = {2, 4, 5}
"""NFT_OBJECT_QUOTA, _LIMIT, _CONNLIMIT."""
_CT_DEPENDS: Final = {14, 15, 16}
"""Packets, bytes, average: of an entry's counters."""
COUNTED: Final = "connbytes"
SET_COUNTED: Final = "set, by an element's counters"
"""Not only whether an element is in a set, but how much of it was seen (``--packets-lt``)."""
XT_PLAIN: Final = {
    "conntrack", "state", "tcp", "udp", "icmp", "icmp6", "multiport", "comment", "set", "mark",
    "connmark", "addrtype", "iprange", "owner", "pkttype", "devgroup", "rpfilter", "helper",
    "connlabel", "sctp", "standard", "cluster", "rt", "frag", "hbh", "dst", "ah", "esp",
    "ipv6header", "mh",
}  # fmt: skip
_XT_TARGETS: Final = {
    "LOG", "NFLOG", "ULOG", "MARK", "CONNMARK", "DNAT", "SNAT", "MASQUERADE", "REDIRECT", "NETMAP",
    "REJECT", "TCPMSS", "CT", "NOTRACK", "SET", "TOS", "DSCP", "TTL", "HL", "CLASSIFY", "CHECKSUM",
    "TPROXY", "TEE", "TRACE", "SYNPROXY", "CONNSECMARK", "SECMARK", "NFQUEUE", "AUDIT", "ECN",
    "TCPOPTSTRIP", "ERROR", "HMARK", "RATEEST", "DNPT", "SNPT",
}  # fmt: skip
_OF_A_HEADER: Final = {"tos", "dscp", "ttl", "hl", "tcpmss", "mac"}
XT_KEPT: Final = _OF_A_HEADER | {"socket", "cgroup", "policy", "realm", "osf", "ipv4options"}
_META_VARIES: Final = {0, 20, 24, 30, 31, 32}
"""Length, processor, random number, time, day, hour."""
_META_CHANCE: Final = _META_VARIES - {0}
XT_MEASURES: Final = {
    "limit", "hashlimit", "connlimit", "quota", "statistic", "time", "recent", "rateest", "nfacct",
    "cpu", "connbytes", SET_COUNTED,
}  # fmt: skip
KEEPING: Final = {"SET", "RATEEST"}
"""Targets that leave something behind for later packets."""
_XT_CHANGED: Final = {"NFQUEUE", "MASQUERADE", "SNAT", "REDIRECT"}
"""Known targets that are loaded otherwise."""
SHARED: Final = {"IDLETIMER", "LED"}
"""Targets with state shared by the whole machine: never loaded."""
_FLAGS: Final = {"masq": 1, "redir": 3, "nat": 7}
"""The attribute with NF_NAT_RANGE_*."""
_EVAL: Final = 0x20
"""NFT_SET_EVAL: packets may fill it, and its elements measure."""
_RANDOM: Final = 0x04 | 0x10
"""NF_NAT_RANGE_PROTO_RANDOM, _FULLY."""

_NONE: Final[Mapping[bytes, str]] = {}


def change(
    answer: Optional[bool],
    *,
    untracked: bool,
    draw: bool = True,
    kept: Optional[bool] = None,
    packet: Optional[bool] = None,
    maps: Set[bytes] = frozenset(),
    meters: Mapping[bytes, str] = _NONE,
) -> Change:
    """A stage's change of rules: every condition that depends says ``answer`` (None: as it is).

    ``kept``: what those say instead that say the same of all packets of a conversation;
    ``packet``: what those say instead that read something of a packet. ``untracked``: where the
    service is, so that a limit on tracked connections counts none of it. ``draw``: False keeps
    source ports where a translation would draw them by lot. ``maps``: names of maps to limits and
    quotas; ``meters``: by a set's name what its elements measure, ``over`` or ``within``
    a number of connections, or something else. They come without that (:func:`unmetered`).
    """

    def apply(rule: list[Expression]) -> Optional[list[Expression]]:
        tainted: dict[int, Optional[bool]] = {}
        out: list[Expression] = []
        last: list[Expression] = []
        for name, attributes in rule:
            if kept is None and _grows(name, attributes):
                # Our packets are counted as any: of a connection's first ones nothing is unknown.
                tainted.pop(_register(dict(attributes)[1]) if name == "ct" else -1, None)
                out += _one(name, attributes, tainted, None, untracked=untracked, draw=draw)
                continue
            of_packet = packet is not None and _is_of_packet(name, attributes)
            says = packet if packet is not None and of_packet else answer
            if kept is not None and _is_kept(name, attributes):
                says = kept
            if name == "objref" and dict(attributes).get(4) in maps:
                # An unnamed map has to stay with its rule: after its end, it is never asked.
                (last if says else out).extend([_BREAK, (name, attributes)])
                continue
            meter = name in ("lookup", "dynset") and meters.get(dict(attributes)[1])
            if meter:
                out += _measured(meter, bool(says), untracked)
            out += _one(name, attributes, tainted, says, untracked=untracked, draw=draw)
        out += last
        return out if out != rule else None

    return apply


def _grows(name: str, attributes: list[tuple[int, bytes]]) -> bool:
    """Whether it asks for an entry's counters."""
    of = dict(attributes)
    if name == "match":
        return word(of[1]) == COUNTED
    return name == "ct" and 1 in of and number(of.get(2, b"")) in _CT_DEPENDS


def _is_kept(name: str, attributes: list[tuple[int, bytes]]) -> bool:
    """Whether a condition says the same of all packets that an end of a conversation sends."""
    of = dict(attributes)
    if name == "match":
        return word(of[1]) in XT_KEPT
    if name == "meta":
        return 1 in of and number(of.get(2, b"")) not in _META_VARIES
    if name == "payload" and 1 in of:
        return number(of[2]) == 0 or (
            number(of[2]) == 1 and number(of[3]) in (1, 7, 8) and number(of[4]) < 4
        )
    if name == "exthdr":  # of IPv6, and options of IPv4 (NFT_EXTHDR_OP_*)
        return 1 in of and number(of.get(6, b"")) in (0, 2)
    return name in ("socket", "osf", "xfrm")


def _match(of: dict[int, bytes]) -> str:
    """An extension's name; xt_set(8) is two, by its arguments (xt_set_info_match_v3, _v4)."""
    name, info = word(of[1]), of.get(3, b"")
    if name == "set" and len(info) >= 40:  # those of the first revisions are shorter
        at = {3: (8, 24), 4: (16, 32)}.get(number(of[2]), ())
        if any(info[one] for one in at):  # anything but IPSET_COUNTER_NONE
            return SET_COUNTED
    return name


def _is_of_packet(name: str, attributes: list[tuple[int, bytes]]) -> bool:
    """Whether a condition reads something of the packet, other than how many there were, when."""
    of = dict(attributes)
    if name == "match":
        return _match(of) not in XT_MEASURES
    if name == "meta":
        return 1 in of and number(of.get(2, b"")) not in _META_CHANCE
    return name in ("payload", "exthdr", "socket", "osf", "xfrm")


def is_lot(name: str, attributes: list[tuple[int, bytes]]) -> bool:
    """Whether it falls on one of several by chance or in turn."""
    return name in _DRAWN or (name == "match" and word(attributes[0][1]) == "statistic")


def odd(name: str, attributes: list[tuple[int, bytes]]) -> bool:
    """Whether an expression may be changed at all, or leave something behind."""
    if name in ("cmp", "immediate", "counter", "bitwise", "lookup", "log", "reject", "range"):
        return False
    if name in ("payload", "meta", "ct"):
        return _foreign(name, dict(attributes))
    if name == "match":
        return _match(dict(attributes)) not in XT_PLAIN
    if name == "target":
        what = word(attributes[0][1])
        return what not in _XT_TARGETS or what in _XT_CHANGED or what in KEEPING
    return True


def _one(  # noqa: PLR0911
    name: str,
    attributes: list[tuple[int, bytes]],
    tainted: dict[int, Optional[bool]],
    answer: Optional[bool],
    *,
    untracked: bool,
    draw: bool,
) -> list[Expression]:
    of = dict(attributes)
    same: list[Expression] = [(name, attributes)]
    if name in ("match", "target"):
        return _xt(name, attributes, answer, untracked=untracked, draw=draw)
    if name == "connlimit":
        return same if answer is None else _measured(_meter({name: of}), answer, untracked, same)
    if name == "flow_offload":
        return []  # a short cut past our ends; packets without it go the whole way
    if name == "queue":  # a listener lets everything pass, or nothing
        if answer is False:
            return [_DROP]
        return [(name, [(k, d) for k, d in attributes if k != 3] + [(3, struct.pack(">H", 1))])]
    if not draw and name in _FLAGS:
        return [(name, [(k, _quiet(d) if k == _FLAGS[name] else d) for k, d in attributes])]
    if answer is None:
        return same
    if name == "dynset" and (7 in of or 10 in of):
        inner = _inside(of)
        if _meter(inner):
            # Elements still come into the set; they count instead of measuring.
            counting = [(k, _COUNTS.get(k, d)) for k, d in attributes]
            return [*_measured(_meter(inner), answer, untracked), (name, counting)]
    measured = name == "objref" and number(of.get(1, b"")) in MEASURES
    if measured or name in ("limit", "quota", "last"):
        return [] if answer else [_BREAK, *same]
    return _loading(name, of, tainted, same, answer)


def _quiet(flags: bytes) -> bytes:
    return be32(number(flags) & ~_RANDOM)


def _inside(of: dict[int, bytes], one: int = 7, several: int = 10) -> dict[str, dict[int, bytes]]:
    """Expressions within one, or of a set or an element, by the numbers of their attributes."""
    every = [of[one]] if one in of else []
    found = (dict(split(body)) for body in (*every, *(b for _, b in split(of.get(several, b"")))))
    return {word(body[1]): dict(split(body.get(2, b""))) for body in found}


def _meter(inner: dict[str, dict[int, bytes]]) -> str:
    if {"limit", "quota"} & set(inner):
        return "packets"
    if "connlimit" not in inner:
        return ""
    return "over" if number(inner["connlimit"].get(2, b"")) & 1 else "within"


def _measured(
    meter: str, answer: bool, untracked: bool, same: Sequence[Expression] = ()
) -> list[Expression]:
    """What a condition comes to that says ``answer`` and is a ``meter``, as :func:`_meter` says:
    a limit on tracked connections counts no untracked packet, and others as before. ``same``: the
    condition itself, never asked: rules with it turn tracking on."""
    if not untracked or meter == "packets" or answer == (meter == "within"):
        return [] if answer else [_BREAK, *same]
    return _of_tracked(meter == "over")


def _of_tracked(yes: bool) -> list[Expression]:
    """Whether a packet is tracked (or not): by its state (NFT_CT_STATE, NF_CT_STATE_UNTRACKED), in
    the last register, which no condition before needs."""
    bit, none, last = struct.pack("=I", 0x40), attr(1, bytes(4)), be32(23)
    return [
        ("ct", [(1, last), (2, be32(0))]),
        ("bitwise", [(1, last), (2, last), (3, be32(4)), (4, attr(1, bit)), (5, none)]),
        ("cmp", [(1, last), (2, be32(0)), (3, none if yes else attr(1, bit))]),
    ]


def unmetered(things: Iterable[Thing]) -> tuple[tuple[Thing, ...], dict[bytes, str]]:
    """Sets and elements without what these measure by themselves, and by the set's name what that
    is: whether a packet is within it depends on all before it."""
    out, dynamic, meters = [], set(), {}
    for kind, family, body in things:
        of = dict(split(body)) if kind in (SET, ELEMENT) else {}
        if kind == SET and number(of.get(3, b"")) & _EVAL:
            dynamic.add((family, of[1], of[2]))
            meter = _meter(_inside(of, 17, 18))
            if meter:
                meters[of[2]] = meter
                body = _less(body, (17, 18))  # noqa: PLW2901
        elif kind == ELEMENT and (family, of[1], of[2]) in dynamic:
            every = [
                (key, one, _meter(_inside(dict(split(one)), 7, 11))) for key, one in split(of[3])
            ]
            if any(meter for _, _, meter in every):
                meters[of[2]] = next(meter for _, _, meter in every if meter)
                kept = (attr(key | NESTED, _less(one, (7, 11))) for key, one, _ in every)
                body = attr(1, of[1]) + attr(2, of[2]) + nested(3, *kept)  # noqa: PLW2901
        out.append((kind, family, body))
    return tuple(out), meters


def _less(body: bytes, left_out: tuple[int, int]) -> bytes:
    return b"".join(attr(key, data) for key, data in split(body) if key not in left_out)


def _loading(  # noqa: PLR0911
    name: str,
    of: dict[int, bytes],
    tainted: dict[int, Optional[bool]],
    same: list[Expression],
    answer: bool,
) -> list[Expression]:
    """Registers loaded with values that depend on the host, and the conditions on them."""
    target = _register(of.get(1 if name != "bitwise" else 2, b""))
    if name in _DRAWN:
        register, modulus, offset = (of.get(key, be32(0)) for key in _DRAWN[name])
        drawn = number(offset) + (0 if answer else max(0, number(modulus) - 1))
        tainted.pop(_register(register), None)
        value = nested(2, attr(1, struct.pack("=I", drawn)))
        return [("immediate", [(1, register), (2, value[4:])])]
    if _foreign(name, of):
        tainted[target] = answer
        return same
    if name in ("bitwise", "byteorder") and _register(of.get(1, b"")) in tainted:
        tainted[_register(of.get(2, b""))] = tainted[_register(of.get(1, b""))]
        return same
    source = _register(of.get(2 if name == "lookup" else 1, b""))
    said = [tainted[one] for one in tainted if source <= one < source + 4]
    if name in ("cmp", "range", "lookup") and said:
        if name != "lookup" and source not in tainted:
            return same
        return [] if all(said) else [_BREAK, *same]
    if name not in _KNOWN:
        return [] if answer else [_BREAK, *same]
    if name in ("payload", "meta", "ct", "fib", "rt", "exthdr") and 1 in of:
        tainted.pop(target, None)
    return same


def _register(data: bytes) -> int:
    """By words of 32 bits: the four wide registers lie over the narrow ones."""
    value = number(data)
    return value - 8 if value >= 8 else value * 4 - 4


def _foreign(name: str, of: dict[int, bytes]) -> bool:  # noqa: PLR0911
    """Whether it loads something that is missing here, or that the packets sent do not vary."""
    if name in ("socket", "osf", "xfrm"):
        return True
    if name == "meta":
        return 1 in of and number(of.get(2, b"")) not in _META_VARIED
    if name == "ct":
        return 1 in of and number(of.get(2, b"")) in _CT_DEPENDS
    if name == "exthdr":
        return 1 in of
    if name == "payload" and 1 in of:
        base, offset = number(of[2]), number(of[3])
        if base == 0:  # link layer: the MAC addresses
            return True
        if base == 1:
            ttl = (offset, number(of[4])) == (8, 1)
            return ttl or offset not in (9, 6, 12, 16, 8, 24, 13, 14, 15, 17, 18, 19)
        # What is beyond the header of TCP or UDP is the program's.
        return base > 2 or offset not in (0, 2, 13, 1, 17, 30, 28, 14, 50, 48)
    return False


def _xt(  # noqa: PLR0911
    name: str,
    attributes: list[tuple[int, bytes]],
    answer: Optional[bool],
    *,
    untracked: bool,
    draw: bool,
) -> list[Expression]:
    of = dict(attributes)
    what = word(of[1]) if name == "target" else _match(of)
    same: list[Expression] = [(name, attributes)]
    if name == "target":
        if what in SHARED:
            return []
        if what == "NFQUEUE" and answer is False:
            return [_DROP]
        if what == "NFQUEUE" and len(of.get(3, b"")) >= 6:
            info = of[3][:4] + struct.pack("=H", 1) + of[3][6:]
            return [(name, [(k, info if k == 3 else d) for k, d in attributes])]
        if not draw and what in ("MASQUERADE", "SNAT", "REDIRECT"):
            return [(name, [(k, _kept(d) if k == 3 else d) for k, d in attributes])]
        if answer is not None and what not in _XT_TARGETS:
            return [] if answer else [_BREAK, *same]
        return same
    if what == "connlimit" and answer is not None:
        within = struct.unpack_from("=I", of[3], 20)[0] & 1  # XT_CONNLIMIT_INVERT: at most
        return _measured("within" if within else "over", answer, untracked, same)
    if what == COUNTED and untracked and answer:
        return _of_tracked(True)  # without an entry it is never true
    if answer is None or what in XT_PLAIN or (what == recent.MATCH and recent.fills(of[3])):
        return same
    return [] if answer else [_BREAK, *same]


def _kept(info: bytes) -> bytes:
    """A translation's arguments without its random flags."""
    at = 0 if len(info) >= 36 else 4  # nf_nat_range(2): flags first; the old form: a count first
    flags = struct.unpack_from("=I", info, at)[0] & ~_RANDOM
    return info[:at] + struct.pack("=I", flags) + info[at + 4 :]
