"""Small changes of nftables in a namespace of our own, and what they came to."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from socket import MSG_DONTWAIT
from typing import Optional

from ctrace.host.rawlink import (
    ACK,
    CREATE,
    NETFILTER,
    Link,
    attr,
    first,
    message,
    number,
    split,
    text,
    word,
)
from ctrace.rehearsal.nft_copy import CHAIN, ELEMENT, NFT, RULE, SET, TABLE, Thing, again, head

DELETE_TABLE, DELETE_RULE, DELETE_ELEMENT = 2, 8, 14
Place = tuple[int, str, str]
"""(family, table, chain)."""
Request = tuple[int, int, bytes]
"""(message type, flags, body)."""


def carry_out(path: str, requests: Sequence[Request]) -> None:
    """All of them in one transaction. Raises OSError when the kernel refuses one."""
    out = [message(0x10, 0, head(0, 10))]
    for seq, (kind, flags, body) in enumerate(requests, 2):
        last = ACK if seq == len(requests) + 1 else 0
        out.append(message(NFT | kind, flags | last, body, seq))
    out.append(message(0x11, 0, head(0, 10)))
    with Link(path, NETFILTER) as link:
        for _, code in link.send(out, acks=1) if requests else ():
            raise OSError(code, os.strerror(code))


def handles(path: str, where: Place) -> list[int]:
    """Of a chain's rules in their order. Raises OSError, Interrupted."""
    ask = head(where[0]) + text(1, where[1]) + text(2, where[2])
    with Link(path, NETFILTER) as link:
        return [number(first(body, 3, 4)) for body in link.dump(NFT | RULE + 1, ask)]


def added(news: Link) -> list[tuple[Place, int, bytes]]:
    """(chain, handle, attributes) of the rules that were added since the last call, by ``news`` of
    the kernel's."""
    found = []
    with suppress(BlockingIOError):
        while True:
            data, at = news.sock.recv(1 << 18, MSG_DONTWAIT), 0
            while at < len(data):
                size, kind = struct.unpack_from("=IH", data, at)
                body = data[at + 16 : at + size]
                at += (size + 3) & ~3
                if kind == NFT | RULE:
                    of = dict(split(body, 4))
                    where = body[0], word(of[1]), word(of[2])
                    found.append((where, number(of[3]), body[4:]))
    return found


def moved(
    path: str, news: Link, moves: Sequence[tuple[Place, Optional[int]]]
) -> Iterator[tuple[Place, int]]:
    """(chain, handle) of the rules that were added, in their order; of each chain the first are
    ``moved`` to before others, by handle, or stay where there is none. Raises OSError."""
    rest, requests = list(moves), []
    for where, handle, attributes in added(news):
        to = next((one for one in rest if one[0] == where), None)
        if to is not None:
            rest.remove(to)
        if to is None or to[1] is None:
            yield where, handle
            continue
        body = again(RULE, where[0], attributes, None) + attr(6, struct.pack(">Q", to[1]))
        requests += [without(where, handle), (RULE, CREATE, head(where[0]) + body)]
    if requests:
        carry_out(path, requests)
        yield from moved(path, news, ())


def hook_of(path: str, where: Place) -> Optional[int]:
    """Where a base chain is called; -1 for another chain, None where there is no such chain."""
    ask = head(where[0]) + text(1, where[1]) + text(3, where[2])
    with Link(path, NETFILTER) as link:
        try:
            of = dict(split(link.ask(NFT | CHAIN + 1, ask), 4))
        except OSError:
            return None
    return number(dict(split(of[4]))[1]) if 4 in of else -1


def without(where: Place, handle: int = 0) -> Request:
    """What deletes a rule, or all of a chain."""
    body = head(where[0]) + text(1, where[1]) + text(2, where[2])
    return DELETE_RULE, 0, body + (attr(3, struct.pack(">Q", handle)) if handle else b"")


def elements(path: str, sets: Iterable[tuple[int, bytes, bytes]]) -> Iterator[tuple[str, bytes]]:
    """(name, attributes) of the elements of sets, in pieces. Raises OSError, Interrupted."""
    with Link(path, NETFILTER) as link:
        for family, table, name in sets:
            which = head(family) + attr(1, table) + attr(2, name)
            for body in link.dump(NFT | ELEMENT + 1, which):
                if any(kind == 3 for kind, _ in split(body, 4)):
                    yield f"{word(table)} {word(name)}", body[4:]


def without_table(family: int, name: str) -> Iterator[Request]:
    """What deletes a table, whether it is there or not."""
    body = head(family) + text(1, name)
    yield TABLE, CREATE, body
    yield DELETE_TABLE, 0, body


def refilled(things: Iterable[Thing]) -> Iterator[Request]:
    """What gives sets the elements that they had: of sets, and then of elements."""
    for kind, family, attributes in things:
        if kind == SET:
            of = dict(split(attributes))
            yield DELETE_ELEMENT, 0, head(family) + attr(1, of[1]) + attr(2, of[2])
        else:
            yield kind, CREATE, head(family) + again(kind, family, attributes, None)
