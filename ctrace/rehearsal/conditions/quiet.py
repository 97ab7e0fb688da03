"""Rules that decide nothing, whatever their conditions say: they log or count, no packet that is
sent here meets them, or they send to chains with only such rules.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence, Set
from typing import Final, Generic, Optional, TypeVar

from ctrace.host.rawlink import first, number, split, word
from ctrace.rehearsal.nft_copy import Expression

_JUMP, _GOTO, _RETURN = -3, -4, -5
LOGS: Final = {"LOG", "NFLOG", "ULOG"}
_COMPARE: Final = {"cmp", "bitwise", "byteorder", "range", "fib", "rt", "socket", "osf", "xfrm"}
_COUNT: Final = {"counter", "log", "limit", "quota", "connlimit", "numgen", "hash", "last"}
SHARED_MATCHES: Final = {"recent", "hashlimit", "rateest", "nfacct"}
"""Matches with a memory that other rules may ask."""
SENT: Final[dict[int, set[int]]] = {6: set(), 17: set(), 1: {0, 3, 8}, 58: {1, 2, 128, 129}}
"""Protocols of the packets that are sent here, and the types of ICMP's messages."""
_Chain = TypeVar("_Chain", bound=Hashable)
Chain = tuple[int, bytes, bytes]
"""(family, table, name)."""
Does = tuple[Optional[Sequence[_Chain]], bool]
"""(chains that a rule sends to, None: it decides by itself; whether it ends its own chain)."""


class Quiet(Generic[_Chain]):
    """Which chains decide nothing."""

    def __init__(self) -> None:
        self._loud: set[_Chain] = set()
        self._to: defaultdict[_Chain, set[_Chain]] = defaultdict(set)

    def knows_loud(self, chain: _Chain) -> bool:
        """Whether more of its rules tell nothing."""
        return chain in self._loud

    def see(self, chain: _Chain, targets: Optional[Collection[_Chain]]) -> None:
        """One rule: the chains that it sends to; None: it decides by itself."""
        if targets is None:
            self._loud.add(chain)
        else:
            self._to[chain].update(targets)

    def loud(self) -> set[_Chain]:
        """Chains in which, or in chains beyond which, something is decided."""
        while True:
            more = {c for c, to in self._to.items() if c not in self._loud and to & self._loud}
            if not more:
                return self._loud
            self._loud |= more


def decides(loud: Set[_Chain], chain: _Chain, does: Does[_Chain]) -> bool:
    """Whether anything hangs on a rule's conditions; ``loud``: as :meth:`Quiet.loud` says."""
    targets, ends = does
    return chain in loud and (targets is None or ends or not loud.isdisjoint(targets))


def does(rule: list[Expression], chain: Chain) -> Does[Chain]:
    """What a rule of nftables does in its chain."""
    to: list[Chain] = []
    ends = False
    for name, attributes in rule:
        if name in _COMPARE or name in _COUNT:
            continue
        of = dict(attributes)
        if name == "immediate" and not number(of[1]):
            verdict = dict(split(first(of[2], 2)))
            (code,) = struct.unpack(">i", verdict[1])
            if code not in (_JUMP, _GOTO, _RETURN):
                return None, True
            ends |= code != _JUMP
            to += [(*chain[:2], verdict[2])] if 2 in verdict else []
        elif not _asks(name, of):
            return None, True
    return to, ends


def _asks(name: str, of: dict[int, bytes]) -> bool:
    if name == "match":
        return word(of[1]) not in SHARED_MATCHES
    if name == "target":
        return word(of[1]) in LOGS
    if name == "objref":
        return number(of.get(1, b"")) == 1  # NFT_OBJECT_COUNTER
    if name == "lookup":  # a map to verdicts decides
        return bool(number(of.get(3, b"\1")))
    return name == "immediate" or (name in ("payload", "meta", "ct", "exthdr") and 1 in of)


_EQUAL: Final = {"cmp": 2, "lookup": 5}
"""Conditions, and the attribute that is zero where they ask for equal values."""


def unheard(rule: list[Expression], listed: Callable[[bytes], Set[int]]) -> bool:
    """Whether it asks for another protocol, or another message of ICMP, than any that is sent;
    ``listed``: the first bytes of the elements of a set, by its name."""
    asked, kinds = 0, set[int]()
    for name, attributes in rule:
        of = dict(attributes)
        if name == "match" and word(of[1]) in ("icmp", "icmp6"):
            kind, inverted = of[3][0], of[3][3] & 1  # struct ipt_icmp, ip6t_icmp; 255: any
            if not inverted and kind not in (255, *(SENT[1] | SENT[58])):
                return True
        elif asked and name in _EQUAL and not number(of.get(_EQUAL[name], b"")):
            values = listed(of[1]) if name == "lookup" else {first(of[3], 1)[0]}
            if values and values.isdisjoint(SENT if asked == 1 else kinds or values):
                return True
            kinds = SENT[min(values)] if asked == 1 and len(values) == 1 else kinds
        asked = 0
        if name == "meta" and 1 in of and number(of[2]) == 16:  # NFT_META_L4PROTO
            asked = 1
        elif name == "payload" and 1 in of:
            asked = 2 if [number(of[key]) for key in (2, 3, 4)] == [2, 0, 1] else 0
    return False
