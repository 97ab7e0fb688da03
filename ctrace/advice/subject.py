"""A service as the table's entries show it, in one namespace."""

from __future__ import annotations

from dataclasses import dataclass

Flow = tuple[str, bytes, int, bytes, int]
"""A flow in the table: (role, source, its port, destination, its port)."""


@dataclass(frozen=True)
class Subject:
    """What is known of a service apart from the rules."""

    proto: str
    port: int
    roles: tuple[str, ...]
    local: tuple[str, ...] = ()
    """Addresses of the namespace."""
    peers: tuple[str, ...] = ()
    """Far ends seen: clients of a server, servers of a client, servers behind a router."""
    only_peers: bool = False
    """Whether rules are wanted for these far ends alone."""
    nat: str = ""
    """``no``, or what was seen on its entries: ``src``, ``dst``; empty: nothing seen."""
    ephemeral: tuple[int, int] = (32768, 60999)
    picked: bool = True
    """Whether the kernel may pick ``port`` as a source port: neither reserved nor listened on."""
    status: int = 0
    """Status bits seen on any of its entries (enum ip_conntrack_status)."""
    shared_now: bool = False
    """Whether a translated connection of another host has the service's port now."""
    forwarding: bool = True
    """Whether the namespace routes (``net.ipv4.ip_forward`` or IPv6's); True if not known."""
    flows: tuple[Flow, ...] = ()
