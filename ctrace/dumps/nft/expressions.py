"""Expressions and verdicts of rules, from words to what ``nft -j`` has for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Optional

from ctrace.dumps.nft.words import Tokens, value

Json = dict[str, Any]
PAYLOADS: Final = frozenset(
    ("tcp", "udp", "udplite", "sctp", "dccp", "th", "ip", "ip6", "icmp", "icmpv6", "ether", "arp",
     "vlan", "ah", "esp", "comp", "igmp")
)  # fmt: skip
METAS: Final = frozenset(
    ("iif", "oif", "iifname", "oifname", "iiftype", "oiftype", "skuid", "skgid", "mark", "pkttype",
     "iifgroup", "oifgroup", "cgroup", "nfproto", "l4proto", "protocol", "priority", "length")
)  # fmt: skip
MASKS: Final = (("ct", "state"), ("ct", "status"), ("ct", "label"), ("tcp", "flags"))
"""Fields whose plain comparison is *any of these bits*."""
OPS: Final = ("==", "!=", "<", ">", "<=", ">=")
BITWISE: Final = {
    "&": "&",
    "|": "|",
    "^": "^",
    "<<": "<<",
    ">>": ">>",
    "and": "&",
    "or": "|",
    "xor": "^",
}


class Unknown(ValueError):
    """A word that is not known here."""


def elements(tokens: Tokens) -> list[Any]:
    """``{ 22 : accept, 10.0.0.1 . 80 timeout 1m expires 30s }``, the brace included."""
    tokens.skip("{")
    out: list[Any] = []
    while not tokens.done and tokens.peek() != "}":
        one = _operand(tokens)
        while tokens.peek() not in (",", "}", ":", ""):
            tokens.take()  # its timeout, counter or comment
        if tokens.skip(":"):
            out.append([one, verdict(tokens) or _operand(tokens)])
            while tokens.peek() not in (",", "}", ""):
                tokens.take()
        else:
            out.append(one)
        tokens.skip(",")
    tokens.skip("}")
    return out


def verdict(tokens: Tokens) -> Optional[Json]:
    """``accept``, ``jump web``; None where the next word is none."""
    word = str(tokens.peek())
    if word in ("accept", "drop", "continue", "return"):
        tokens.take()
        return {word: None}
    if word in ("jump", "goto"):
        tokens.take()
        return {word: {"target": str(tokens.take())}}
    return None


def match(tokens: Tokens) -> Json:
    """``tcp dport { 22, 80 }``, ``ip saddr . tcp dport @set``, ``ct state vmap { ... }``."""
    left = joined(tokens)
    if tokens.skip("vmap"):
        data = tokens.take() if str(tokens.peek()).startswith("@") else {"set": elements(tokens)}
        return {"vmap": {"key": left, "data": data}}
    if tokens.skip("set"):
        return {"mangle": {"key": left, "value": _bits(tokens)}}
    while tokens.peek() in BITWISE:
        bitwise = BITWISE[str(tokens.take())]
        left = {bitwise: [left, _mask(tokens)]}
    op = str(tokens.take()) if tokens.peek() in OPS else ""
    right = _right(tokens)
    if tokens.skip("/"):  # tcp flags syn / fin,syn,rst,ack
        left, op = {"&": [left, _list(tokens)]}, op or "=="
    plain = not isinstance(right, dict) and not str(right).startswith("@")
    op = op or ("in" if plain and _is_mask(left) else "==")
    return {"match": {"op": op, "left": left, "right": right}}


def _is_mask(left: Json) -> bool:
    """Whether a field is one whose plain comparison is *any of these bits*."""
    field = left.get("payload") or left.get("ct") or {}
    kind = field.get("protocol", "ct")
    return (kind, field.get("field", field.get("key"))) in MASKS


def joined(tokens: Tokens) -> Json:
    """Fields joined by dots: ``ip saddr . tcp dport``."""
    parts = [_left(tokens)]
    while tokens.skip("."):
        parts.append(_left(tokens))
    return parts[0] if len(parts) == 1 else {"concat": parts}


def _left(tokens: Tokens) -> Json:
    word = str(tokens.take())
    if word == "tcp" and tokens.peek() == "option":
        tokens.take()
        return {"tcp option": {"name": str(tokens.take()), "field": str(tokens.take())}}
    if word in PAYLOADS:
        return {"payload": {"protocol": word, "field": str(tokens.take())}}
    if word == "meta" or word in METAS:
        return {"meta": {"key": str(tokens.take()) if word == "meta" else word}}
    if word == "ct":
        return {"ct": _ct(tokens)}
    if word == "fib":
        flags = [str(tokens.take())]
        while tokens.skip("."):
            flags.append(str(tokens.take()))
        return {"fib": {"result": str(tokens.take()), "flags": flags}}
    raise Unknown(word)


def _ct(tokens: Tokens) -> Json:
    key = str(tokens.take())
    if key not in ("original", "reply"):
        return {"key": key}
    family = f"{tokens.take()} " if tokens.peek() in ("ip", "ip6") else ""
    return {"key": f"{family}{tokens.take()}", "dir": key}


def _right(tokens: Tokens) -> Any:
    if tokens.peek() == "{":
        return {"set": elements(tokens)}
    if str(tokens.peek()).startswith("@"):
        return str(tokens.take())
    one = _operand(tokens)
    if tokens.peek() == "|":
        parts = [one]
        while tokens.skip("|"):
            parts.append(_operand(tokens))
        return {"|": parts}
    return one if tokens.peek() != "," else [one, *_more(tokens)]


def _more(tokens: Tokens) -> Iterator[Any]:
    while tokens.skip(","):
        yield value(tokens.take())


def _list(tokens: Tokens) -> Any:
    found = [value(tokens.take()), *_more(tokens)]
    return found if len(found) > 1 else found[0]


def _operand(tokens: Tokens) -> Any:
    """A value, or several joined by dots."""
    parts = [value(tokens.take())]
    while tokens.skip("."):
        parts.append(value(tokens.take()))
    return parts[0] if len(parts) == 1 else {"concat": parts}


def _mask(tokens: Tokens) -> Any:
    """A mask: ``0xff``, ``syn,ack`` or ``(syn | ack)``."""
    if not tokens.skip("("):
        return _list(tokens)
    parts = [value(tokens.take())]
    while tokens.skip("|"):
        parts.append(value(tokens.take()))
    tokens.skip(")")
    return {"|": parts} if len(parts) > 1 else parts[0]


def _bits(tokens: Tokens) -> Any:
    """What something is set to: ``0x7``, ``ct mark``, ``meta mark & 0xff | 0x10``."""

    def term() -> Any:
        known = tokens.peek() in PAYLOADS or tokens.peek() in ("meta", "ct")
        return _left(tokens) if known else value(tokens.take())

    found = term()
    while tokens.peek() in BITWISE:
        found = {BITWISE[str(tokens.take())]: [found, term()]}
    if tokens.skip("map"):
        data = tokens.take() if str(tokens.peek()).startswith("@") else {"set": elements(tokens)}
        found = {"map": {"key": found, "data": data}}
    return found
