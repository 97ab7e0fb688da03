"""What the header of a recording says about the host, read once when recording begins."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from typing import Optional

from ctrace.batch import Source
from ctrace.errors import CtraceError
from ctrace.host.netns import Way, enter
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


def header(source: Source, shown_filter: str = "", netns: Optional[int] = None) -> Header:
    """The header for a recording of ``source`` on this host; ``netns``: the only namespace in
    it."""
    return Header(
        source.hooks,
        source.clock,
        source.started,
        host=socket.gethostname(),
        kernel=platform.release(),
        filter=shown_filter,
        facts=host_facts(netns),
    )


def host_facts(netns: Optional[int] = None) -> dict[str, str]:
    """Sysctls that matter to conntrack, by name, and the machine's size. Each namespace has its
    own: they are those of ``netns``, or of the one that this runs in."""
    facts = {
        "machine": platform.machine(),
        "cpus": str(os.cpu_count() or 0),
        "memory": str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "boot_id": _first_line("/proc/sys/kernel/random/boot_id"),
    }
    with contextlib.suppress(CtraceError):
        facts.update(_settings(netns))
    return {name: value for name, value in facts.items() if value}


def _settings(netns: Optional[int]) -> dict[str, str]:
    """None where the namespace has gone. Raises CtraceError."""
    with contextlib.ExitStack() as there:
        if netns is not None:
            space = there.enter_context(Way(netns).held())
            if space is None:
                return {}
            there.enter_context(enter(space.path))
        paths = [path for some in SYSCTLS for path in sorted(glob.glob(f"/proc/sys/{some}"))]
        return {
            path.removeprefix("/proc/sys/").replace("/", "."): _first_line(path) for path in paths
        }


def rulesets(spaces: Sequence[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """(namespace, rules and facts as text) for each (inode, path); what can't be read is left out.

    The text is what ``ctrace advise FILE`` reads back.
    """
    from ctrace.advice.facts import to_text

    for inum, path in spaces[:RULESETS]:
        with contextlib.suppress(CtraceError, OSError):
            yield inum, to_text(path)


def _first_line(path: str) -> str:
    try:
        with open(path) as file:
            return file.readline().strip().replace("\t", " ")
    except OSError:
        return ""
