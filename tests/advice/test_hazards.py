"""Hazards that need more than a ruleset to show: real helpers, proxies, fragments, equal hooks."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest
from kit.rulesets.cases import (
    EST,
    LO,
    PING,
    RULES,
    SAFE,
    TRACK,
    XT_EST,
    XT_ICMP,
    XT_LO,
    Setup,
    chain,
    fw,
    nft,
    xt,
    xt_filter,
)
from kit.rulesets.net import (
    ABORT,
    CLOSED,
    FAMILIES,
    PORT,
    WAIT,
    Address,
    Net,
    ask,
    echo,
    entries,
    forget_paths,
    install,
    put,
    reset,
    seen,
    take_away,
    verdict_on,
)
from kit.rulesets.tools import VIP

from ctrace.advice.hazards import Judgement, to_many
from ctrace.advice.roles import subject
from ctrace.advice.subject import Subject
from ctrace.lab import Node
from ctrace.plan.plan import Notrack, alone
from ctrace.rehearsal.snapshot import take
from ctrace.ruleset import notrack_nft

pytestmark = pytest.mark.kernel
TOOLS = ("nft", "iptables-nft", "iptables-legacy")
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75
PROXY, FAR = 7064, 7065


def judged(net: Net, proto: str = "tcp", port: int = PORT) -> Judgement:
    """The verdict from the entries that are in the table now."""
    about = subject(seen(net, proto, port), net.local, (32768, 60999), True, ())
    return verdict_on(about, net.h.path)


def bare(judgement: Judgement) -> Notrack:
    return replace(judgement.lever, accepts=(), icmp=False)


# ---- conntrack helpers -----------------------------------------------------------


@contextlib.contextmanager
def serving(
    node: Node, kind: int, port: int, serve: Callable[[socket.socket], None]
) -> Iterator[None]:
    """``serve`` in a thread, called with a bound socket of both families until it is closed."""
    server = node.socket(socket.AF_INET6, kind)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("::", port))
    if kind == socket.SOCK_STREAM:
        server.listen(16)
    with answering(server, serve):
        yield


@contextlib.contextmanager
def answering(server: socket.socket, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """``serve`` in a thread, called with the socket again and again until it is closed."""

    def run() -> None:
        with contextlib.suppress(OSError):
            while True:
                serve(server)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


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


# ---- a port that masqueraded connections come from, too ---------------------------------

INSIDE = {4: "10.77.4.2", 6: "fd77:4::2"}
FIREWALL = fw(chain("input", "ct state invalid drop\n" + EST + LO + PING
                    + "meta l4proto { tcp, udp } th dport 8063 accept", "drop"))  # fmt: skip


def masquerade(tool: str, proto: str, to: str = "") -> Setup:
    """Everything from behind ``h`` gets its address; with ``to`` that port, too."""
    if tool == "nft":
        return nft("".join(
            f"table {family} n {{ chain post {{ type nat hook postrouting priority 100;\n"
            f'{family} saddr {INSIDE[version]} oifname "to-r2" meta l4proto {proto} masquerade'
            f"{f' to :{to}' if to else ''}\n}}\n}}\n"
            for family, version in (("ip", 4), ("ip6", 6))
        ))  # fmt: skip
    v4, v6 = (
        f"*nat\n-A POSTROUTING -s {net} -o to-r2 -p {proto} -j MASQUERADE"
        f"{f' --to-ports {to}' if to else ''}\nCOMMIT\n"
        for net in INSIDE.values()
    )
    return xt(tool.removeprefix("iptables-"), v4, v6)


def through(net: Net, proto: str, family: int, port: int, what: bytes = b"s") -> bytes:
    """Another host's connection through ``h``, which must arrive with ``h``'s address."""
    far, source = net.addresses["c"][family], (net.addresses["s"][family], port)
    net.h.run(["conntrack", "-F"], check=False)
    if proto == "tcp":
        return ask(net.s, (far, PORT), what, source=source)

    def once(server: socket.socket) -> None:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        asked, info, _, peer = server.recvmsg(64, 256)
        if not asked:  # it was shut down
            raise OSError
        # Only the question is answered: two echo services would go on for ever.
        if asked == b"hello":
            server.sendmsg([b"far"], info, 0, peer)

    with serving(net.c, socket.SOCK_DGRAM, FAR, once):
        return echo(net.s, (far, FAR), source=source)


@pytest.mark.parametrize("chosen", ["by the host", "by the rule"])
@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_gateways_own_service(net: Net, tool: str, proto: str, chosen: str) -> None:
    """Another host's connection, translated to the service's port, keeps its replies."""
    reset(net)
    by_rule = chosen == "by the rule"
    install(net, (*masquerade(tool, proto, str(PORT) if by_rule else ""), *FIREWALL))
    use = ask if proto == "tcp" else echo
    port = 50_505 if by_rule else PORT
    assert all(use(net.c, (net.addresses["h"][family], PORT)) for family in FAMILIES)
    judgement = judged(net, proto)
    lever = judgement.lever
    assert judgement.verdict == RULES, judgement.reasons
    assert any(f"to port {PORT}: the rules recognise" in reason for reason in judgement.reasons)

    def works(what: bytes = b"s") -> list[bool]:
        found = []
        for family in FAMILIES:
            found.append(bool(through(net, proto, family, port, what)))
            left = [e for e in entries(net, None) if e.src == net.addresses["s"][family]]
            if found[-1]:
                assert [(e.reply_dst, e.reply_dport) for e in left] == [
                    (net.h.addresses["r2"][family == 6], PORT)
                ]
        return found

    assert works() == [True, True]
    put(net, replace(lever, shared=False, icmp=True, accepts=()))
    assert works() == [False, False]
    take_away(net)
    put(net, lever)
    assert works() == [True, True]
    if proto == "tcp":
        # Path MTU errors about either reach whom they are for.
        forget_paths(net)
        assert works(b"u") == [True, True]
        forget_paths(net)
        hosts = net.addresses["h"]
        assert all(ask(net.c, (hosts[family], PORT), b"d") for family in FAMILIES)
    net.h.run(["conntrack", "-F"], check=False)
    assert all(use(net.c, (net.addresses["h"][family], PORT)) for family in FAMILIES)
    assert not entries(net)
    take_away(net)


def test_a_clusters_address_with_the_services_own_port(net: Net) -> None:
    """Whoever calls it is led to this host: by the port alone that looks like the service."""
    reset(net)
    install(net, (*nft("table ip n { chain pre { type nat hook prerouting priority -100;\n"
                       f"ip daddr {VIP} tcp dport 8063 dnat to 10.77.3.2\n}}\n}}\n"),
                  *FIREWALL))  # fmt: skip
    direct, through_it = (net.addresses["h"][4], PORT), (VIP, PORT)
    assert ask(net.c, direct)
    judgement = judged(net)
    assert judgement.verdict == RULES, judgement.reasons
    lever = judgement.lever
    assert ask(net.c, through_it)
    put(net, replace(lever, shared=False, accepts=()))
    assert not ask(net.c, through_it)
    take_away(net)
    put(net, lever)
    assert ask(net.c, through_it)
    net.h.run(["conntrack", "-F"], check=False)
    assert ask(net.c, direct)
    assert not entries(net)
    take_away(net)


def test_a_gateways_rules_survive_a_reload(net: Net) -> None:
    """As when somebody saves the ruleset for the next boot."""
    reset(net)
    install(net, (*masquerade("nft", "tcp"), *TRACK))
    assert ask(net.c, (net.addresses["h"][4], PORT))
    put(net, judged(net).lever)
    assert through(net, "tcp", 4, PORT)
    saved = net.h.run(["nft", "list", "ruleset"])
    assert net.addresses["c"][4] in saved  # the far end is remembered
    net.h.run(["nft", "-f", "-"], stdin=f"flush ruleset\n{saved}")
    assert through(net, "tcp", 4, PORT)


def test_a_hosts_own_call_that_gets_the_port_keeps_its_entry(net: Net) -> None:
    reset(net)
    rule = 'oifname "to-r2" tcp sport 1024-65535 masquerade to :8063'
    install(net, (*nft("table ip n { chain post { type nat hook postrouting priority 100;\n"
                       f"{rule}\n}}\n}}\n"), *TRACK))  # fmt: skip
    assert ask(net.c, (net.addresses["h"][4], PORT))
    judgement = judged(net)
    far = (net.addresses["c"][4], PORT)
    assert ask(net.h, far)
    put(net, judgement.lever)
    assert ask(net.h, far)
    net.h.run(["conntrack", "-F"], check=False)
    assert ask(net.c, (net.addresses["h"][4], PORT))
    assert not entries(net)  # the service itself is untracked
    take_away(net)
    assert judgement.lever.shared
    # Several such calls to one service want the same port, tracked: that isn't taken for safe.
    assert judgement.verdict == "unsafe"
    assert {one["role"] for one in judgement.evidence["differed"]} == {"client"}


def test_a_connection_that_is_translated_to_the_port_now(net: Net) -> None:
    reset(net)
    install(net, (*masquerade("nft", "tcp"), *TRACK))
    assert ask(net.c, (net.addresses["h"][4], PORT))
    about = replace(subject(seen(net), net.local, (32768, 60999), True, ()), shared_now=True)
    judgement = verdict_on(about, net.h.path)
    assert judgement.verdict == "unsafe"
    assert "right now" in judgement.reasons[0]


# ---- users of this host ------------------------------------------------------------------

USER, USERS_PORT = 33, 8064
_libc = ctypes.CDLL(None)


@contextlib.contextmanager
def as_user(ids: int) -> Iterator[None]:
    """This thread's new files are that user's and group's."""
    _libc.setfsgid(ids)
    _libc.setfsuid(ids)
    try:
        yield
    finally:
        _libc.setfsuid(0)
        _libc.setfsgid(0)


@contextlib.contextmanager
def serving_as(node: Node, ids: int, port: int) -> Iterator[None]:
    with node.enter(), as_user(ids):
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)

    def run() -> None:
        with contextlib.suppress(OSError), as_user(ids):  # what is accepted is of who accepts it
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"u" * len(connection.recv(2)) * 2)

    with server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port))
        server.listen(16)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
        thread.join(60)


@pytest.mark.parametrize("word", ["skuid", "skgid"])
def test_a_user_who_may_only_answer(net: Net, word: str) -> None:
    """Its service's replies pass by state, before what stops everything else of that user."""
    reset(net)
    install(net, fw(chain("output", f"{EST}meta {word} {USER} reject")))
    door = (net.addresses["h"][4], USERS_PORT)
    with serving_as(net.h, USER, USERS_PORT):
        assert ask(net.c, door)
        judgement = judged(net, port=USERS_PORT)
        assert judgement.verdict == RULES, judgement.reasons
        put(net, bare(judgement))
        assert not ask(net.c, door)
        take_away(net)
        put(net, judgement.lever)
        net.h.run(["conntrack", "-F"], check=False)
        assert ask(net.c, door)
        assert not entries(net, USERS_PORT)
    take_away(net)


# ---- what only some packets meet ------------------------------------------------------


def test_an_address_on_lo_that_others_call(net: Net) -> None:
    """As a balancer's or anycast: nobody called it while the table was read."""
    reset(net)
    anycast = "192.0.2.55"
    rules = f"ip saddr {anycast} ct state established accept\nip saddr {anycast} drop"
    install(net, fw(chain("output", rules)))
    net.h.run(["ip", "addr", "add", f"{anycast}/32", "dev", "lo"])
    try:
        assert ask(net.c, (net.addresses["h"][4], PORT))
        judgement = judged(net)
        assert judgement.verdict == RULES, judgement.reasons
        assert ask(net.c, (anycast, PORT))
        put(net, bare(judgement))
        assert not ask(net.c, (anycast, PORT))
        take_away(net)
        put(net, judgement.lever)
        assert ask(net.c, (anycast, PORT))
        take_away(net)
    finally:
        net.h.run(["ip", "addr", "del", f"{anycast}/32", "dev", "lo"])


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_a_program_that_decides_about_new_connections(net: Net, variant: str) -> None:
    """Nobody listens here, so without a bypass nothing is let in: untracked packets are."""
    queue = "-A INPUT -p tcp --dport 8063 -m conntrack --ctstate NEW -j NFQUEUE --queue-num 9"
    door = (net.addresses["h"][4], PORT)
    reset(net)
    install(net, xt(variant, f"*filter\n{queue} --queue-bypass\nCOMMIT\n"))
    assert ask(net.c, door)
    judgement = judged(net)
    reset(net)
    install(net, xt(variant, f"*filter\n{queue}\nCOMMIT\n"))
    assert not ask(net.c, door)
    put(net, bare(judgement))
    assert ask(net.c, door)
    take_away(net)
    assert judgement.verdict == "unsafe", judgement.reasons


SCARCE = "1/minute"
XT_FEW = f"{XT_EST}{XT_LO}{XT_ICMP}-A INPUT -p tcp --dport 8063"
NO_V6 = "*filter\nCOMMIT\n"
FEW = {
    "nft limit": fw(chain("input", EST + LO + PING + f"tcp dport 8063 limit rate {SCARCE} burst 5 "
                          "packets accept", "drop")),
    "nft quota": fw(chain("input", EST + LO + PING + "tcp dport 8063 quota until 9 kbytes accept",
                          "drop")),
    "iptables-nft limit": xt("nft", xt_filter(f"{XT_FEW} -m limit --limit {SCARCE} --limit-burst "
                                              "5 -j ACCEPT\n"), NO_V6),
    "iptables-legacy quota": xt("legacy", xt_filter(f"{XT_FEW} -m quota --quota 9000 -j ACCEPT\n"),
                                NO_V6),
}  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_a_limit_that_only_first_packets_meet(net: Net, name: str) -> None:
    """The others pass by state, before it: once untracked, all would count."""
    reset(net)
    install(net, FEW[name])
    door = (net.addresses["h"][4], PORT)
    assert ask(net.c, door, b"u")
    judgement = judged(net)
    put(net, bare(judgement))
    assert not ask(net.c, door, b"u")
    reset(net)
    install(net, FEW[name])
    if judgement.verdict == "unsafe":
        assert "legacy" in name, judgement.reasons
        assert any("asked about every packet" in reason for reason in judgement.reasons)
        return
    assert judgement.verdict == RULES, judgement.reasons
    put(net, judgement.lever)
    assert ask(net.c, door, b"u")
    assert not entries(net)
    take_away(net)


def test_a_set_that_new_connections_fill(net: Net) -> None:
    """Who uses the service is let in elsewhere for a while."""
    reset(net)
    rules = (
        EST
        + LO
        + PING
        + (
            "tcp dport 8063 ct state new update @seen { ip saddr }\n"
            "tcp dport 8063 accept\nip saddr @seen tcp dport 22 accept"
        )
    )
    install(
        net,
        fw(
            chain("input", rules, "drop"),
            extra="set seen { type ipv4_addr; flags dynamic,timeout; timeout 5m; }\n",
        ),
    )
    at = net.addresses["h"][4]
    assert ask(net.c, (at, PORT))
    assert ask(net.c, (at, CLOSED))
    judgement = judged(net)
    net.h.run(["nft", "flush", "set", "inet", "fw", "seen"])
    put(net, judgement.lever)
    assert ask(net.c, (at, PORT))
    assert not ask(net.c, (at, CLOSED))
    take_away(net)
    assert judgement.verdict == "unsafe", judgement.reasons
    assert any("set fw seen" in reason for reason in judgement.reasons)


# ---- a host behind the router that calls out from the service's port -------------------


CALLS = {
    "by state": (fw(chain("forward", EST + PING + "tcp dport 8063 accept\n"
                          'ct state new iifname "to-s" accept', "drop")), RULES, True),
    "masqueraded": (nft("table ip n { chain post { type nat hook postrouting priority 100;\n"
                        'oifname "to-r2" tcp dport 22 masquerade\n}\n}\n'), SAFE, True),
    "stateless": ((*TRACK, *nft("table inet f {" + chain(
        "forward", EST + PING + 'tcp dport 8063 accept\niifname "to-s" accept', "drop"
    ) + "}")), SAFE, True),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_server_behind_the_router_calls_from_its_port(net: Net, name: str) -> None:
    setup, verdict, works = CALLS[name]
    reset(net)
    install(net, setup)

    def who_asks(server: socket.socket) -> None:
        connection, peer = server.accept()
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(peer[0].removeprefix("::ffff:").encode())
            connection.recv(1)

    def call() -> str:
        with net.s.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(WAIT)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            client.bind((net.addresses["s"][4], PORT))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            with contextlib.suppress(OSError):
                client.connect((net.addresses["c"][4], 22))
                return client.recv(64).decode()
            return ""

    with serving(net.c, socket.SOCK_STREAM, 22, who_asks):
        seen_as = net.h.addresses["r2"][0] if name == "masqueraded" else net.addresses["s"][4]
        assert call() == seen_as
        net.h.run(["conntrack", "-F"], check=False)
        assert ask(net.c, (net.addresses["s"][4], PORT))
        judgement = judged(net)
        put(net, judgement.lever)
        assert (call() == seen_as) == works
        assert ask(net.c, (net.addresses["s"][4], PORT))
        take_away(net)
    assert judgement.lever.roles == ("forward",)
    assert judgement.verdict == verdict
    differed = judgement.evidence["differed"]
    assert works or any(f":{PORT} -> " in one["of"] for one in differed)


def expires(net: Net, name: str) -> int:
    """Seconds until a set of ours forgets the only end in it; 0: nothing is there."""
    said = json.loads(net.h.run(["nft", "-j", "list", "set", "inet", "ctrace", name]))["nftables"]
    every = [one for part in said for one in part.get("set", {}).get("elem", ())]
    return max((int(one["elem"]["expires"]) for one in every), default=0)


@pytest.mark.parametrize(
    ("name", "role", "caller"), [("others4", "server", "h"), ("calls4", "forward", "s")]
)
def test_a_call_from_the_port_is_remembered_while_it_talks(
    net: Net, name: str, role: str, caller: str
) -> None:
    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(connection.recv(1))
            connection.recv(1)

    reset(net)
    install(net, TRACK)
    put(net, Notrack("tcp", PORT, (role,), shared=True, icmp=False))
    node, deadline = {"h": net.h, "s": net.s}[caller], time.monotonic() + 60
    with (
        serving(net.c, socket.SOCK_STREAM, FAR, answer),
        node.socket(socket.AF_INET, socket.SOCK_STREAM) as client,
    ):
        client.settimeout(WAIT * 10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        client.bind((net.addresses[caller][4], PORT))
        client.connect((net.addresses["c"][4], FAR))
        left = first = expires(net, name)
        assert first > 86400
        while left > first - 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            left = expires(net, name)
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        assert expires(net, name) > left
    take_away(net)


@pytest.mark.parametrize(
    ("target", "many"),
    [("224.0.0.251", True), ("255.255.255.255", True), ("10.77.9.255", True), ("ff02::fb", True),
     ("10.77.3.2", False), ("fd77:3::2", False)],
)  # fmt: skip
def test_what_goes_to_many_at_once_is_not_judged(net: Net, target: str, many: bool) -> None:
    more = ["10.77.9.1/24", "brd", "10.77.9.255", "dev", "to-r2"]
    net.h.run(["ip", "addr", "add", *more])
    flow = "server", b"\x0a\x4d\x03\x01", 40000, ip_address(target).packed, 5353
    found = list(to_many(Subject("udp", 5353, ("server",), flows=(flow,)), take(net.h.path)))
    net.h.run(["ip", "addr", "del", *more])
    assert [one.level for one in found] == ["unknown"] * many
    assert all(target in one.text for one in found)
