"""Settings that a what-if changes: parsed from the command line's words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np

from ctrace import units
from ctrace.errors import UsageError, nearest
from ctrace.filters import parse_proto
from ctrace.record import PROTO_NUMBERS, TCP_STATES, proto_name
from ctrace.whatif.flows import Bool, Flows

MAX_SECONDS: Final = 30 * 86400
STREAMS: Final = ("udp", "gre")
"""Protocols with two timeouts: that of streams is for ASSURED entries."""
OTHER: Final = ("udp", "udp_stream", "gre", "gre_stream", "icmp", "icmpv6", "generic")
TIMEOUTS: Final = (*(f"tcp_{state.lower()}" for state in TCP_STATES[1:9]), *OTHER)
"""Names as in nf_conntrack's sysctls, without ``nf_conntrack_`` and ``_timeout``."""
POLICY_UDP: Final = {"unreplied": "udp", "replied": "udp_stream"}


@dataclass(frozen=True)
class Timeout:
    """A changed timeout, for all flows or for one service's."""

    name: str
    seconds: int
    proto: Optional[int] = None
    port: Optional[int] = None

    def could_match(self, flows: Flows) -> Bool:
        """Flows that have this timeout in some state, whichever their last one is."""
        number = PROTO_NUMBERS.get(self.name.partition("_")[0])
        found = flows.proto == number
        if number is None:
            # The generic timeout does not apply to protocols with timeouts of their own.
            found = ~np.isin(flows.proto, [1, 6, 17, 33, 47, 58, 132, 136])
        if self.port is not None and self.proto is not None:
            found = found & flows.of_service(self.proto, self.port)
        return np.asarray(found, bool)

    def matches(self, flows: Flows) -> Bool:
        """Flows whose last state has this timeout."""
        found = self.could_match(flows)
        if self.name.startswith("tcp_"):
            found &= flows.state == TCP_STATES.index(self.name[4:].upper())
        elif self.name.partition("_")[0] in STREAMS:
            found &= flows.assured == self.name.endswith("_stream")
        return found

    def __str__(self) -> str:
        where = ""
        if self.proto is not None:
            where = f"{proto_name(self.proto)}/{self.port}:"
        return f"{where}{self.name}={self.seconds}"


@dataclass(frozen=True)
class Levers:
    """What to change."""

    notrack: tuple[tuple[int, int], ...] = ()
    """(protocol number, port)."""
    timeouts: tuple[Timeout, ...] = ()
    limit: Optional[int] = None
    """nf_conntrack_max; 0: none."""
    buckets: Optional[int] = None

    def __str__(self) -> str:
        words = [f"--notrack {proto_name(proto)}/{port}" for proto, port in self.notrack]
        words += [f"--timeout {timeout}" for timeout in self.timeouts]
        words += [f"--max {self.limit}"] if self.limit is not None else []
        words += [f"--buckets {self.buckets}"] if self.buckets is not None else []
        return " ".join(words) or "nothing changed"


def parse_levers(
    notrack: Sequence[str] = (),
    timeout: Sequence[str] = (),
    limit: Optional[int] = None,
    buckets: Optional[int] = None,
) -> Levers:
    """``tcp/8063``; ``tcp_time_wait=30``, ``tcp/8063:time_wait=5``. Raises UsageError."""
    return Levers(
        tuple(dict.fromkeys(parse_service(text) for text in notrack)),
        tuple(parse_timeout(text) for text in timeout),
        limit,
        buckets,
    )


def parse_service(text: str) -> tuple[int, int]:
    """``tcp/8063`` as (6, 8063). Raises UsageError."""
    name, slash, port = text.partition("/")
    if not slash or not (port.isascii() and port.isdecimal()) or not 0 < int(port[:6]) < 65536:
        raise UsageError(f"{text[:40]!r} is not a service: give one like tcp/8063")
    return parse_proto(name), int(port)


def parse_timeout(text: str) -> Timeout:
    """``NAME=TIME`` or ``PROTO/PORT:STATE=TIME``, in whole seconds. Raises UsageError."""
    head, equals, value = text.partition("=")
    given = 0.0 if value.strip(" s") == "0" else units.seconds(value)
    if not equals or given is None or given != int(given):
        raise UsageError(f"{text[:40]!r} is not a timeout: give one like tcp_time_wait=30s")
    seconds = int(given)
    if not 1 <= seconds <= MAX_SECONDS:
        raise UsageError(f"a timeout must be from 1 to {MAX_SECONDS} seconds, not {seconds}")
    service, colon, name = head.rpartition(":")
    proto = port = None
    if colon:
        proto, port = parse_service(service)
    name = re.sub(r"^(net\.netfilter\.)?nf_conntrack_", "", name.strip().lower())
    name = name.replace("_timeout", "")
    if proto == 17:
        name = POLICY_UDP.get(name, name)
    if proto == 6 and not name.startswith("tcp_"):
        name = f"tcp_{name}"
    if name not in TIMEOUTS:
        known = f"{', '.join(TIMEOUTS)}{nearest(name, TIMEOUTS)}"
        raise UsageError(f"unknown timeout {name[:40]!r}: use one of {known}")
    return Timeout(name, seconds, proto, port)
