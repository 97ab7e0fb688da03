"""All nftables objects of a namespace, expressions verbatim, read and loaded into another.

The kernel's own form is the only one that comes back the same: texts and JSON of nft lose
iptables' extensions and some flags. What a dump says that can't be said back is repaired here.
Attribute numbers: include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Final, Optional

from ctrace.host.rawlink import (
    ACK,
    APPEND,
    CREATE,
    NESTED,
    NETFILTER,
    Attributes,
    Interrupted,
    Link,
    attr,
    be32,
    message,
    nested,
    number,
    split,
    text,
    word,
)

NFT: Final = 10 << 8
NETDEV, BRIDGE = 5, 7
TABLE, CHAIN, RULE, SET, ELEMENT, OBJECT, FLOWTABLE = 0, 3, 6, 9, 12, 18, 22
GET_GENERATION: Final = 16
_ORDER: Final = (TABLE, CHAIN, SET, OBJECT, FLOWTABLE, RULE)
_LEFT_OUT: Final = {  # use counts, handles, positions, padding
    TABLE: (3, 4, 5, 7),
    CHAIN: (2, 6, 9),
    RULE: (3, 6, 8),
    SET: (10, 14, 16, 19, 20),
    ELEMENT: (),
    OBJECT: (5, 6, 7),
    FLOWTABLE: (4, 5, 6),
}
_NESTS: Final = {
    TABLE: (),
    CHAIN: (4, 8),
    RULE: (4,),
    SET: (9, 17, 18),
    ELEMENT: (3,),
    OBJECT: (4,),
    FLOWTABLE: (3,),
}
EGRESS: Final = 1
"""NF_NETDEV_EGRESS (5.16)."""
_BINDING: Final = 4
_OWNED: Final = 2 | 4
"""The table goes when its socket does; persistent."""

Thing = tuple[int, int, bytes]
"""(kind, family, attributes)."""
Expression = tuple[str, Attributes]
Change = Callable[[list[Expression]], Optional[list[Expression]]]
"""A rule's expressions otherwise; None: as they are."""


def read(path: str, tries: int = 5) -> tuple[Thing, ...]:
    """Everything in the namespace at ``path``, in an order in which it can be recreated.

    All of one generation of the ruleset. Raises Interrupted when it keeps changing.
    """
    with Link(path, NETFILTER) as link:
        for _ in range(tries):
            try:
                before = _generation(link)
                found = _read(link)
                if _generation(link) == before:
                    return found
            except Interrupted:
                continue
    raise Interrupted


def _generation(link: Link) -> bytes:
    try:
        return dict(split(link.ask(NFT | GET_GENERATION, head(0)), 4)).get(1, b"")
    except OSError:
        return b""


def _read(link: Link) -> tuple[Thing, ...]:
    found: dict[int, list[Thing]] = {}
    for kind in _ORDER:
        found[kind] = [(kind, body[0], body[4:]) for body in link.dump(NFT | kind + 1, head(0))]
    elements = []
    for _, family, body in found[SET]:
        of = dict(split(body))
        which = head(family) + attr(1, of[1]) + attr(2, of[2])
        elements += [
            (ELEMENT, piece[0], piece[4:])
            for piece in link.dump(NFT | ELEMENT + 1, which)
            if any(kind == 3 for kind, _ in split(piece, 4))
        ]
    return (
        *found[TABLE],
        *found[CHAIN],
        *found[OBJECT],
        *found[SET],
        *elements,
        *found[FLOWTABLE],
        *_bound_first(found[CHAIN], found[RULE]),
    )


def head(family: int, resource: int = 0) -> bytes:
    """Of a message: struct nfgenmsg."""
    return struct.pack(">BBH", family, 0, resource)


def _bound_first(chains: list[Thing], rules: list[Thing]) -> list[Thing]:
    """The rules of an unnamed chain must exist before the rule that jumps to it."""
    bound = set()
    for _, family, body in chains:
        of = dict(split(body))
        if number(of.get(10, b"")) & _BINDING:
            bound.add((family, of[1], of[3]))
    if not bound:
        return rules
    by_chain: dict[tuple[int, bytes, bytes], list[Thing]] = {}
    for rule in rules:
        of = dict(split(rule[2]))
        by_chain.setdefault((rule[1], of[1], of[2]), []).append(rule)
    done: set[tuple[int, bytes, bytes]] = set()
    out: list[Thing] = []

    def put(key: tuple[int, bytes, bytes]) -> None:
        if key in done:
            return
        done.add(key)
        for rule in by_chain.get(key, ()):
            for other in bound:
                if other[:2] == key[:2] and other[2] in rule[2]:
                    put(other)
        out.extend(by_chain.get(key, ()))

    for key in by_chain:
        if key not in bound:
            put(key)
    return out


@dataclass(frozen=True)
class Batch:
    """One transaction that makes everything, ready to be sent."""

    things: tuple[Thing, ...]
    messages: tuple[bytes, ...]
    positions: dict[tuple[int, str, str], dict[int, int]] = field(default_factory=dict)
    """By chain, (family, table, name), the place of each rule by its handle, as far as asked: a
    table counts handles from one (nf_tables_alloc_handle), so they are the same wherever this is
    loaded."""


def batch(
    things: Iterable[Thing], change: Optional[Change] = None, only: Optional[Set[bytes]] = None
) -> Batch:
    """All of it as messages, with rules as ``change`` makes them: those in ``only``, or all."""
    todo = tuple(things)
    out = [message(0x10, 0, head(0, 10))]
    ids: dict[tuple[int, bytes, bytes], int] = {}
    for seq, (kind, family, attributes) in enumerate(todo, 2):
        mine = change if only is None or attributes in only else None
        body = head(family) + again(kind, family, attributes, mine)
        if kind == SET:
            of = dict(split(attributes))
            body += attr(10, be32(ids.setdefault((family, of[1], of[2]), len(ids) + 1)))
        flags = CREATE | (APPEND if kind == RULE else 0)
        out.append(message(NFT | kind, flags | (ACK if seq == len(todo) + 1 else 0), body, seq))
    out.append(message(0x11, 0, head(0, 10)))
    return Batch(todo, tuple(out))


def instead(made: Batch) -> Batch:
    """The same in place of tables of these names, in one transaction."""
    first_of_all, *rest = made.messages
    gone = [
        message(NFT | TABLE + 2, 0, head(family) + attr(1, dict(split(body))[1]), 1)
        for kind, family, body in made.things
        if kind == TABLE
    ]
    return Batch(made.things, (first_of_all, *gone, *rest), made.positions)


def write(path: str, made: Batch) -> list[str]:
    """Load it into the empty namespace at ``path``.

    Returns what was refused, in words; in that case nothing was loaded.
    """
    if not made.things:
        return []
    with Link(path, NETFILTER) as link:
        # Errors come unasked; one acknowledgement, for the last, says that all were looked at.
        failed = link.send(list(made.messages), acks=1)
    return [f"{_described(made.things, seq)}: {os.strerror(code)}" for seq, code in failed]


def _described(todo: Sequence[Thing], seq: int) -> str:
    if not 2 <= seq < len(todo) + 2:
        return "the transaction"
    kind, _, body = todo[seq - 2]
    keys = (1, 2, 3) if kind < RULE else (1, 2)
    names = [word(data) for key, data in split(body) if key in keys and data.endswith(b"\0")]
    what = {
        TABLE: "table",
        CHAIN: "chain",
        RULE: "a rule of",
        SET: "set",
        ELEMENT: "elements of",
        OBJECT: "object",
        FLOWTABLE: "flowtable",
    }[kind]
    return f"{what} {' '.join(names)}"


def again(kind: int, family: int, attributes: bytes, change: Optional[Change]) -> bytes:
    """The attributes of a dump as they can be sent back."""
    out = b""
    for key, data in split(attributes):
        if key in _LEFT_OUT[kind]:
            continue
        if kind == TABLE and key == 2:
            data = be32(number(data) & ~_OWNED)  # noqa: PLW2901
        if kind == RULE and key == 4:
            data, more = _rule(family, data, change)  # noqa: PLW2901
            out += more
        out += attr(key | (NESTED if key in _NESTS[kind] else 0), data)
    return out


def _rule(family: int, blob: bytes, change: Optional[Change]) -> tuple[bytes, bytes]:
    """A rule's expressions, with the extra data that iptables' extensions need."""
    odd = any(name in blob for name in (b"dynset", b"exthdr", b"osf"))
    xt = b"match\0" in blob or b"target\0" in blob
    if not (odd or xt or change):
        return blob, b""
    found = expressions(blob)
    more = _compat(family, found) if xt else b""
    if odd:
        _repair(found)
    changed = change(found) if change else None
    return (
        packed(changed if changed is not None else found) if odd or changed is not None else blob
    ), more


def expressions(blob: bytes) -> list[Expression]:
    """(name, attributes) of each expression of a rule."""
    found = []
    for _, data in split(blob):
        of = dict(split(data))
        found.append((word(of[1]), split(of.get(2, b""))))
    return found


def packed(found: list[Expression]) -> bytes:
    """The reverse."""
    return b"".join(
        nested(1, text(1, name), nested(2, *(attr(key, data) for key, data in of)))
        for name, of in found
    )


def _repair(found: list[Expression]) -> None:
    """A dump says 0 for what is not set, and then that can't be set: a dynset's timeout, the
    flags of osf and of an expression that writes a TCP option, the offset of one that strips it."""
    for name, of in found:
        has = {key for key, _ in of}
        zero: tuple[int, ...] = {"dynset": (6,), "osf": (3,)}.get(name, ())
        if name == "exthdr" and 1 not in has:  # no destination register
            zero = (5,) if 7 in has else (3, 4, 5)
        of[:] = [(key, data) for key, data in of if key not in zero or any(data)]


def _compat(family: int, found: list[Expression]) -> bytes:
    """NFTA_RULE_COMPAT, which dumps lack: the protocol, from the rule's own first compare."""
    register, proto, inverted = b"", 0, 0
    for name, attributes in found:
        of = dict(attributes)
        header = be32(9 if family == 2 else 6)
        if (name == "meta" and of.get(2) == be32(16)) or (  # NFT_META_L4PROTO
            name == "payload" and of.get(2) == of.get(4) == be32(1) and of.get(3) == header
        ):
            register = of.get(1, b"")
        elif name == "cmp" and register and of.get(1) == register:
            proto = dict(split(of[3]))[1][0]
            inverted = 2 if of.get(2) == be32(1) else 0
            break
        else:
            register = b""
    return nested(5, attr(1, be32(proto)), attr(2, be32(inverted)))


def _base(body: bytes) -> Optional[tuple[int, int]]:
    """(hook, priority) of a base chain."""
    of = dict(split(dict(split(body)).get(4, b"")))
    if 1 not in of or 2 not in of:
        return None
    return int.from_bytes(of[1], "big"), int.from_bytes(of[2], "big", signed=True)


def at_egress(things: Iterable[Thing]) -> set[str]:
    """Names of the devices with chains that see what leaves by them."""
    found = set()
    for kind, family, body in things:
        place = _base(body) if kind == CHAIN and family == NETDEV else None
        if place is not None and place[0] == EGRESS:
            of = dict(split(dict(split(body))[4]))
            found |= {word(name) for _, name in split(of.get(4, b""))} | {word(of.get(3, b""))}
    return found - {""}


def equal_priorities(things: Iterable[Thing]) -> bool:
    """Whether two base chains that see the same packets have the same priority: their order is
    unknown, and may be either."""
    seen: dict[tuple[int, int], set[int]] = {}
    for kind, family, body in things:
        place = _base(body) if kind == CHAIN else None
        if place is None or family not in (1, 2, 10):
            continue
        there = seen.setdefault(place, set())
        if family in there or (family == 1 and there) or 1 in there:
            return True
        there.add(family)
    return False


def late_first(things: Sequence[Thing]) -> tuple[Thing, ...]:
    """The same with its chains registered the other way round."""
    chains = [thing for thing in things if thing[0] == CHAIN]
    others = [thing for thing in things if thing[0] != CHAIN]
    tables = sum(thing[0] == TABLE for thing in others)
    return (*others[:tables], *reversed(chains), *others[tables:])


def lasting(things: Sequence[Thing], sets: Set[tuple[int, bytes, bytes]]) -> tuple[Thing, ...]:
    """The same without elements of these sets, (family, table, name), that expire by themselves."""
    found: list[Thing] = []
    for thing in things:
        kind, family, body = thing
        of = dict(split(body)) if kind == ELEMENT else {}
        if kind == ELEMENT and (family, of[1], of[2]) in sets:
            every = split(of[3])
            kept = [
                (key, one) for key, one in every if not _EXPIRATION & {k for k, _ in split(one)}
            ]
            if len(kept) < len(every):
                elements = nested(3, *(attr(key | NESTED, one) for key, one in kept))
                thing = kind, family, attr(1, of[1]) + attr(2, of[2]) + elements  # noqa: PLW2901
                if not kept:
                    continue
        found.append(thing)
    return tuple(found)


_EXPIRATION: Final = {5}
"""NFTA_SET_ELEM_EXPIRATION."""
