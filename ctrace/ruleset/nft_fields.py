"""Fields and values of ``nft -j`` in the words of the model."""

from __future__ import annotations

from typing import Any, Final, Optional

from ctrace.record import PROTO_NUMBERS
from ctrace.ruleset.model import CT_OTHER, Bits, Match, Value, address_span

_FLAG_BITS: Final = {
    "fin": 1,
    "syn": 2,
    "rst": 4,
    "psh": 8,
    "ack": 16,
    "urg": 32,
    "ecn": 64,
    "cwr": 128,
}
_ICMP: Final = {"echo-reply": 0, "destination-unreachable": 3, "source-quench": 4, "redirect": 5,
                "echo-request": 8, "router-advertisement": 9, "router-solicitation": 10,
                "time-exceeded": 11, "parameter-problem": 12, "timestamp-request": 13,
                "timestamp-reply": 14, "info-request": 15, "info-reply": 16,
                "address-mask-request": 17, "address-mask-reply": 18}  # fmt: skip
_ICMP6: Final = {"destination-unreachable": 1, "packet-too-big": 2, "time-exceeded": 3,
                 "parameter-problem": 4, "echo-request": 128, "echo-reply": 129,
                 "mld-listener-query": 130, "mld-listener-report": 131, "mld-listener-done": 132,
                 "mld-listener-reduction": 132, "nd-router-solicit": 133, "nd-router-advert": 134,
                 "nd-neighbor-solicit": 135, "nd-neighbor-advert": 136, "nd-redirect": 137,
                 "router-renumbering": 138, "ind-neighbor-solicit": 141,
                 "ind-neighbor-advert": 142, "mld2-listener-report": 143}  # fmt: skip
_WORDS: Final = {"icmp": _ICMP, "icmp6": _ICMP6, "proto": PROTO_NUMBERS | {"ipv6-icmp": 58}}
_STATE: Final = ("new", "established", "related", "invalid", "untracked")


class Unclear(Exception):
    """An expression that the model cannot represent."""


def field_of(left: Any) -> tuple[str, list[Match], Optional[int]]:  # noqa: PLR0912
    """The model's key for a left-hand side, what it implies, and a bit mask."""
    mask: Optional[int] = None
    if "&" in left:
        left, bits = left["&"]
        mask = bits if isinstance(bits, int) else _flag_bits(bits)
    implied: list[Match] = []
    key = ""
    if "payload" in left:
        body = left["payload"]
        proto, field = body.get("protocol", ""), body.get("field", "")
        if proto in ("tcp", "udp", "udplite", "sctp", "dccp", "icmp", "icmpv6"):
            number = PROTO_NUMBERS[proto]
            implied = [Match("proto", ((number, number),), text=f"meta l4proto {proto}")]
            if proto in ("icmp", "icmpv6"):
                key = {"icmp": "icmp", "icmpv6": "icmp6"}[proto] if field == "type" else ""
            elif field in ("sport", "dport"):
                key = field
            elif (proto, field) == ("tcp", "flags"):
                key = "flags"
        elif proto == "th" and field in ("sport", "dport"):
            key = field
        elif proto in ("ip", "ip6"):
            implied = [Match("family", (proto,), text=f"meta nfproto {proto}")]
            key = {"saddr": "saddr", "daddr": "daddr", "protocol": "proto", "nexthdr": "proto"}.get(
                field, ""
            )
        elif body.get("base") == "th" and body.get("len") == 16:
            key = {0: "sport", 16: "dport"}.get(body.get("offset"), "")
    elif "meta" in left:
        key = {
            "l4proto": "proto",
            "nfproto": "family",
            "protocol": "family",
            "iifname": "iif",
            "oifname": "oif",
            "iif": "iif",
            "oif": "oif",
            "mark": "mark",
            "pkttype": "pkttype",
        }.get(left["meta"]["key"], "")
    elif "ct" in left:
        key = {"state": "ct.state", "direction": "ct.dir", "status": "ct.status"}.get(
            left["ct"]["key"], CT_OTHER
        )
    elif "fib" in left:
        body = left["fib"]
        if body.get("result") == "type":
            flags = body.get("flags")
            flags = [flags] if isinstance(flags, str) else flags
            key = {("daddr",): "daddr.type", ("saddr",): "saddr.type"}.get(tuple(flags), "")
    return key, implied, mask


def value_of(key: str, element: Any) -> Value:  # noqa: PLR0911
    """One value of a match. Raises Unclear, KeyError or ValueError."""
    if key in ("saddr", "daddr"):
        if isinstance(element, dict) and "prefix" in element:
            return address_span("{addr}/{len}".format(**element["prefix"]))
        if isinstance(element, dict) and "range" in element:
            return address_span("-".join(element["range"]))
        return address_span(element)
    if key in ("sport", "dport", "proto", "icmp", "icmp6"):
        if isinstance(element, dict) and "range" in element:
            low, high = (_number(key, end) for end in element["range"])
            return low, high
        number = _number(key, element)
        return number, number
    if not isinstance(element, str):
        raise Unclear
    if key == "family":
        return {"ipv4": "ip", "ipv6": "ip6", "ip": "ip", "ip6": "ip6"}.get(element, element)
    if key == "ct.state" and element not in _STATE:
        raise Unclear
    return element


def _number(key: str, element: Any) -> int:
    if isinstance(element, int):
        return element
    return _WORDS[key][element]


def compared(op: str, values: tuple[Value, ...], key: str) -> tuple[Value, ...]:
    """``> 1023`` as a range. Raises Unclear where the field has no order."""
    (value,) = values
    if key not in ("sport", "dport", "proto", "icmp", "icmp6") or not isinstance(value[0], int):
        raise Unclear
    number = value[0]
    return {
        "<": ((0, number - 1),),
        "<=": ((0, number),),
        ">": ((number + 1, 65535),),
        ">=": ((number, 65535),),
    }[op]


def flags_of(mask: Optional[int], right: Any, op: str) -> tuple[Bits, ...]:
    """TCP flags as (mask, value), one of which must match. Raises Unclear."""
    if isinstance(right, dict) and "|" in right:
        value = _flag_bits(right["|"])
    elif isinstance(right, dict):
        raise Unclear
    else:
        value = _flag_bits(right if isinstance(right, list) else [right])
    if op == "in":  # any of these: one (mask, value) a flag
        return tuple((bit, bit) for bit in _FLAG_BITS.values() if value & bit)
    return ((0xFF if mask is None else mask, value),)


def _flag_bits(names: Any) -> int:
    if isinstance(names, dict) and "|" in names:
        names = names["|"]
    names = [names] if isinstance(names, (str, int)) else names
    total = 0
    for name in names:
        if isinstance(name, dict):
            total |= _flag_bits(name)
        else:
            total |= name if isinstance(name, int) else _FLAG_BITS[name]
    return total
