"""What the header of a recording says about the host, read once when recording begins."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import socket
from collections.abc import Iterator, Sequence

from ctrace.batch import Source
from ctrace.recording.format.meta import Header

SYSCTLS = (
    "net/netfilter/nf_conntrack_*",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_forward",
    "net/ipv6/conf/all/forwarding",
    "net/ipv4/tcp_tw_reuse",
    "net/ipv4/tcp_fin_timeout",
)
RULESETS = 64
"""Namespaces whose rules are recorded, at most: each costs a call of nft."""


def header(source: Source, shown_filter: str = "") -> Header:
    """The header for a recording of ``source`` on this host."""
    return Header(
        source.hooks,
        source.clock,
        source.started,
        host=socket.gethostname(),
        kernel=platform.release(),
        filter=shown_filter,
        facts=host_facts(),
    )


def host_facts() -> dict[str, str]:
    """Sysctls that matter to conntrack, by name, and the machine's size."""
    facts = {
        "machine": platform.machine(),
        "cpus": str(os.cpu_count() or 0),
        "memory": str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "boot_id": _first_line("/proc/sys/kernel/random/boot_id"),
    }
    for pattern in SYSCTLS:
        for path in sorted(glob.glob(f"/proc/sys/{pattern}")):
            name = path.removeprefix("/proc/sys/").replace("/", ".")
            facts[name] = _first_line(path)
    return {name: value for name, value in facts.items() if value}


def rulesets(spaces: Sequence[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """(namespace, rules and facts as text) for each (inode, path); what can't be read is left out.

    The text is what ``ctrace advise FILE`` reads back.
    """
    from ctrace.advice.facts import to_text
    from ctrace.errors import CtraceError

    for inum, path in spaces[:RULESETS]:
        with contextlib.suppress(CtraceError, OSError):
            yield inum, to_text(path)


def _first_line(path: str) -> str:
    try:
        with open(path) as file:
            return file.readline().strip().replace("\t", " ")
    except OSError:
        return ""
