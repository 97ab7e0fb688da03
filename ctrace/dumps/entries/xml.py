"""Elements of ``conntrack -o xml``; no XML parser, so nothing in them is ever followed.

libnetfilter_conntrack's src/conntrack/snprintf_xml.c prints one ``flow`` a line.
"""

from __future__ import annotations

import re
from typing import Final, Optional

from ctrace.dumps.entries.lines import Row, gre_key
from ctrace.dumps.entries.words import Bad

_META: Final = re.compile(
    rb'<meta direction="(original|reply|independent)">(.*?)</meta>', re.DOTALL
)
_VALUE: Final = re.compile(rb"<([\w-]+)(?: [^>]*)?>([^<>]{0,200})</\1>")
_LAYER3: Final = re.compile(rb'<layer3 protonum="(\d{1,3})"')
_LAYER4: Final = re.compile(rb'<layer4 protonum="(\d{1,3})"')
_TYPE: Final = re.compile(rb'<flow [^>]*type="(new|update|destroy)"')
_EMPTY: Final = re.compile(rb"<(assured|unreplied|offload|hw_offload)\s*/>")
_TIME: Final = re.compile(rb"<when>(.*?)</when>", re.DOTALL)


def next_flow(text: bytes) -> tuple[Optional[bytes], Optional[bytes]]:
    """The first whole ``flow`` and what follows it; (None, text) while none has ended,
    (None, None) where none has begun."""
    start = text.find(b"<flow")
    if start < 0:
        return None, None
    end = text.find(b"</flow>", start)
    if end < 0:
        return None, text[start:] + b"\n"
    return text[start : end + 7], text[end + 7 :]


def flows(text: bytes) -> tuple[list[bytes], Optional[bytes]]:
    """All whole ``flow`` elements, and what follows as :func:`next_flow` leaves it."""
    found: list[bytes] = []
    rest: Optional[bytes] = text
    while rest is not None:
        element, rest = next_flow(rest)
        if element is None:
            break
        found.append(element)
    return found, rest


def row(element: bytes) -> Row:
    """The element as a row of ctrace.dumps.entries.lines. Raises Bad."""
    metas: dict[bytes, bytes] = dict(_META.findall(element))
    original, reply = metas.get(b"original"), metas.get(b"reply")
    if original is None or reply is None:
        raise Bad("an element without both directions")
    layer3, layer4 = _LAYER3.search(original), _LAYER4.search(original)
    if layer3 is None or layer4 is None:
        raise Bad("an element without its protocols")
    family = {b"2": b"4", b"10": b"6"}.get(layer3[1])
    # A helper stands behind the last meta (__snprintf_conntrack_xml), all else within.
    own = metas.get(b"independent", b"") + element.rpartition(b"</meta>")[2]
    said = dict(_VALUE.findall(own))
    flags = set(_EMPTY.findall(own))
    rest = b"".join(
        b" [%s]" % flag.upper() for flag in (b"assured", b"offload", b"hw_offload") if flag in flags
    )
    words = (
        (b"mark", b"mark"),
        (b"zone", b"zone"),
        (b"delta-time", b"delta-time"),
        (b"deltatime", b"delta-time"),
        (b"helper", b"helper"),
        (b"id", b"id"),
    )
    for name, word in words:
        if name in said:
            rest += b" %s=%s" % (word, said[name].strip())
    zone = dict(_VALUE.findall(original)).get(b"zone")
    if zone and b"zone" not in said:
        rest += b" zone=" + zone.strip()
    tag = _TYPE.search(element[:200])
    # conntrack prints SCTP's and DCCP's states with TCP's names.
    state = said.get(b"state") if layer4[1] == b"6" else None
    return (
        None,
        tag and tag[1].upper(),
        family,
        layer4[1],
        said.get(b"timeout"),
        state,
        *_flow(original, layer4[1]),
        b"[UNREPLIED]" if b"unreplied" in flags else None,
        *_flow(reply, layer4[1]),
        rest,
    )


def _flow(body: bytes, proto: bytes) -> tuple[Optional[bytes], ...]:
    said = dict(_VALUE.findall(body))
    if b"src" not in said or b"dst" not in said:
        raise Bad("a direction without its addresses")
    ports = said.get(b"sport"), said.get(b"dport")
    if b"srckey" in said:
        ports = gre_key(said.get(b"srckey")), gre_key(said.get(b"dstkey"))
    return (
        said[b"src"],
        said[b"dst"],
        *ports,
        said.get(b"type"),
        said.get(b"code"),
        said.get(b"id") if proto in (b"1", b"58") else None,
    )
