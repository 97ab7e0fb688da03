"""Packets whose number is known, and a stretch of kernel time whose length is."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from ctrace.capture.hooks import kprobe
from ctrace.cost.result import Times
from ctrace.cost.timing import function_btf
from ctrace.host.netns import enter
from ctrace.kernel import bpf
from ctrace.lab import Lab, Node

PORT = 4611
REFRESH = "__nf_ct_refresh_acct"
"""Called within nf_conntrack_in, once for each packet of an established UDP flow."""


@contextmanager
def pair(track_server: bool = True) -> Iterator[tuple[Node, Node]]:
    """Two linked namespaces; a discard port is open in the second."""
    with Lab() as lab:
        a, b = lab.namespace("a", track=True), lab.namespace("b", track=track_server)
        lab.link(a, b)
        sink = b.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sink.bind(("", PORT))
        with sink:
            yield a, b


def send(a: Node, b: Node, packets: int) -> None:
    """``packets`` datagrams of one flow from a to b."""
    with a.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((b.addresses[a.name][0], PORT))
        for _ in range(packets):
            sender.send(b"x")


def open_flows(a: Node, b: Node, flows: int) -> None:
    """As many flows of one datagram each, at most 40,000; refused ones are given up."""
    target = b.addresses[a.name][0]
    for port in range(20_000, 20_000 + flows):
        with a.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind(("", port))
            sender.connect((target, PORT))
            try:
                sender.send(b"x")
            except PermissionError:
                continue


def totals(times: Times) -> tuple[int, int]:
    """Packets to PORT and nanoseconds in the hook, as exact sums."""
    for key, (packets, ns) in zip(times.services.tolist(), times.totals.tolist(), strict=True):
        if key == 17 << 16 | PORT:
            return packets, ns
    return 0, 0


_WORK = 16
"""Multiplications in each turn of the loop. The kernel's verifier follows every turn, and compares
it with those before: 20,000 turns of a single step take it a minute in an emulated machine."""


def _spinning(turns: int) -> bytes:
    """A program that counts down and lets the packet go."""
    code = struct.pack("<BBhi", 0xB7, 1, 0, turns)  # r1 = turns
    code += struct.pack("<BBhi", 0xB7, 2, 0, 3)  # r2 = 3
    code += struct.pack("<BBhi", 0x2F, 0x22, 0, 0) * _WORK  # r2 *= r2
    code += struct.pack("<BBhi", 0x17, 1, 0, 1)  # r1 -= 1
    code += struct.pack("<BBhi", 0x55, 1, -(_WORK + 2), 0)  # if r1 != 0: back
    return code + struct.pack("<BBhi", 0xB7, 0, 0, 1) + struct.pack("<BBhi", 0x95, 0, 0, 0)


class Ballast:
    """A program that takes microseconds within what the timers measure.

    The kernel's own statistics of BPF programs tell how long it ran: a clock that has
    nothing to do with the timers under test. At netfilter's hooks it bears the name of one of
    ctrace's own, else no rehearsal beside it would vouch for anything.
    """

    def __init__(self, family: str, node: Node, turns: int = 2_000) -> None:
        self._fds = [bpf.enable_stats()]
        code = _spinning(turns)
        if family == "netfilter":
            self._program = bpf.prog_load(
                code, bpf.ProgType.NETFILTER, "ctrace_probe", attach_type=bpf.AttachType.NETFILTER
            )
            with enter(node.path):
                # LOCAL_OUT, right before conntrack and after the timers' beginning
                self._fds.append(bpf.link_netfilter(self._program, 2, 3, -201))
        elif family == "kprobe":
            self._program = bpf.prog_load(code, bpf.ProgType.KPROBE, "ballast")
            self._fds.append(kprobe.open_probe(self._program, kprobe.Symbol(REFRESH), exit_=False))
        else:
            with function_btf(REFRESH) as (target, module):
                self._program = bpf.prog_load(
                    code.replace(*_RETURN_ONE), bpf.ProgType.TRACING, "ballast",
                    attach_type=bpf.AttachType.TRACE_FENTRY, attach_btf_id=target,
                    attach_btf_fd=module,
                )  # fmt: skip
            self._fds.append(bpf.raw_tracepoint_open(self._program))
        self._fds.append(self._program)

    def ran(self) -> tuple[int, int]:
        """How often it ran, and for how many nanoseconds in all."""
        info = bpf.prog_info(self._program)
        return info.run_count, info.run_time_ns

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


_RETURN_ONE = (struct.pack("<BBhi", 0xB7, 0, 0, 1), struct.pack("<BBhi", 0xB7, 0, 0, 0))
