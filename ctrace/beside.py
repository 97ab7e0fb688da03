"""What is read beside the events: what a namespace's rules and its table show together.

A source's batches carry it, so that a screen, a recording and a report tell the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Optional

MOST: Final = 16
"""Findings of one kind in a reading: the largest ones."""
EPHEMERAL: Final = (32768, 60999)
"""Ports that the kernel chooses from by default (inet_init_net in af_inet.c)."""


@dataclass(frozen=True)
class Refusing:
    """A rule that drops or refuses packets by what conntrack knows of them."""

    place: str
    """``inet filter input``: family, table and chain; ``iptables filter INPUT, rule 3``."""
    handle: int
    """0: it has none, as a rule of iptables."""
    kind: str
    """``limit`` (of connections at once) or ``invalid``."""
    limit: int = 0
    packets: Optional[int] = None
    """By the rule's own counter; None where it has none."""
    since: Optional[int] = None
    """How many of them since it was first read."""


@dataclass(frozen=True)
class Left:
    """Entries that are translated to where no rule leads any more."""

    proto: str
    dst: str
    port: int
    """Of the original destination."""
    backend: str
    entries: int


@dataclass(frozen=True)
class PortsTaken:
    """The source ports of a translated address towards one destination."""

    proto: str
    source: str
    dst: str
    port: int
    used: int
    of: int
    was: Optional[int] = None
    """Used at the reading before;"""
    seconds: float = 0.0
    """so long ago."""


@dataclass(frozen=True)
class Stray:
    """INVALID packets of one kind in a sample of packets that came or went."""

    src: str
    proto: str
    port: int
    """Of the service, as far as the packet shows; 0: none."""
    why: str
    """One of :data:`WHY`."""
    packets: int


WHY: Final = (
    "syn-ack",
    "fin",
    "rst",
    "ack",
    "reply",
    "error",
    "checksum",
    "window",
    "one-way",
    "half-notrack",
)
"""A SYN-ACK, FIN, RST or ACK without an entry; an ICMP reply nobody asked for; an ICMP error about
no known flow; a wrong checksum; a sequence number far from the other side's window; a connection of
which the table saw one direction only, because rules untrack the other (``half-notrack``) or for a
reason that is not known."""


@dataclass(frozen=True)
class Short:
    """A limit beside the table: how much of it is in use, or how often it refused."""

    kind: str
    """One of :data:`LIMITS`."""
    name: str = ""
    """The device."""
    used: int = 0
    of: int = 0
    """0: not known."""
    since: int = 0
    """Refused since it was first read."""


LIMITS: Final = ("cloud", "expectations")
"""What a network card says of its provider's limit on connections; the table of connections
that helpers expect (``nf_conntrack_expect_max``)."""


@dataclass(frozen=True)
class Beside:
    """One reading of one namespace."""

    netns: int
    refusing: tuple[Refusing, ...] = ()
    left: tuple[Left, ...] = ()
    ports: tuple[PortsTaken, ...] = ()
    strays: tuple[Stray, ...] = ()
    short: tuple[Short, ...] = ()
    echo: bool = False
    """Whether pings fare the same without entries, by the rules and a rehearsal."""
    part: float = 1.0
    """Which part of the table was read for ``left`` and ``ports``: of large ones an even sample."""
    ephemeral: tuple[int, int] = EPHEMERAL
    """Ports that the kernel chooses from there, first and last."""

    def __bool__(self) -> bool:
        """Whether anything was found."""
        found = (self.refusing, self.left, self.ports, self.strays, self.short)
        return any(found) or self.echo or self.ephemeral != EPHEMERAL
