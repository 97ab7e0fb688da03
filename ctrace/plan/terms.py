"""Conditions that an accept takes over from the rule that it stands for, as checked fields."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

MAX_VALUES: Final = 256
MAX_TERMS: Final = 16

_KEY: Final = r"(ip6? [sd]addr|(tcp|udp|th) [sd]port|meta (l4proto|mark)|[io]ifname|ether saddr)"
_SIDE: Final = "(src|dst)"
_PATTERNS: Final = {
    "saddr": re.compile(r"[0-9a-f.:]{2,45}(/\d{1,3})?\Z"),
    "daddr": re.compile(r"[0-9a-f.:]{2,45}(/\d{1,3})?\Z"),
    "iif": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,14}\*?\Z"),
    "oif": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,14}\*?\Z"),
    "set": re.compile(
        rf"({_KEY}( \. {_KEY}){{0,4}}|{_SIDE}(,{_SIDE}){{0,2}}) @[A-Za-z_][\w.-]{{0,30}}\Z",
        re.ASCII,
    ),
    "uid": re.compile(r"\d{1,10}(-\d{1,10})?\Z"),
    "gid": re.compile(r"\d{1,10}(-\d{1,10})?\Z"),
    "mark": re.compile(r"0x[0-9a-f]{1,8}/0x[0-9a-f]{1,8}\Z"),
    "sport": re.compile(r"\d{1,5}-\d{1,5}\Z"),
    "dport": re.compile(r"\d{1,5}-\d{1,5}\Z"),
    "type": re.compile(r"(saddr|daddr) local\Z"),
    "family": re.compile(r"(ip|ip6)\Z"),
    "later": re.compile(r"tcp\Z"),
}
FIELDS: Final = tuple(_PATTERNS)
_MOST: Final = {
    **dict.fromkeys(("sport", "dport"), (65535, "has an invalid range of ports")),
    **dict.fromkeys(("uid", "gid"), (0xFFFFFFFF, "has an impossible user")),
}
"""The largest number of a field, and what is wrong beyond."""


@dataclass(frozen=True)
class Term:
    """One condition: ``field`` is one of ``values`` (or none of them)."""

    field: str
    """``saddr``, ``daddr`` (prefixes); ``iif``, ``oif`` (names, ``*`` at the end for any rest);
    ``set`` (``ip saddr . tcp dport @NAME``; ``src,dst @NAME`` of ipset); ``uid``, ``gid`` (``N`` or
    ``LOW-HIGH``); ``mark`` (``0xVALUE/0xMASK``); ``sport``, ``dport`` (``LOW-HIGH``); ``type``
    (``daddr local``); ``family``; ``later`` (``tcp``: no packet that opens a connection)."""
    values: tuple[str, ...]
    negate: bool = False

    def problem(self) -> str:  # noqa: PLR0911
        """What is wrong with it, for a plan's reader; empty when it is good."""
        pattern = _PATTERNS.get(self.field)
        if pattern is None:
            return "is of an unknown field"
        if not 1 <= len(self.values) <= MAX_VALUES:
            return f"must have from 1 to {MAX_VALUES} values"
        several = ("saddr", "daddr", "iif", "oif", "uid", "gid")
        if self.field not in several and len(self.values) != 1:
            return "can have one value only"
        for value in self.values:
            if not pattern.match(value):
                return "has a value that is not acceptable"
            if self.field in ("saddr", "daddr"):
                try:
                    ip_network(value)
                except ValueError:
                    return "has a value that is not an address or prefix"
            most, problem = _MOST.get(self.field, (0, ""))
            low, _, high = value.partition("-") if most else ("0", "", "0")
            if not int(low) <= int(high or low) <= most:
                return problem
            if value.endswith("*") and len(self.values) > 1:
                return "can have a wildcard by itself only"
        if self.negate and len(self.values) > 1:
            return "can exclude one value only"
        return ""
