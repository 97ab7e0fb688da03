"""What else takes part in forwarding: flowtables, IPVS, tc's ct action; verdict and reality.

They are modules of stock kernels, loaded here, so this runs in an emulated machine only,
and in one of them: the advice asks the tools, not the kernel's version.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from kit.rulesets.net import verdict_on
from kit.traffic import tcp_server, udp_server

from ctrace.advice.hazards import Judgement
from ctrace.advice.subject import Subject
from ctrace.host.ctnetlink import dump
from ctrace.host.netns import local_addresses
from ctrace.lab import Lab, Node
from ctrace.plan.plan import alone
from ctrace.record import Events, Status
from ctrace.ruleset import notrack_nft

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.environ.get("CTRACE_VM") != "6.12", reason="in scripts/vm 6.12 only"),
]
PORT = 8063
IP_VS_SO_SET_ADD, IP_VS_SO_SET_ADDDEST = 1154, 1159


@dataclass
class Three:
    """A client and a server, and the host under test between them."""

    c: Node
    h: Node
    s: Node

    def ask(self, address: str) -> list[bytes]:
        """One connection over which three lines are exchanged; what came back."""
        got = []
        with self.c.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(5)
            with contextlib.suppress(OSError):
                client.connect((address, PORT))
                for line in (b"one", b"two", b"six"):
                    client.sendall(line)
                    got.append(client.recv(64))
        return got

    def entries(self) -> Events:
        """The service's entries in the host's table."""
        found = dump(self.h.path)
        mine: Events = found[(found["dport"] == PORT) | (found["sport"] == PORT)]
        return mine

    def judged(self, role: str) -> Judgement:
        """The verdict from the entries and rules that are there now."""
        found = self.entries()
        status = 0
        for entry in found:
            status |= int(entry["status"])
        about = Subject(
            "tcp", PORT, (role,), local_addresses(self.h.path),
            peers=(self.s.addresses["h"] if role == "forward" else self.c.addresses["h"])[:1],
            nat="src,dst" if status & (Status.SRC_NAT | Status.DST_NAT) else "no",
            status=status,
        )  # fmt: skip
        return verdict_on(about, self.h.path)

    def put(self, judgement: Judgement) -> None:
        """NOTRACK as the lever has it, whatever the verdict; the old entries go."""
        plan = alone(judgement.lever)
        self.h.run(["nft", "-f", "-"], stdin=notrack_nft.script(plan, None))
        self.h.run(["conntrack", "-F"], check=False)


def echo(connection: socket.socket) -> None:
    while data := connection.recv(64):
        connection.sendall(data)


@pytest.fixture
def three() -> Iterator[Three]:
    with Lab() as lab:
        c, h, s = (lab.namespace(name) for name in "chs")
        lab.link(c, h)
        lab.link(h, s)
        h.sysctl("net.ipv4.ip_forward", 1)
        c.run(["ip", "route", "add", "default", "via", h.addresses["c"][0]])
        with tcp_server(s, PORT, handle=echo):
            yield Three(c, h, s)


def modules(*names: str) -> None:
    subprocess.run(["modprobe", "-a", *names], check=True)


def test_a_flowtable_is_left_aside(three: Three) -> None:
    """Untracked packets take the slow way: it works, and what is lost is told."""
    modules("nf_flow_table", "nf_flow_table_inet", "nft_flow_offload")
    three.s.run(["ip", "route", "add", "default", "via", three.h.addresses["s"][0]])
    three.h.run(
        ["nft", "-f", "-"],
        stdin="table inet f {\n"
        ' flowtable ft { hook ingress priority 0; devices = { "to-c", "to-s" }; }\n'
        " chain middle { type filter hook forward priority 0;\n"
        f"  tcp dport {PORT} ct state established flow add @ft\n }}\n}}\n",
    )
    there = three.s.addresses["h"][0]
    assert three.ask(there) == [b"one", b"two", b"six"]
    judgement = three.judged("forward")
    assert judgement.verdict == "safe"
    assert any("flowtable" in reason for reason in judgement.reasons)
    three.put(judgement)
    assert three.ask(there) == [b"one", b"two", b"six"]
    assert not len(three.entries())


def test_ipvs_behind_masquerading_needs_tracking(three: Three) -> None:
    """kube-proxy's form: IPVS sends a connection on, and conntrack masquerades it."""
    modules("ip_vs", "ip_vs_rr", "nft_masq")
    front, back = three.h.addresses["c"][0], three.s.addresses["h"][0]
    with three.h.enter(), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        # struct ip_vs_service_user and ip_vs_dest_user; connection flags 0: masquerading
        service = struct.pack(
            "=H2x4s2s2xI16sII4s", 6, socket.inet_aton(front), struct.pack("!H", PORT), 0, b"rr",
            0, 0, b"\xff\xff\xff\xff",
        )  # fmt: skip
        server = struct.pack("=4s2s2xIiII", socket.inet_aton(back), struct.pack("!H", PORT),
                             0, 1, 0, 0)  # fmt: skip
        raw.setsockopt(socket.IPPROTO_IP, IP_VS_SO_SET_ADD, service)
        raw.setsockopt(socket.IPPROTO_IP, IP_VS_SO_SET_ADDDEST, service + server)
    three.h.sysctl("net.ipv4.vs.conntrack", 1)
    three.h.run(
        ["nft", "-f", "-"],
        stdin="table ip n { chain post { type nat hook postrouting priority 100;\n"
        ' oifname "to-s" masquerade\n }\n}\n',
    )
    assert three.ask(front) == [b"one", b"two", b"six"]
    judgement = three.judged("server")
    assert judgement.verdict == "unsafe"
    assert any("IPVS" in reason for reason in judgement.reasons)
    three.put(judgement)
    # The server has no way to the client's own address.
    assert three.ask(front) == []


def test_tcs_ct_action_comes_before_notrack(three: Three) -> None:
    """What tc has tracked already stays tracked: NOTRACK is a silent no-op."""
    modules("act_ct", "cls_matchall", "sch_ingress")
    three.s.run(["ip", "route", "add", "default", "via", three.h.addresses["s"][0]])
    three.h.track()
    there = three.s.addresses["h"][0]
    assert three.ask(there) == [b"one", b"two", b"six"]
    assert three.judged("forward").verdict == "safe"
    for device in ("to-c", "to-s"):
        three.h.run(["tc", "qdisc", "add", "dev", device, "clsact"])
        three.h.run(["tc", "filter", "add", "dev", device, "ingress", "protocol", "ip", "matchall",
                     "action", "ct", "commit", "pipe"])  # fmt: skip
    assert three.ask(there) == [b"one", b"two", b"six"]
    judgement = three.judged("forward")
    assert judgement.verdict == "cannot-say"
    assert "tc's ct action at to-c" in " ".join(judgement.reasons)
    three.put(judgement)
    assert three.ask(there) == [b"one", b"two", b"six"]
    assert len(three.entries())


def test_legacy_rules_before_defragmentation(three: Three) -> None:
    """raw_before_defrag: the first fragment is untracked, and the others never join it."""
    subprocess.run(["modprobe", "-r", "iptable_raw"], check=False)
    subprocess.run(["modprobe", "iptable_raw", "raw_before_defrag=1"], check=True)
    three.h.track()
    here = three.h.addresses["c"][0]

    def answers(size: int) -> int:
        with three.c.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(3)
            client.sendto(b"x" * size, (here, PORT))
            with contextlib.suppress(OSError):
                return len(client.recv(8192))
            return 0

    # By port: a later fragment has none, so the rule does not meet it.
    sides = {"PREROUTING": "--dport", "OUTPUT": "--sport"}
    rest = [str(PORT), "-j", "CT", "--notrack"]
    with udp_server(three.h, PORT):
        assert answers(100)
        assert answers(4000)
        before = three.judged("server")
        for hook, side in sides.items():
            three.h.run(["iptables-legacy", "-t", "raw", "-A", hook, "-p", "udp", side, *rest])
        assert answers(100)
        assert not answers(4000)
    judgement = three.judged("server")
    assert before.verdict == "safe"
    assert judgement.verdict == "cannot-say"
    assert "raw_before_defrag" in " ".join(judgement.reasons)
    three.h.run(["iptables-legacy", "-t", "raw", "-F"])


def test_a_bridge_that_tracks_comes_before_notrack(three: Three) -> None:
    """nf_conntrack_bridge: what a bridge has tracked stays tracked."""
    modules("bridge", "nf_conntrack_bridge", "nft_ct")
    h, device, here = three.h, "to-c", three.h.addresses["c"][0]
    h.track()
    with tcp_server(h, PORT, handle=echo):
        h.run(["ip", "link", "add", "br0", "type", "bridge"])
        h.run(["ip", "addr", "del", f"{here}/24", "dev", device])
        h.run(["ip", "link", "set", device, "master", "br0"])
        h.run(["ip", "addr", "add", f"{here}/24", "dev", "br0"])
        h.run(["ip", "link", "set", "br0", "up"])
        assert three.ask(here) == [b"one", b"two", b"six"]
        before = three.judged("server")
        h.run(
            ["nft", "-f", "-"],
            stdin="table bridge b { chain p { type filter hook prerouting priority 0;\n"
            "ct state established counter\n}\n}\n",
        )
        judgement = three.judged("server")
        three.put(judgement)
        assert three.ask(here) == [b"one", b"two", b"six"]
        assert len(three.entries())
    assert before.verdict == "safe", before.reasons
    assert judgement.verdict == "cannot-say"
    assert "table bridge b" in judgement.reasons[0]


def test_devices_of_other_planes(three: Three) -> None:
    three.h.track()
    assert three.judged("server").verdict == "safe"
    for kind, what in (("v10 type vrf table 10", "a VRF"), ("nk type netkit", "netkit")):
        three.h.run(["ip", "link", "add", *kind.split()])
        judgement = three.judged("server")
        assert judgement.verdict == "cannot-say"
        assert what in judgement.reasons[0]
        three.h.run(["ip", "link", "del", kind.split()[0]])
