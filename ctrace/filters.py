"""conntrack(8)'s filters: parsed once, compiled into the BPF program or a numpy mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Optional, Union

import numpy as np
import numpy.typing as npt

from ctrace.errors import UsageError, nearest
from ctrace.record import MAPPED_PREFIX, PROTO_NUMBERS, Events, Kind, Status, words

Network = Union[IPv4Network, IPv6Network]
STATUSES = (
    "ASSURED",
    "SEEN_REPLY",
    "UNREPLIED",
    "SRC_NAT",
    "DST_NAT",
    "OFFLOAD",
    "HELPER",
    "EXPECTED",
)
"""What ``-u`` takes."""
AT_BIRTH = ("SRC_NAT", "DST_NAT", "HELPER", "EXPECTED")
"""Those that an entry has when it is made: NAT and helpers are set up before."""


@dataclass(frozen=True)
class Filter:
    """Which flows to show. An unset field matches everything.

    ``src`` and ``dst`` are the original tuple's, as conntrack's ``-s`` and ``-d``.
    """

    proto: Optional[int] = None
    src: Optional[Network] = None
    dst: Optional[Network] = None
    sport: Optional[int] = None
    dport: Optional[int] = None
    status: int = 0
    """All these IPS_* bits must be set (``-u``)."""
    unreplied: bool = False
    """``-u UNREPLIED``: SEEN_REPLY must be clear."""
    src_nat: bool = False
    dst_nat: bool = False
    zone: Optional[int] = None
    family: Optional[int] = None
    """2 (AF_INET) or 10 (AF_INET6)."""
    netns: Optional[int] = None
    kinds: frozenset[Kind] = field(default_factory=frozenset)
    """Empty: every kind."""

    @property
    def is_empty(self) -> bool:
        """True when everything matches."""
        return self == Filter()

    def mask(self, events: Events) -> npt.NDArray[np.bool_]:
        """Which rows match: an array of booleans, one per event."""
        keep = np.ones(len(events), bool)
        for name in ("proto", "sport", "dport", "zone", "family", "netns"):
            wanted = getattr(self, name)
            if wanted is not None:
                keep &= events[name] == wanted
        bits = int(self.status)
        bits |= Status.SRC_NAT if self.src_nat else 0
        bits |= Status.DST_NAT if self.dst_nat else 0
        if bits:
            keep &= (events["status"] & bits) == bits
        if self.unreplied:
            keep &= (events["status"] & int(Status.SEEN_REPLY)) == 0
        if self.kinds:
            keep &= np.isin(events["kind"], [int(kind) for kind in self.kinds])
        for network, column in ((self.src, 2), (self.dst, 4)):
            if network is not None:
                value, bitmask = network_words(network)
                pair = words(events)[:, column : column + 2]
                keep &= ((pair & bitmask) == value).all(axis=1)
        return keep


def network_words(network: Network) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """A network as (value, mask), each two words in the record's byte order."""
    if isinstance(network, IPv4Network):
        value = MAPPED_PREFIX + network.network_address.packed
        mask = b"\xff" * 12 + network.netmask.packed
    else:
        value, mask = network.network_address.packed, network.netmask.packed
    return np.frombuffer(value, np.uint64), np.frombuffer(mask, np.uint64)


def parse_proto(text: str) -> int:
    """A protocol by name or number. Raises UsageError."""
    number = PROTO_NUMBERS.get(text.lower())
    if number is None and text.isascii() and text.isdigit() and int(text) < 256:
        number = int(text)
    if number is None:
        known, meant = ", ".join(sorted(PROTO_NUMBERS)), nearest(text, PROTO_NUMBERS)
        raise UsageError(f"unknown protocol {text!r}: give a number or one of {known}{meant}")
    return number


def parse_network(text: str) -> Network:
    """An address or prefix. Raises UsageError."""
    try:
        return ip_network(text, strict=False)
    except ValueError:
        raise UsageError(
            f"{text!r} is not an address or prefix: give one like 10.1.0.0/16 or fd00::/8"
        ) from None


def parse_status(text: str) -> tuple[int, bool]:
    """conntrack's ``-u`` list, as (bits that must be set, whether UNREPLIED was asked)."""
    bits, unreplied = 0, False
    for word in text.upper().split(","):
        if word == "UNREPLIED":
            unreplied = True
        elif word in Status.__members__:
            bits |= Status[word]
        else:
            known = f"{', '.join(STATUSES[:-1])} or {STATUSES[-1]}"
            raise UsageError(f"unknown status {word!r}: use {known}{nearest(word, STATUSES)}")
    return bits, unreplied
