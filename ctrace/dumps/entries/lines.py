"""Lines of conntrack entries, from /proc, ``conntrack -L`` or ``-E``, to records.

A line becomes a :data:`Row` of byte strings, word by word, in whatever order its words are
(vendors add some, logs a prefix). Rows become columns together. Most lines of a dump are
alike: ctrace.dumps.entries.alike reads those without this.

The kernel prints entries in ct_seq_show (net/netfilter/nf_conntrack_standalone.c);
conntrack-tools in libnetfilter_conntrack's src/conntrack/snprintf_default.c.
"""

from __future__ import annotations

import re
from typing import Final, Optional

from ctrace.dumps.entries.words import Bad
from ctrace.record import PROTO_NUMBERS

Row = tuple[Optional[bytes], ...]
"""time, tag, family, protocol number, seconds left, state, then of each direction: src, dst,
ports, type, code, id, and after the first direction [UNREPLIED]; then the rest."""
COLUMNS: Final = 22

_HEAD: Final = re.compile(
    rb"(?:^|(?<=[\s:\]|,]))(?:(ipv4|ipv6)\s+\d+\s+)?([a-z][\w-]*)\s+(\d{1,3})\s+(?:(-?\d+)\s+)?"
    rb"(?:([A-Z][A-Z0-9_]*)\s+)?(?=(?:[^\s=]+=\S*\s+|\[[^\]]*\]\s+){0,4}src=)"
)
_TAKEN: Final = re.compile(rb"-[a-z]")
_TIME: Final = re.compile(rb"\[\s*(\d+(?:\.\d+)?)\]")
_TAG: Final = re.compile(rb"\[(NEW|UPDATE|DESTROY)\]")
_EXPECTED: Final = re.compile(
    rb"^\s*(?:\[\s*[\d.]+\]\s*)?(?:\[(?:NEW|UPDATE|DESTROY)\]\s+)?(?:EXPECTING: )?(?:-|\d+) "
    rb"(?:use=\d+ )?(?:l3proto = \d+ )?proto=\d+ src=\S+ dst=\S+"
)
"""An expectation, by the kernel (exp_seq_show, and ip_conntrack before 2.6.12) or conntrack."""


def is_expectation(line: bytes) -> bool:
    """Whether a line tells of a connection that a helper expects."""
    return _EXPECTED.match(line) is not None


def looks_like_entry(line: bytes) -> bool:
    """Whether a line is worth :func:`row`."""
    return b"src=" in line and b"dst=" in line


_GLUED: Final = re.compile(rb"\b(?:use|id)=\d+(?=[a-z])")
"""The end of a dump without its newline, as ``$(cat ...)`` leaves it, and the next one's start."""


def glued(line: bytes) -> list[bytes]:
    """The entries of a line that holds the last of a dump and the first of the next."""
    found = _GLUED.search(line) if line.count(b"src=") > 2 else None
    return [line[: found.end()], line[found.end() :]] if found else [line]


def begins(line: bytes) -> bool:
    """Whether a line may be the beginning of an entry, without its destination."""
    return _HEAD.search(line) is not None


NAMED: Final = {
    name.encode(): PROTO_NUMBERS[name]
    for name in ("icmp", "tcp", "udp", "dccp", "gre", "icmpv6", "sctp", "udplite")
}
"""The protocols that the kernel has a name for, and their numbers."""


def row(line: bytes) -> Row:
    """The row of a line in any order of words. Raises Bad with the reason."""
    found, name = named_row(line)
    if NAMED.get(name, int(found[3] or 0)) != int(found[3] or 0):
        raise Bad("a protocol's name with the number of another")
    return found


def named_row(line: bytes) -> tuple[Row, bytes]:
    """The same whatever the number, and the protocol's name. Raises Bad."""
    if _TAKEN.match(line):
        raise Bad("a line that a diff takes away")
    head = _HEAD.search(line)
    if head is None:
        raise Bad("no protocol and number before the addresses")
    family, name, proto, left, state = head.groups()
    flows: list[dict[bytes, bytes]] = [{}, {}]
    at, rest, unreplied, key = -1, [], None, b""
    for word in line[head.end() :].split():
        key, is_, value = word.partition(b"=")
        if key == b"src" and is_:
            at += 1
        if word == b"[UNREPLIED]":
            unreplied = word
        elif at in (0, 1) and is_ and _of_flow(key, flows[at]):
            flows[at][key] = value
        else:
            rest.append(word)
    if at < 1:
        raise Bad("cut off before the reply's addresses")
    if at > 1:
        raise Bad("more than two directions")
    time, tag = _TIME.search(line[: head.start()]), _TAG.search(line[: head.start()])
    one, other = (_flow(flow) for flow in flows)
    if _torn(flows, key):
        raise Bad("cut off within the reply's ports")
    found = (
        time and time[1],
        tag and tag[1],
        family and family[3:],
        proto,
        left and (b"0" if left[:1] == b"-" else left),  # before Linux 4.9 an overdue one's was -1
        state,
        *one,
        unreplied,
        *other,
        b" ".join(rest),
    )
    return found, name


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
    return (flow[b"src"], flow[b"dst"], *ports, *(flow.get(n) for n in (b"type", b"code", b"id")))


_LAST: Final = ((b"dport", b"sport"), (b"dstkey", b"srckey"), (b"id", b"id"))
"""A direction's last word, and the original's that the reply's mirrors."""


def _torn(flows: list[dict[bytes, bytes]], last: bytes) -> bool:
    """Whether the line ends within its reply, which then would seem to be translated.

    ``last`` is the name of the line's last word.
    """
    original, reply = flows
    end, mirrored = next((pair for pair in _LAST if pair[0] in original), (b"", b""))
    whole, part = original.get(mirrored, b""), reply.get(end, b"")
    cut = last == end and part != whole and whole.startswith(part)
    return cut or bool(end and not part)


def gre_key(text: Optional[bytes]) -> Optional[bytes]:
    """GRE's key, printed in hexadecimal, as the port whose place it takes. Raises Bad."""
    if text is None:
        return None
    if not re.fullmatch(rb"(0x)?[0-9a-fA-F]{1,8}", text):
        raise Bad("a GRE key that is no number")
    return b"%d" % (int(text, 16) & 0xFFFF)
