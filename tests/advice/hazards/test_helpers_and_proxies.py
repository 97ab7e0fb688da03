"""What more than a rule set takes part in: conntrack helpers, transparent proxies, fragments."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from kit.rulesets.net import (
    Net,
    ask,
    echo,
    entries,
    install,
    put,
    reset,
    seen,
    take_away,
    verdict_on,
)
from kit.rulesets.services import FAMILIES, PORT, WAIT, Address, answering, serving
from kit.rulesets.texts import EST, LO, PING, TRACK, chain, fw, nft, xt
from kit.rulesets.verdicts import bare, judged

from ctrace.advice.roles import subject
from ctrace.lab import Node
from ctrace.plan.plan import alone
from ctrace.ruleset import notrack_nft

pytestmark = pytest.mark.kernel
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75
PROXY = 7064


def ftp_server(node: Node) -> Callable[[socket.socket], None]:
    """Extended passive mode (RFC 2428): a data connection to a port told in the reply."""

    def serve(server: socket.socket) -> None:
        control, _ = server.accept()
        with control, node.socket(socket.AF_INET6, socket.SOCK_STREAM) as data:
            control.settimeout(3)
            data.settimeout(3)
            data.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            data.listen(1)
            with contextlib.suppress(OSError):
                control.sendall(b"220 ready\r\n")
                control.recv(64)
                port = data.getsockname()[1]
                control.sendall(b"229 Entering Extended Passive Mode (|||%d|)\r\n" % port)
                connection, _ = data.accept()
                with connection:
                    connection.sendall(b"file")

    return serve


def ftp(node: Node, host: str) -> bytes:
    """One file by passive FTP: empty when the data connection does not come about."""
    with contextlib.suppress(OSError), _stream(node, (host, 21)) as control:
        control.recv(64)
        control.sendall(b"EPSV\r\n")
        told = re.search(rb"\|(\d+)\|", control.recv(128))
        assert told, "no answer on the control connection"
        with _stream(node, (host, int(told[1]))) as data:
            return data.recv(16)
    return b""


def _stream(node: Node, target: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    made = node.socket(family, socket.SOCK_STREAM)
    made.settimeout(WAIT * 2)
    try:
        made.connect(target)
    except OSError:
        made.close()
        raise
    return made


HELPER = 'ct helper {0} {{ type "{0}" protocol {1}; }}\n'
FTP_IN = "tcp dport 21 accept\n"
RAW_FTP = "*raw\n-A PREROUTING -p tcp --dport 21 -j CT --helper ftp\nCOMMIT\n"
FTP_RULES = {
    "nft": fw(
        chain("prerouting", 'tcp dport 21 ct helper set "ftp"', priority="filter"),
        chain("input", EST + LO + PING + FTP_IN, "drop"),
        extra=HELPER.format("ftp", "tcp"),
    ),
    **{
        f"iptables-{variant}": (
            *xt(variant, RAW_FTP),
            *fw(chain("input", EST + LO + PING + FTP_IN, "drop")),
        )
        for variant in ("nft", "legacy")
    },
}


@pytest.mark.parametrize("name", FTP_RULES)
def test_a_helpers_data_connections_need_tracking(net: Net, name: str) -> None:
    reset(net)
    install(net, FTP_RULES[name])
    hosts = net.addresses["h"]
    with serving(net.h, socket.SOCK_STREAM, 21, ftp_server(net.h)):
        assert [ftp(net.c, hosts[family]) for family in FAMILIES] == [b"file", b"file"]
        judgement = judged(net, port=21)
        put(net, bare(judgement))
        assert [ftp(net.c, hosts[family]) for family in FAMILIES] == [b"", b""]
        take_away(net)
    assert judgement.verdict == "unsafe"
    assert "helper" in judgement.reasons[0]


def test_an_expected_data_port_is_refused(net: Net) -> None:
    """A data port that is always the same looks like a service: only a helper opens it."""
    reset(net)
    install(net, FTP_RULES["nft"])
    host = net.addresses["h"][4]
    with serving(net.h, socket.SOCK_STREAM, 21, ftp_server(net.h)):
        assert ftp(net.c, host) == b"file"
        (port,) = {entry.dport for entry in entries(net, None)} - {21}
    judgement = judged(net, port=port)
    assert judgement.verdict == "unsafe"
    assert "helper" in judgement.reasons[0]
    # Without the bit, the ruleset alone says that something is not understood.
    about = subject(seen(net, "tcp", port), net.local, (1, 2), True, ())
    blind = verdict_on(replace(about, status=0), net.h.path)
    assert blind.verdict in ("cannot-say", "unsafe")
    assert "refuses without any rules of ours" in " ".join(blind.reasons)


def test_a_tftp_helpers_answers_need_tracking(net: Net) -> None:
    reset(net)
    install(
        net,
        fw(
            chain("prerouting", 'udp dport 69 ct helper set "tftp"', priority="filter"),
            chain("input", EST + LO + PING + "udp dport 69 accept", "drop"),
            chain("output", EST + "oif lo accept\n" + PING, "drop"),
            extra=HELPER.format("tftp", "udp"),
        ),
    )

    def serve(server: socket.socket) -> None:
        """Every transfer comes from a port of its own."""
        asked, peer = server.recvfrom(512)
        if not asked:  # it was shut down
            raise OSError
        with net.h.socket(socket.AF_INET6, socket.SOCK_DGRAM) as answer:
            answer.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            with contextlib.suppress(PermissionError):  # the firewall says so to the sender
                answer.sendto(b"\0\3\0\1file", peer)

    def get(family: int) -> bytes:
        with net.c.socket(FAMILIES[family], socket.SOCK_DGRAM) as client:
            client.settimeout(WAIT)
            client.sendto(b"\0\1name\0octet\0", (net.addresses["h"][family], 69))
            with contextlib.suppress(OSError):
                return client.recv(64)[4:]
            return b""

    with serving(net.h, socket.SOCK_DGRAM, 69, serve):
        assert get(4) == b"file"
        judgement = judged(net, "udp", 69)
        put(net, bare(judgement))
        assert get(4) == b""
        take_away(net)
    assert judgement.verdict == "unsafe"
    assert "helper" in judgement.reasons[0]


# ---- a transparent proxy -----------------------------------------------------------


@contextlib.contextmanager
def proxy(net: Net) -> Iterator[None]:
    """Everything to port 8063 that reaches ``h`` is answered by ``h`` itself."""
    route = "ip rule add fwmark 1 lookup 100\nip route add local default dev lo table 100\n"
    route += route.replace("ip ", "ip -6 ")
    net.h.run(["sh", "-e"], stdin=route)
    listener = net.h.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    listener.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    listener.bind(("::", PROXY))
    listener.listen(16)

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1)
            connection.sendall(b"px")
            connection.recv(1)

    try:
        with answering(listener, serve):
            yield
    finally:
        net.h.run(["sh"], stdin=route.replace(" add ", " del "))


TPROXY = {
    "nft": (
        *nft(
            "table inet divert {\n"
            + chain(
                "prerouting",
                "meta l4proto tcp socket transparent 1 meta mark set 1 accept\n"
                f"meta nfproto ipv4 tcp dport 8063 tproxy ip to :{PROXY} meta mark set 1 accept\n"
                f"meta nfproto ipv6 tcp dport 8063 tproxy ip6 to :{PROXY} meta mark set 1 accept",
                priority="mangle",
            )
            + "}\n"
        ),
        *TRACK,
    ),
    "iptables-legacy": (
        *xt(
            "legacy",
            "*mangle\n-A PREROUTING -p tcp -m socket --transparent -j MARK --set-mark 1\n"
            "-A PREROUTING -p tcp -m socket --transparent -j ACCEPT\n"
            f"-A PREROUTING -p tcp --dport 8063 -j TPROXY --on-port {PROXY} --tproxy-mark 1\n"
            "COMMIT\n",
        ),
        *TRACK,
    ),
}


@pytest.mark.parametrize("tool", TPROXY)
def test_a_transparent_proxy_for_others_is_refused(net: Net, tool: str) -> None:
    """It works untracked, but the answers never are: half a pair, which frees nothing."""
    reset(net)
    install(net, TPROXY[tool])
    servers = net.addresses["s"]
    with proxy(net):
        assert [ask(net.c, (servers[f], PORT)) for f in FAMILIES] == [b"px", b"px"]
        judgement = judged(net)
        put(net, bare(judgement))
        assert [ask(net.c, (servers[f], PORT)) for f in FAMILIES] == [b"px", b"px"]
        left = entries(net)
        take_away(net)
    assert judgement.lever.roles == ("forward",)
    assert judgement.verdict == "cannot-say"
    assert any("transparent proxy" in reason for reason in judgement.reasons)
    assert {entry.src for entry in left} == {servers[family] for family in FAMILIES}


@pytest.mark.parametrize("tool", TPROXY)
def test_a_transparent_proxy_of_the_hosts_own_address_goes_on(net: Net, tool: str) -> None:
    reset(net)
    install(net, TPROXY[tool])
    hosts = net.addresses["h"]
    with proxy(net):
        assert [ask(net.c, (hosts[f], PORT)) for f in FAMILIES] == [b"px", b"px"]
        judgement = judged(net)
        assert (judgement.verdict, judgement.lever.roles) == ("safe", ("server",))
        put(net, judgement.lever)
        assert [ask(net.c, (hosts[f], PORT)) for f in FAMILIES] == [b"px", b"px"]
        assert not entries(net)
        take_away(net)


# ---- where the rules stand -----------------------------------------------------------


def large(node: Node, target: Address) -> int:
    """Bytes that come back of a datagram in several fragments.

    Of IPv6 the first ones are lost in the narrow link, to teach both ends its MTU.
    """
    with node.socket(socket.AF_INET6 if ":" in target[0] else socket.AF_INET,
                     socket.SOCK_DGRAM) as client:  # fmt: skip
        client.settimeout(WAIT)
        for _ in range(4):
            with contextlib.suppress(OSError):
                client.sendto(b"x" * 4000, target)
                return len(client.recv(4096))
    return 0


def test_before_defragmentation_fragments_are_lost(net: Net) -> None:
    """At -450 the first fragment is untracked before the others are known to belong to it."""
    reset(net)
    install(net, TRACK)
    hosts = net.addresses["h"]
    assert [large(net.c, (hosts[family], PORT)) for family in FAMILIES] == [2048, 2048]
    judgement = judged(net, "udp")
    assert judgement.verdict == "safe"
    script = notrack_nft.script(alone(judgement.lever), None)
    early = script.replace("priority raw - 10", "priority -450")
    assert early != script
    net.h.run(["nft", "-f", "-"], stdin=early)
    net.h.run(["conntrack", "-F"], check=False)
    assert [echo(net.c, (hosts[family], PORT)) for family in FAMILIES] == [b"hello"] * 2
    assert large(net.c, (hosts[4], PORT)) == 0
    take_away(net)
    put(net, judgement.lever)
    assert [large(net.c, (hosts[family], PORT)) for family in FAMILIES] == [2048, 2048]
    assert not entries(net)
    take_away(net)
