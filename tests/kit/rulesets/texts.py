"""Rule sets as text: parts that many have, and what puts them together."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parents[2] / "advice" / "rulesets"
PING = "icmp type { echo-request, destination-unreachable, time-exceeded } accept\n"
PING += "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, "
PING += "nd-router-advert, packet-too-big, destination-unreachable, echo-request } accept\n"
ND = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept\n"
EST = "ct state established,related accept\n"
LO = 'iif "lo" accept\n'
Setup = tuple[tuple[str, str], ...]


def nft(body: str) -> Setup:
    return (("nft", body),)


def chain(hook: str, rules: str, policy: str = "accept", priority: str = "0") -> str:
    return (
        f"chain {hook} {{ type filter hook {hook} priority {priority}; policy {policy};\n"
        f"{rules}\n}}\n"
    )


def fw(*chains: str, extra: str = "") -> Setup:
    return nft(f"table inet fw {{\n{extra}{''.join(chains)}}}\n")


def xt(variant: str, v4: str, v6: str | None = None) -> Setup:
    """The same rules for both families, through nft or legacy iptables."""
    return (
        (f"iptables-{variant}-restore", v4),
        (f"ip6tables-{variant}-restore", v4 if v6 is None else v6),
    )


def xt_filter(rules: str, inp: str = "DROP", out: str = "ACCEPT", fwd: str = "ACCEPT") -> str:
    return f"*filter\n:INPUT {inp}\n:FORWARD {fwd}\n:OUTPUT {out}\n{rules}COMMIT\n"


TRACK = fw(chain("input", "ct state invalid counter"), chain("forward", "ct state invalid counter"))
"""Tracks, and lets everything pass."""


def ufw(name: str, variant: str = "nft") -> Setup:
    return xt(variant, *((HERE / f"ufw-{name}.{v}").read_text() for v in ("v4", "v6")))


def firewalld(name: str) -> Setup:
    return nft((HERE / f"firewalld-{name}.nft").read_text())


STRICT = ("sh", "echo 0 >/proc/sys/net/netfilter/nf_conntrack_tcp_loose\n")
"""What SYNPROXY needs: no entry from a packet in the middle of a connection."""
XT_EST = "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
XT_LO = "-A INPUT -i lo -j ACCEPT\n"
XT_ICMP = "-A INPUT -p icmp --icmp-type 3 -j ACCEPT\n-A INPUT -p icmp --icmp-type 8 -j ACCEPT\n"
XT_ICMP6 = "-A INPUT -p ipv6-icmp -j ACCEPT\n"


def xt_both(variant: str, head: str, tail: str = "", tail6: str = "", **policies: str) -> Setup:
    return xt(
        variant,
        xt_filter(head + XT_ICMP + tail, **policies),
        xt_filter(head + XT_ICMP6 + tail + tail6, **policies),
    )


# Docker's published form (20.10, iptables): one container port published on 8063.
DOCKER = """*nat
:PREROUTING ACCEPT
:INPUT ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
:DOCKER -
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s {net} ! -o {bridge} -j MASQUERADE
-A POSTROUTING -s {to}/32 -d {to}/32 -p tcp -m tcp --dport {inner} -j MASQUERADE
-A DOCKER -i {bridge} -j RETURN
-A DOCKER ! -i {bridge} -p tcp -m tcp --dport {outer} -j DNAT --to-destination {to}:{inner}
COMMIT
*filter
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
:DOCKER -
:DOCKER-ISOLATION-STAGE-1 -
:DOCKER-ISOLATION-STAGE-2 -
:DOCKER-USER -
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o {bridge} -j DOCKER
-A FORWARD -i {bridge} ! -o {bridge} -j ACCEPT
-A FORWARD -i {bridge} -o {bridge} -j ACCEPT
-A DOCKER -d {to}/32 ! -i {bridge} -o {bridge} -p tcp -m tcp --dport {inner} -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i {bridge} ! -o {bridge} -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o {bridge} -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""


def docker(outer: int, inner: int, variant: str = "nft") -> Setup:
    text = DOCKER.format(
        net="10.77.4.0/24", bridge="to-s", to="10.77.4.2", outer=outer, inner=inner
    )
    return ((f"iptables-{variant}-restore", text),)


# kube-proxy's iptables mode, as it renders one NodePort service with one endpoint.
KUBE = """*nat
:PREROUTING ACCEPT
:INPUT ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
:KUBE-SERVICES -
:KUBE-NODEPORTS -
:KUBE-POSTROUTING -
:KUBE-MARK-MASQ -
:KUBE-SVC-TESTAAAAAAAAAAAA -
:KUBE-EXT-TESTAAAAAAAAAAAA -
:KUBE-SEP-TESTAAAAAAAAAAAA -
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -d {vip}/32 -p tcp -m comment --comment "default/web cluster IP" \
-m tcp --dport {port} -j KUBE-SVC-TESTAAAAAAAAAAAA
-A KUBE-SERVICES -m comment --comment "node ports; this must be last" -m addrtype \
--dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m comment --comment "default/web" -m tcp --dport {node} \
-j KUBE-EXT-TESTAAAAAAAAAAAA
-A KUBE-EXT-TESTAAAAAAAAAAAA -j KUBE-MARK-MASQ
-A KUBE-EXT-TESTAAAAAAAAAAAA -j KUBE-SVC-TESTAAAAAAAAAAAA
-A KUBE-SVC-TESTAAAAAAAAAAAA -m statistic --mode random --probability 0.50000000000 \
-j KUBE-SEP-TESTAAAAAAAAAAAA
-A KUBE-SVC-TESTAAAAAAAAAAAA -j KUBE-SEP-TESTAAAAAAAAAAAA
-A KUBE-SEP-TESTAAAAAAAAAAAA -s {to}/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-TESTAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination {to}:{inner}
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
*filter
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
:KUBE-FIREWALL -
:KUBE-FORWARD -
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate \
RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"""


def kube(node: int, port: int = 8063, inner: int = 8063, vip: str = "10.96.0.10") -> Setup:
    text = KUBE.format(vip=vip, port=port, node=node, to="10.77.4.2", inner=inner)
    return (("iptables-nft-restore", text),)


def egress(marked: str, rules: str) -> Setup:
    """A mark from the state of a connection, asked for at the device."""
    mark = chain("output", f"tcp sport 8063 {marked} meta mark set 0x9")
    at = 'type filter hook egress device "to-r2" priority 0;'
    return (*fw(mark), *nft(f"table netdev d {{ chain leaving {{\n{at}\n{rules}\n}}\n}}\n"))


NAT_DROP_IN = fw(chain("input", EST + LO + PING + "tcp dport 8063 accept", "drop"))

NAIVE = (
    "table inet naive {\n"
    + "".join(
        chain(hook, "tcp dport 8063 notrack\ntcp sport 8063 notrack", priority="raw")
        for hook in ("prerouting", "output")
    )
    + "}\n"
)
"""The usual recipe: the port in both directions, in both hooks, and nothing else."""
