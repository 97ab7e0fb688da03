"""What rules do by state beside letting pass: each fares otherwise for real once untracked, and no
verdict calls it safe. Lists that others ask, addresses that only entries name, headers, queues; and
errors, which the accepts let in."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from kit.rulesets.net import Net, ask, echo, install, put, reset, seen, take_away, verdict_on
from kit.rulesets.services import CLOSED, PORT, STRANGER, WAIT
from kit.rulesets.texts import EST, LO, PING, Setup, chain, fw

from ctrace.advice.roles import subject

pytestmark = pytest.mark.kernel
Use = Callable[[Net], bytes]
GOOD = ("safe", "safe-with-rules")


def xt(variant: str, table: str, rules: str) -> Setup:
    return ((f"iptables-{variant}-restore", f"*{table}\n{rules}COMMIT\n"),)


def knocked(net: Net) -> bytes:
    """Whoever was at the web server may come in by another door."""
    at = net.addresses["h"][4]
    net.h.run(["sh", "-c", "echo / > /proc/net/xt_recent/web"])
    return ask(net.c, (at, PORT)) and ask(net.c, (at, CLOSED))


def after_web(net: Net) -> bytes:
    """The same by a set of nftables."""
    net.h.run(["nft", "flush", "set", "inet", "fw", "web"])
    at = net.addresses["h"][4]
    return ask(net.c, (at, PORT)) and ask(net.c, (at, CLOSED))


def banned(net: Net, port: int = 0) -> bytes:
    return ask(net.c, (net.addresses["h"][4], PORT), source=(STRANGER[4], port))


def three_more(net: Net) -> bytes:
    """Three, of which two are let in."""
    net.h.run(["ipset", "-exist", "add", "spent", "10.77.0.0/16", "packets", "899998"])
    return b" ".join(ask(net.c, (net.addresses["h"][4], PORT)) for _ in range(3))


def segment(net: Net) -> bytes:
    """The size of segments that two others agree on."""
    with net.c.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(WAIT)
        client.connect((net.addresses["s"][4], PORT))
        return b"%d" % client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)


def classed(net: Net) -> bytes:
    """Whether answers leave by the class that is for them: by the queue's own counters."""
    ask(net.c, (net.addresses["h"][4], PORT))
    said = net.h.run(["tc", "-s", "class", "show", "dev", "to-r2"])
    (sent,) = (part for part in said.split("class ") if part.startswith("htb 1:10 "))
    return b"" if " Sent 0 bytes" in sent else b"its own"


KNOCK = (
    f"-A INPUT -p tcp --dport {PORT} -m conntrack --ctstate NEW -m recent --set --name web\n"
    f"-A INPUT -p tcp --dport {CLOSED} -m conntrack --ctstate NEW -m recent ! --rcheck --name web "
    "-j DROP\n"
)
CLAMP = (
    "-A FORWARD -p tcp --tcp-flags SYN,RST SYN -m conntrack --ctstate NEW,ESTABLISHED "
    "-j TCPMSS --set-mss 1000\n"
)
CLASS = (
    f"-A PREROUTING -p tcp --dport {PORT} -m conntrack --ctstate NEW -j CONNMARK --set-mark 7\n"
    "-A POSTROUTING -m connmark --mark 7 -j CLASSIFY --set-class 1:10\n"
)
QUEUE = ((
    "sh",
    "tc qdisc del dev to-r2 root 2>&- || :\n"
    "tc qdisc add dev to-r2 root handle 1: htb default 20\n"
    "tc class add dev to-r2 parent 1: classid 1:10 htb rate 100mbit quantum 1500\n"
    "tc class add dev to-r2 parent 1: classid 1:20 htb rate 100mbit quantum 1500\n",
),)  # fmt: skip
MARKED = (
    f"table inet q {{\n{chain('prerouting', f'tcp dport {PORT} ct state new ct mark set 7')}"
    f"{chain('postrouting', 'ct mark 7 meta priority set 1:10')}}}\n"
)
SPENT = (
    "-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT\n"
    f"-A INPUT -p tcp --dport {PORT} -m set --match-set spent src --packets-lt 900000 -j ACCEPT\n"
    f"-A INPUT -p tcp --dport {PORT} -j DROP\n"
)
"""So many packets that begin connections."""
COUNT = (("sh", "ipset -exist create spent hash:net counters && ipset flush spent\n"
          "ipset add spent 10.77.0.0/16\n"),)  # fmt: skip
BESIDE: dict[str, tuple[Setup, str, Use]] = {
    "recent nft": (xt("nft", "filter", KNOCK), "server", knocked),
    "recent legacy": (xt("legacy", "filter", KNOCK), "server", knocked),
    "counters of an ipset nft": (COUNT + xt("nft", "filter", SPENT), "server", three_more),
    "counters of an ipset legacy": (COUNT + xt("legacy", "filter", SPENT), "server", three_more),
    "a set that established fills": (
        fw(
            chain("prerouting", f"ct state established tcp dport {PORT} add @web {{ ip saddr }}"),
            chain("input", f"meta nfproto ipv4 tcp dport {CLOSED} ip saddr != @web drop"),
            extra="set web { type ipv4_addr; flags dynamic; size 999; }\n",
        ),
        "server",
        after_web,
    ),
    "named by entries only": (
        fw(chain("input", f"ct original ip saddr {STRANGER[4]} drop")),
        "server",
        banned,
    ),
    "a source port": (
        fw(chain("input", "tcp sport 5555 ct state new drop")),
        "server",
        lambda net: banned(net, 5555),
    ),
    "TCPMSS nft": (xt("nft", "mangle", CLAMP), "forward", segment),
    "TCPMSS legacy": (xt("legacy", "mangle", CLAMP), "forward", segment),
    "CLASSIFY nft": (QUEUE + xt("nft", "mangle", CLASS), "server", classed),
    "CLASSIFY legacy": (QUEUE + xt("legacy", "mangle", CLASS), "server", classed),
    "meta priority": ((*QUEUE, ("nft", MARKED)), "server", classed),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_state_does_beside_is_seen(net: Net, name: str) -> None:
    setup, role, use = BESIDE[name]
    reset(net)
    net.h.run(["iptables-legacy", "-t", "mangle", "-F"])
    install(net, setup)
    ask(net.c, (net.addresses["h" if role == "server" else "s"][4], PORT))
    about = subject(seen(net), net.local, (32768, 60999), True, ())
    assert about.roles == (role,)
    judgement = verdict_on(about, net.h.path)
    before = use(net)
    put(net, judgement.lever)
    install(net, [one for one in setup if one == QUEUE[0]])  # with new counters
    changed = use(net) != before
    take_away(net)
    assert changed
    assert judgement.verdict not in GOOD, judgement.reasons


def refused(net: Net) -> bytes:
    """What a call to a port where nobody listens gets: an error at once."""
    with net.h.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
        caller.settimeout(WAIT)
        caller.connect((net.r1.addresses["c"][0], PORT))
        try:
            caller.send(b"hello")
            return caller.recv(64)
        except ConnectionRefusedError:
            return b"refused"
        except TimeoutError:
            return b""


def test_refusals_come_through_the_accepts(net: Net) -> None:
    """A firewall that names the errors about sizes, and lets the others in by state."""
    errors = "icmp type destination-unreachable icmp code frag-needed accept\n"
    answers = f"udp sport {PORT} ip saddr 10.77.0.0/16 accept\n"
    reset(net)
    install(net, fw(chain("input", f"{LO}{EST}{errors}{answers}", policy="drop")))
    at = net.addresses["c"][4]
    assert echo(net.h, (at, PORT))
    assert refused(net) == b"refused"
    about = subject(seen(net, "udp"), net.local, (32768, 60999), True, ())
    judgement = verdict_on(about, net.h.path)
    assert judgement.verdict == "safe-with-rules", judgement.reasons
    put(net, judgement.lever)
    assert echo(net.h, (at, PORT))
    assert refused(net) == b"refused"
    take_away(net)


def test_errors_that_nobody_hears_hide_nothing(net: Net) -> None:
    """Where all errors are dropped anyway, what comes after one is compared all the same."""
    reset(net)
    icmp = "icmp type destination-unreachable drop\nicmpv6 type destination-unreachable drop\n"
    install(
        net,
        fw(
            chain("input", f"{icmp}{PING}{LO}"),
            chain("output", f"tcp sport {PORT} ct state != established reject with tcp reset"),
        ),
    )
    assert ask(net.c, (net.addresses["h"][4], PORT))
    about = subject(seen(net), net.local, (32768, 60999), True, ())
    judgement = verdict_on(about, net.h.path)
    put(net, judgement.lever)
    works = ask(net.c, (net.addresses["h"][4], PORT))
    take_away(net)
    assert works or judgement.verdict not in GOOD
