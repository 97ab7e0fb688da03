"""Data planes besides netfilter: what sees packets before the rules that ctrace reads and writes.

eBPF programs at XDP, tc, tcx or netkit may carry packets past netfilter, or track them in
tables of their own; tc's ct action and Open vSwitch call conntrack themselves, before
any rule (net/sched/act_ct.c, net/openvswitch/conntrack.c): NOTRACK then comes too late.
What they do can't be read, so they are only found and named. So are rules that a network
card carries out by itself, and VRFs, whose packets pass the hooks twice (drivers/net/vrf.c).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

from ctrace.errors import CtraceError
from ctrace.host import commands
from ctrace.kernel.bpf import Cmd, bpf, prog_info
from ctrace.kernel.programs import TIMERS

ATTACHED: Final = {46: "tcx", 47: "tcx", 54: "netkit", 55: "netkit"}
"""enum bpf_attach_type: TCX ingress and egress (6.6), netkit primary and peer (6.7)."""
QUERY_SIZE: Final = 64
KINDS: Final = {"openvswitch": "Open vSwitch", "netkit": "netkit", "vrf": "a VRF"}
"""Names of link kinds; for a port, that of the thing it belongs to."""
EVERYWHERE: Final = "netfilter's hooks, of this namespace or another,"
"""Stands for a device: it applies to packets over lo, too."""
LINK_NETFILTER: Final = 10
"""BPF_LINK_TYPE_NETFILTER (6.4)."""
OWN_PROGRAMS: Final = ("nf_confirm", "ctrace_probe", *(name[:15] for name in TIMERS))
"""ctrace's own programs at netfilter's hooks, which let every packet pass; the kernel keeps 15
letters of a name."""

Plane = tuple[str, str]
"""(device, what runs there)."""


def planes(gaps: list[str]) -> list[Plane]:
    """What is found in the namespace that this thread is in; reads only.

    Appends a sentence to ``gaps`` for each thing that could not be read.
    """
    for tool in ("ip", "tc"):
        if not commands.have(tool):
            gaps.append(
                f"{tool} is missing, so data planes beside netfilter cannot be seen: "
                "install iproute2"
            )
            return []

    def ask(*argv: str) -> list[dict[str, Any]]:
        return _json(argv, gaps)

    found: dict[Plane, None] = {}
    for link in ask("ip", "-d", "-j", "link", "show"):
        for what in _of_link(link):
            found[str(link.get("ifname", "?")), what] = None
    for plane in _filters(ask):
        found[plane] = None
    if any(name not in OWN_PROGRAMS for name in _netfilter_programs()):
        found[EVERYWHERE, "an eBPF program"] = None
    return list(found)


def _of_link(link: dict[str, Any]) -> Iterator[str]:
    if "xdp" in link:
        yield "an XDP program"
    about = link.get("linkinfo", {})
    for kind in (about.get("info_kind"), about.get("info_slave_kind")):
        if kind in KINDS:
            yield KINDS[kind]
    for kind, name in ATTACHED.items():
        if _programs(int(link.get("ifindex", 0)), kind):
            yield f"an eBPF program ({name})"


def _programs(ifindex: int, kind: int) -> int:
    """How many programs are attached there (BPF_PROG_QUERY); 0 on a kernel without that place."""
    attr = bytearray(QUERY_SIZE)
    struct.pack_into("<II", attr, 0, ifindex, kind)
    try:
        result, answer = bpf(Cmd.PROG_QUERY, attr)
    except CtraceError:  # a machine on which ctrace has no BPF
        return 0
    return int(struct.unpack_from("<I", answer, 24)[0]) if result >= 0 else 0


def _netfilter_programs() -> Iterator[str]:
    """Names of the programs at netfilter's hooks; the kernel does not say which namespace each is
    in."""
    number = 0
    while True:
        try:
            result, answer = bpf(Cmd.LINK_GET_NEXT_ID, struct.pack("<I", number))
        except CtraceError:  # a machine on which ctrace has no BPF
            return
        if result < 0:
            return
        (number,) = struct.unpack_from("<I", answer, 4)
        with contextlib.suppress(CtraceError), _opened(Cmd.LINK_GET_FD_BY_ID, number) as link:
            info = ctypes.create_string_buffer(64)
            attr = struct.pack("<IIQ", link, len(info), ctypes.addressof(info))
            result, _ = bpf(Cmd.OBJ_GET_INFO_BY_FD, attr)
            kind, _, program = struct.unpack_from("<III", info)
            if result >= 0 and kind == LINK_NETFILTER:
                with _opened(Cmd.PROG_GET_FD_BY_ID, program) as fd:
                    yield prog_info(fd).name


@contextlib.contextmanager
def _opened(cmd: Cmd, number: int) -> Iterator[int]:
    """A descriptor of a BPF object. Raises CtraceError when it has gone meanwhile."""
    fd, _ = bpf(cmd, struct.pack("<I", number))
    if fd < 0:
        raise CtraceError("the BPF object is gone")
    try:
        yield fd
    finally:
        os.close(fd)


def _filters(ask: Callable[..., list[dict[str, Any]]]) -> Iterator[Plane]:
    for qdisc in ask("tc", "-j", "qdisc", "show"):
        if qdisc.get("kind") not in ("clsact", "ingress"):
            continue
        device = str(qdisc.get("dev", "?"))
        for side in ("ingress", "egress")[: 1 + (qdisc["kind"] == "clsact")]:
            block = qdisc.get(f"{side}_block")  # shared by devices, and listed by its number
            where = ("block", str(block)) if block else ("dev", device, side)
            for one in ask("tc", "-j", "filter", "show", *where):
                for what in _of_filter(one):
                    yield device, what


def _of_filter(one: dict[str, Any]) -> Iterator[str]:
    options = one.get("options", {})
    kinds = {action.get("kind") for action in options.get("actions", ())}
    if (one.get("kind") == "bpf" and options) or "bpf" in kinds:
        yield "an eBPF program (tc)"
    if "ct" in kinds:
        yield "tc's ct action"
    if options.get("in_hw"):
        yield "a tc rule in the card itself"


def _json(argv: tuple[str, ...], gaps: list[str]) -> list[dict[str, Any]]:
    try:
        status, text, _ = commands.output(argv)
        if status != 0:
            raise ValueError
        found = json.loads(text or "[]")
        return [item for item in found if isinstance(item, dict)]
    except (CtraceError, ValueError):
        gaps.append(f"{' '.join(argv)} gave no answer that can be read")
        return []
