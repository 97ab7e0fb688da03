"""Data planes beside netfilter: what sees packets before the rules that ctrace reads and makes.

eBPF programs at XDP, tc, tcx or netkit may carry packets past netfilter, or track them in
tables of their own; tc's ct action and Open vSwitch call conntrack themselves, before
any rule (net/sched/act_ct.c, net/openvswitch/conntrack.c): NOTRACK then comes too late.
What they do can't be read, so they are only found and named.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, Final

from ctrace.capture.sys import Cmd, bpf
from ctrace.errors import CtraceError

TIMEOUT: Final = 20.0
ATTACHED: Final = {46: "tcx", 47: "tcx", 54: "netkit", 55: "netkit"}
"""enum bpf_attach_type: TCX ingress and egress (6.6), netkit primary and peer (6.7)."""
QUERY_SIZE: Final = 64

Plane = tuple[str, str]
"""(device, what works there)."""


def planes(gaps: list[str]) -> list[Plane]:
    """What is found in the namespace that this thread is in; reads only.

    Appends a sentence to ``gaps`` for what could not be asked.
    """
    for tool in ("ip", "tc"):
        if not shutil.which(tool):
            gaps.append(f"{tool} is missing, so data planes beside netfilter cannot be seen: "
                        "install iproute2")  # fmt: skip
            return []

    def ask(*argv: str) -> list[dict[str, Any]]:
        return _json(argv, gaps)

    found: dict[Plane, None] = {}
    for link in ask("ip", "-d", "-j", "link", "show"):
        for what in _of_link(link):
            found[str(link.get("ifname", "?")), what] = None
    for plane in _filters(ask):
        found[plane] = None
    return list(found)


def _of_link(link: dict[str, Any]) -> Iterator[str]:
    if "xdp" in link:
        yield "an XDP program"
    if link.get("linkinfo", {}).get("info_kind") == "openvswitch":
        yield "Open vSwitch"
    for kind, name in ATTACHED.items():
        if _programs(int(link.get("ifindex", 0)), kind):
            yield f"an eBPF program ({name})"


def _programs(ifindex: int, kind: int) -> int:
    """How many programs hang there (BPF_PROG_QUERY); 0 on a kernel that has no such place."""
    attr = bytearray(QUERY_SIZE)
    struct.pack_into("<II", attr, 0, ifindex, kind)
    try:
        result, answer = bpf(Cmd.PROG_QUERY, attr)
    except CtraceError:  # a machine on which ctrace has no BPF
        return 0
    return int(struct.unpack_from("<I", answer, 24)[0]) if result >= 0 else 0


def _filters(ask: Callable[..., list[dict[str, Any]]]) -> Iterator[Plane]:
    for qdisc in ask("tc", "-j", "qdisc", "show"):
        if qdisc.get("kind") not in ("clsact", "ingress"):
            continue
        device = str(qdisc.get("dev", "?"))
        for side in ("ingress", "egress")[: 1 + (qdisc["kind"] == "clsact")]:
            for one in ask("tc", "-j", "filter", "show", "dev", device, side):
                options = one.get("options", {})
                if one.get("kind") == "bpf" and options:
                    yield device, "an eBPF program (tc)"
                kinds = {action.get("kind") for action in options.get("actions", ())}
                if "ct" in kinds:
                    yield device, "tc's ct action"
                if "bpf" in kinds:
                    yield device, "an eBPF program (tc)"


def _json(argv: tuple[str, ...], gaps: list[str]) -> list[dict[str, Any]]:
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=TIMEOUT, check=False, errors="replace"
        )
        if done.returncode != 0:
            raise ValueError
        found = json.loads(done.stdout or "[]")
        return [item for item in found if isinstance(item, dict)]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        gaps.append(f"{' '.join(argv)} gave no answer that can be read")
        return []
