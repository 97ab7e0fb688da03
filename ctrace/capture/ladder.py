"""Which hook families work on this host, found by trying each one.

A kernel may advertise a facility and still refuse it (a hardened build, lockdown, a missing
capability), so nothing is deduced from versions or configuration: the smallest program of each
family is loaded, attached and released.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ctrace.capture.hooks import fentry, kprobe
from ctrace.errors import CtraceError
from ctrace.host import rawlink
from ctrace.kernel import bpf, layout, programs

_RETURN_ACCEPT: Final = bytes.fromhex("b700000001000000 9500000000000000")


@dataclass(frozen=True)
class FamilyStatus:
    """One family of the ladder."""

    family: str
    holds: bool
    why: str
    """What it sees when it works; otherwise what rules it out."""


_HOLDS: Final = {
    "fentry": "trampolines at conntrack's functions; costs per connection",
    "kprobe": "probes at conntrack's functions; costs per connection",
    "netfilter": "links around conntrack's hooks, one set per namespace; costs per packet",
    "netlink": "ctnetlink events and kernel counters; no tuple of a refused packet, no owner",
}


def probe() -> list[FamilyStatus]:
    """Every family, the preferred one first. Leaves nothing changed."""
    return [_status(family, trial) for family, trial in _TRIALS.items()]


def _status(family: str, trial: Callable[[], None]) -> FamilyStatus:
    try:
        trial()
    except (CtraceError, OSError) as error:
        return FamilyStatus(family, False, str(error))
    return FamilyStatus(family, True, _HOLDS[family])


def _bpf_basics() -> None:
    """What all three BPF families need besides their hooks. Raises CtraceError."""
    if os.geteuid() != 0:
        raise CtraceError("BPF needs root: run it with sudo")
    layout.running()
    programs.check()
    try:
        os.close(bpf.map_create(bpf.MapType.RINGBUF, 0, 0, os.sysconf("SC_PAGE_SIZE")))
    except bpf.BpfError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise CtraceError(
                f"{error}: it takes CAP_BPF outside of any user namespace, and that no seccomp "
                "profile holds bpf(2) back"
            ) from error
        raise CtraceError(f"no BPF ring buffers (they need 5.8): {error}") from error


def _fentry() -> None:
    _bpf_basics()
    fentry.probe()


def _kprobe() -> None:
    _bpf_basics()
    kprobe.probe()


def _netfilter() -> None:
    _bpf_basics()
    if "BPF_NF_STATE" not in layout.running():
        raise CtraceError("this kernel has no BPF netfilter links (they need 6.4)")
    program = bpf.prog_load(
        _RETURN_ACCEPT, bpf.ProgType.NETFILTER, "ctrace_probe", attach_type=bpf.AttachType.NETFILTER
    )
    try:
        rawlink.aside(lambda: os.close(bpf.link_netfilter(program, 2, 1, 2**31 - 3)))
    finally:
        os.close(program)


def _netlink() -> None:
    from ctrace.capture.netlink.listener import NetlinkCapture

    NetlinkCapture().close()


_TRIALS: Final[dict[str, Callable[[], None]]] = {
    "fentry": _fentry,
    "kprobe": _kprobe,
    "netfilter": _netfilter,
    "netlink": _netlink,
}
