"""The rules of common tools, in the structure that each gives them, around one container.

The network is that of :mod:`kit.rulesets.net`: ``to-r2`` leads to the world, ``to-s`` is the
container's bridge, tunnel or inner network. The service is tcp/8063 or udp/8063. A published
container port is 7063 to 22, a cluster's address is 10.96.0.10:80, a node port 30063.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kit.rulesets.cases import Setup, firewalld, nft, ufw

EXT, BR = "to-r2", "to-s"
POD, NET, GATE = "10.77.4.2", "10.77.4.0/24", "10.77.4.1"
VIP, NODE, HOST = "10.96.0.10", 30063, "10.77.3.2"
EST = "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
INVALID = "-m conntrack --ctstate INVALID -j DROP"
ICMP = "meta l4proto { icmp, ipv6-icmp } accept"
SERVE = "-p tcp -m tcp --dport 8063"
_BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_TARGETS = ("ACCEPT", "DROP", "RETURN", "REJECT", "MARK", "CONNMARK", "MASQUERADE", "DNAT",
            "REDIRECT")  # fmt: skip


@dataclass(frozen=True)
class Structure:
    """A tool's rules, and how the service is used behind them."""

    tool: str
    roles: tuple[str, ...]
    setup: Setup
    harmless: bool = True
    """Known to be: the rules must be allowed. Else: they may be, if nothing changes."""
    proto: str = "tcp"
    common: bool = False
    """One of the few that every run of the tests looks at."""


def table(name: str, rules: str, **policies: str) -> str:
    """A table as iptables-restore takes it, of rules without their ``-A``."""
    lines = [line.strip() for line in rules.strip().splitlines()]
    named = [line.split()[0] for line in lines] + re.findall(r" -[jg] (\S+)", rules)
    chains = dict.fromkeys([*policies, *(one for one in named if one not in _TARGETS)])
    heads = [f":{c} {policies.get(c, 'ACCEPT' if c in _BUILT_IN else '-')}" for c in chains]
    return "\n".join([f"*{name}", *heads, *(f"-A {line}" for line in lines), "COMMIT", ""])


def v4(variant: str, *tables: str) -> Setup:
    return ((f"iptables-{variant}-restore", "".join(tables)),)


def both(variant: str, *tables: str) -> Setup:
    """For IPv6 the same, without what names IPv4 addresses."""
    lines = [line for line in "".join(tables).splitlines() if not re.search(r"\d\.\d", line)]
    text = "\n".join(lines) + "\n"
    text = text.replace("-p icmp", "-p ipv6-icmp").replace("icmp-port", "icmp6-port")
    return (*v4(variant, *tables), (f"ip6tables-{variant}-restore", text))


# ---- containers ----------------------------------------------------------------------------

DOCKER_NAT = f"""
PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
POSTROUTING -s {NET} ! -o {BR} -j MASQUERADE
DOCKER ! -i {BR} -p tcp -m tcp --dport 7063 -j DNAT --to-destination {POD}:22
"""
DOCKER_FILTER = f"""
FORWARD -j DOCKER-USER
FORWARD -j DOCKER-FORWARD
DOCKER -d {POD}/32 ! -i {BR} -o {BR} -p tcp -m tcp --dport 22 -j ACCEPT
DOCKER ! -i {BR} -o {BR} -j DROP
DOCKER-BRIDGE -o {BR} -j DOCKER
DOCKER-CT -o {BR} {EST}
DOCKER-FORWARD -j DOCKER-CT
DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
DOCKER-FORWARD -j DOCKER-BRIDGE
DOCKER-FORWARD -i {BR} -j ACCEPT
"""
"""As version 28 lays it out."""
DOCKER_RAW = f"PREROUTING -d {POD}/32 ! -i {BR} -j DROP"

DOCKER_NFT = f"""table ip docker-bridges {{
map in-jumps {{ type ifname : verdict; elements = {{ "{BR}" : jump forward-in }} ; }}
map out-jumps {{ type ifname : verdict; elements = {{ "{BR}" : jump forward-out }} ; }}
chain forward-in {{
ct state established,related counter accept
iifname "{BR}" counter accept
ip daddr {POD} tcp dport 22 counter accept
counter drop
}}
chain forward-out {{
ct state established,related counter accept
counter accept
}}
chain published {{
iifname != "{BR}" tcp dport 7063 counter dnat to {POD}:22
}}
chain filter-FORWARD {{
type filter hook forward priority filter; policy accept;
oifname vmap @in-jumps
iifname vmap @out-jumps
}}
chain nat-OUTPUT {{
type nat hook output priority -100; policy accept;
ip daddr != 127.0.0.0/8 fib daddr type local counter jump published
}}
chain nat-PREROUTING {{
type nat hook prerouting priority dstnat; policy accept;
fib daddr type local counter jump published
}}
chain nat-POSTROUTING {{
type nat hook postrouting priority srcnat; policy accept;
oifname != "{BR}" ip saddr {NET} counter masquerade
}}
chain raw-PREROUTING {{
type filter hook prerouting priority raw; policy accept;
ip daddr {POD} iifname != "{BR}" counter drop
}}
}}
"""
NETAVARK = f"""table inet netavark {{
chain dnat-to {{
ip saddr {NET} tcp dport 7063 meta mark set meta mark | 0x2000
ip saddr 127.0.0.1 tcp dport 7063 meta mark set meta mark | 0x2000
tcp dport 7063 dnat ip to {POD}:22
}}
chain hostport {{
tcp dport 7063 jump dnat-to
}}
chain from-net {{
ip daddr {NET} accept
ip daddr != 224.0.0.0/4 masquerade
}}
chain FORWARD {{
type filter hook forward priority filter; policy accept;
ct state invalid drop
}}
chain PREROUTING {{
type nat hook prerouting priority dstnat; policy accept;
fib daddr type local jump hostport
}}
chain OUTPUT {{
type nat hook output priority -100; policy accept;
fib daddr type local jump hostport
}}
chain POSTROUTING {{
type nat hook postrouting priority srcnat; policy accept;
meta mark & 0x2000 == 0x2000 masquerade
ip saddr {NET} jump from-net
}}
}}
"""
LIBVIRT = f"""table ip libvirt_network {{
chain guest_output {{
ip saddr {NET} iif "{BR}" counter accept
iif "{BR}" counter reject
}}
chain guest_input {{
oif "{BR}" ip daddr {NET} ct state established,related counter accept
oif "{BR}" counter reject
}}
chain forward {{
type filter hook forward priority filter; policy accept;
counter jump guest_input
counter jump guest_output
}}
chain guest_nat {{
type nat hook postrouting priority srcnat; policy accept;
ip saddr {NET} ip daddr 224.0.0.0/24 counter return
meta l4proto tcp ip saddr {NET} ip daddr != {NET} counter masquerade to :1024-65535
ip saddr {NET} ip daddr != {NET} counter masquerade
}}
}}
"""

# ---- clusters ------------------------------------------------------------------------------

KUBE_NAT = f"""
PREROUTING -j KUBE-SERVICES
OUTPUT -j KUBE-SERVICES
POSTROUTING -j KUBE-POSTROUTING
KUBE-MARK-MASQ -j MARK --or-mark 0x4000
KUBE-NODEPORTS -p tcp -m tcp --dport {NODE} -j KUBE-EXT-A
KUBE-EXT-A -j KUBE-MARK-MASQ
KUBE-EXT-A -j KUBE-SVC-A
KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
KUBE-POSTROUTING -j MARK --xor-mark 0x4000
KUBE-POSTROUTING -j MASQUERADE
KUBE-SEP-A -s {POD}/32 -j KUBE-MARK-MASQ
KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination {POD}:22
KUBE-SERVICES -d {VIP}/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-A
KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
KUBE-SVC-A ! -s {NET} -d {VIP}/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ
KUBE-SVC-A -j KUBE-SEP-A
"""
KUBE_FILTER = f"""
INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
INPUT -j KUBE-FIREWALL
FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL
FORWARD -j KUBE-FORWARD
FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
OUTPUT -j KUBE-FIREWALL
KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack \
! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
KUBE-FORWARD {INVALID}
KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
KUBE-FORWARD {EST}
KUBE-SERVICES -d 10.96.0.11/32 -p tcp -m tcp --dport 8063 -j REJECT
"""
KUBE_NFT = f"""table ip kube-proxy {{
set cluster-ips {{ type ipv4_addr; elements = {{ {VIP}, 10.96.0.11 }} ; }}
set nodeport-ips {{ type ipv4_addr; elements = {{ {HOST}, {GATE} }} ; }}
chain reject-chain {{
reject
}}
chain mark-for-masquerade {{
meta mark set meta mark | 0x4000
}}
chain endpoint-A {{
ip saddr {POD} jump mark-for-masquerade
meta l4proto tcp dnat to {POD}:22
}}
chain service-A {{
ip daddr {VIP} tcp dport 80 ip saddr != {NET} jump mark-for-masquerade
numgen random mod 1 vmap {{ 0 : goto endpoint-A }}
}}
chain external-A {{
jump mark-for-masquerade
goto service-A
}}
map no-endpoint {{
type ipv4_addr . inet_proto . inet_service : verdict
elements = {{ 10.96.0.11 . tcp . 8063 : goto reject-chain }}
}}
map service-ips {{
type ipv4_addr . inet_proto . inet_service : verdict
elements = {{ {VIP} . tcp . 80 : goto service-A }}
}}
map service-nodeports {{
type inet_proto . inet_service : verdict
elements = {{ tcp . {NODE} : goto external-A }}
}}
chain endpoints-check {{
ip daddr . meta l4proto . th dport vmap @no-endpoint
}}
chain cluster-ips-check {{
ip daddr @cluster-ips reject
ip daddr 10.96.0.0/24 drop
}}
chain services {{
ip daddr . meta l4proto . th dport vmap @service-ips
ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
}}
chain filter-input {{
type filter hook input priority -110; policy accept;
ct state new jump endpoints-check
}}
chain filter-forward {{
type filter hook forward priority -110; policy accept;
ct state new jump endpoints-check
ct state new jump cluster-ips-check
}}
chain filter-output {{
type filter hook output priority -110; policy accept;
ct state new jump endpoints-check
}}
chain filter-output-post-dnat {{
type filter hook output priority -90; policy accept;
ct state new jump cluster-ips-check
}}
chain nat-prerouting {{
type nat hook prerouting priority dstnat; policy accept;
jump services
}}
chain nat-output {{
type nat hook output priority -100; policy accept;
jump services
}}
chain nat-postrouting {{
type nat hook postrouting priority srcnat; policy accept;
meta mark & 0x4000 == 0 return
meta mark set meta mark ^ 0x4000
masquerade fully-random
}}
}}
"""
CALICO_FILTER = f"""
INPUT -j cali-INPUT
FORWARD -j cali-FORWARD
FORWARD -m mark --mark 0x10000/0x10000 -j ACCEPT
cali-FORWARD -j MARK --set-xmark 0x0/0xe0000
cali-FORWARD -i {BR} -g cali-fw-1
cali-FORWARD -o {BR} -g cali-tw-1
cali-INPUT -i {BR} -j ACCEPT
cali-INPUT -j MARK --set-xmark 0x0/0xf0000
cali-INPUT -j cali-from-hep
cali-INPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
cali-from-hep -i {EXT} -g cali-fh-eth
cali-tw-1 {EST}
cali-tw-1 {INVALID}
cali-tw-1 -j MARK --set-xmark 0x0/0x10000
cali-tw-1 -p tcp -m multiport --dports 80,8063 -j MARK --set-xmark 0x10000/0x10000
cali-tw-1 -m mark --mark 0x10000/0x10000 -j RETURN
cali-tw-1 -j DROP
cali-fw-1 {EST}
cali-fw-1 {INVALID}
cali-fw-1 -j MARK --set-xmark 0x10000/0x10000
cali-fh-eth {EST}
cali-fh-eth {INVALID}
cali-fh-eth -p tcp -m multiport --dports 80,8063 -j MARK --set-xmark 0x10000/0x10000
cali-fh-eth -m mark --mark 0x10000/0x10000 -j RETURN
cali-fh-eth -p icmp -j ACCEPT
cali-fh-eth -j DROP
"""
CALICO_RAW = f"""
PREROUTING -j cali-PREROUTING
OUTPUT -j cali-OUTPUT
cali-PREROUTING -j MARK --set-xmark 0x0/0xf0000
cali-PREROUTING -i {BR} -j MARK --set-xmark 0x40000/0x40000
cali-PREROUTING -m mark --mark 0x40000/0x40000 -m rpfilter --validmark --invert -j DROP
cali-OUTPUT -j MARK --set-xmark 0x0/0xf0000
"""
FLANNEL_NAT = f"""
POSTROUTING -j FLANNEL-POSTRTG
FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN
FLANNEL-POSTRTG ! -s 10.77.4.0/23 -d {NET} -j RETURN
FLANNEL-POSTRTG -s 10.77.4.0/23 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
"""
FLANNEL_FILTER = """
FORWARD -j FLANNEL-FWD
FLANNEL-FWD -s 10.77.4.0/23 -j ACCEPT
FLANNEL-FWD -d 10.77.4.0/23 -j ACCEPT
"""
ISTIO = """
PREROUTING -p tcp -j ISTIO_INBOUND
OUTPUT -p tcp -j ISTIO_OUTPUT
ISTIO_INBOUND -p tcp -m tcp --dport 22 -j RETURN
ISTIO_INBOUND -p tcp -m tcp --dport 8063 -j RETURN
ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 9063
ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN
ISTIO_OUTPUT -o lo -m owner ! --uid-owner 1337 -j RETURN
ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
ISTIO_OUTPUT -j ISTIO_REDIRECT
ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 9063
"""

# ---- firewalls -----------------------------------------------------------------------------

FIREWALLD = f"""table inet firewalld {{
chain public_allow {{
tcp dport 22 accept
ip saddr 10.77.1.0/24 tcp dport 8063 accept
ip6 saddr fd77:1::/64 tcp dport 8063 accept
}}
chain in_public {{
jump public_allow
{ICMP}
reject with icmpx admin-prohibited
}}
chain in_internal {{
tcp dport {{ 22, 8063 }} ct state {{ new, untracked }} accept
{ICMP}
reject with icmpx admin-prohibited
}}
chain forward_public {{
reject with icmpx admin-prohibited
}}
chain forward_internal {{
oifname "{EXT}" accept
reject with icmpx admin-prohibited
}}
chain input_zones {{
iifname vmap {{ "{EXT}" : goto in_public, "{BR}" : goto in_internal }}
goto in_public
}}
chain forward_zones {{
iifname "{BR}" goto forward_internal
goto forward_public
}}
chain filter_PREROUTING {{
type filter hook prerouting priority filter + 10; policy accept;
icmpv6 type {{ nd-router-advert, nd-neighbor-solicit }} accept
meta nfproto ipv6 fib saddr . mark . iif oif missing drop
}}
chain filter_INPUT {{
type filter hook input priority filter + 10; policy accept;
ct state {{ established, related }} accept
ct status dnat accept
iifname "lo" accept
ct state invalid drop
jump input_zones
reject with icmpx admin-prohibited
}}
chain filter_FORWARD {{
type filter hook forward priority filter + 10; policy accept;
ct state {{ established, related }} accept
ct status dnat accept
ct state invalid drop
jump forward_zones
reject with icmpx admin-prohibited
}}
chain filter_OUTPUT {{
type filter hook output priority filter + 10; policy accept;
ct state {{ established, related }} accept
oifname "lo" accept
}}
chain nat_POSTROUTING {{
type nat hook postrouting priority srcnat + 10; policy accept;
iifname "{BR}" oifname "{EXT}" meta nfproto ipv4 masquerade
}}
}}
"""
SHOREWALL = f"""
INPUT -i {EXT} -j net-fw
INPUT -i {BR} -j loc-fw
INPUT -i lo -j ACCEPT
INPUT -j reject
FORWARD -i {EXT} -o {BR} -j net-loc
FORWARD -i {BR} -o {EXT} -j loc-net
FORWARD -j reject
OUTPUT -o {EXT} -j fw-net
OUTPUT -o {BR} -j ACCEPT
OUTPUT -o lo -j ACCEPT
OUTPUT -j reject
net-fw -m conntrack --ctstate NEW,INVALID,UNTRACKED -j dynamic
net-fw -p tcp -j tcpflags
net-fw {EST}
net-fw -p icmp -j ACCEPT
net-fw {SERVE} -j ACCEPT
net-fw -j DROP
loc-fw {EST}
loc-fw -j ACCEPT
fw-net {EST}
fw-net -p icmp -j ACCEPT
fw-net {SERVE} -j ACCEPT
fw-net -j DROP
net-loc -p tcp -j tcpflags
net-loc {EST}
net-loc -p icmp -j ACCEPT
net-loc {SERVE} -j ACCEPT
net-loc -j DROP
loc-net {EST}
loc-net -j ACCEPT
reject -p tcp -j REJECT --reject-with tcp-reset
reject -j REJECT
tcpflags -p tcp -m tcp --tcp-flags FIN,SYN,RST,PSH,ACK,URG FIN,PSH,URG -j DROP
tcpflags -p tcp -m tcp --tcp-flags FIN,SYN FIN,SYN -j DROP
"""
FIREHOL = f"""
INPUT -i lo -j ACCEPT
OUTPUT -o lo -j ACCEPT
INPUT -p icmp -j ACCEPT
OUTPUT -p icmp -j ACCEPT
INPUT -i {EXT} -j in_world
OUTPUT -o {EXT} -j out_world
in_world {SERVE} -m conntrack --ctstate NEW,ESTABLISHED -j ACCEPT
out_world -p tcp -m tcp --sport 8063 -m conntrack --ctstate ESTABLISHED -j ACCEPT
out_world -p tcp -m tcp --sport 32768:60999 --dport 8063 -m conntrack \
--ctstate NEW,ESTABLISHED -j ACCEPT
in_world -p tcp -m tcp --sport 8063 --dport 32768:60999 -m conntrack --ctstate ESTABLISHED -j ACCEPT
in_world -m conntrack --ctstate RELATED -j ACCEPT
in_world -j DROP
out_world -m conntrack --ctstate RELATED -j ACCEPT
out_world -j DROP
"""
CSF = f"""
INPUT ! -i lo -j LOCALINPUT
INPUT -i lo -j ACCEPT
INPUT ! -i lo -p tcp -j INVALID
INPUT ! -i lo {EST}
INPUT ! -i lo -p tcp -m conntrack --ctstate NEW -m tcp --dport 8063 -j ACCEPT
INPUT ! -i lo -p icmp -j ACCEPT
INPUT ! -i lo -j DROP
OUTPUT -o lo -j ACCEPT
OUTPUT ! -o lo -p tcp -j INVALID
OUTPUT ! -o lo {EST}
OUTPUT ! -o lo -p tcp -m conntrack --ctstate NEW -m tcp --dport 8063 -j ACCEPT
OUTPUT ! -o lo -p icmp -j ACCEPT
OUTPUT ! -o lo -j REJECT
INVALID -m conntrack --ctstate INVALID -j INVDROP
INVALID -p tcp -m tcp --tcp-flags SYN,RST SYN,RST -j INVDROP
INVALID -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack --ctstate NEW -j INVDROP
INVDROP -j DROP
LOCALINPUT ! -i lo -j ALLOWIN
LOCALINPUT -s 10.77.1.100/32 ! -i lo -j DROP
ALLOWIN -s {POD}/32 ! -i lo -j ACCEPT
"""
FW4 = f"""table inet fw4 {{
chain handle_reject {{
meta l4proto tcp reject with tcp reset
reject with icmpx type port-unreachable
}}
chain accept_to_wan {{
meta nfproto ipv4 oifname "{EXT}" ct state invalid counter drop
oifname "{EXT}" accept
}}
chain input_wan {{
{ICMP}
tcp dport 8063 counter accept
ct status dnat accept
jump handle_reject
}}
chain forward_wan {{
{ICMP}
ct status dnat accept
jump handle_reject
}}
chain input {{
type filter hook input priority filter; policy drop;
iifname "lo" accept
ct state vmap {{ established : accept, related : accept }}
iifname "{BR}" accept
iifname "{EXT}" jump input_wan
jump handle_reject
}}
chain forward {{
type filter hook forward priority filter; policy drop;
ct state vmap {{ established : accept, related : accept }}
iifname "{BR}" jump accept_to_wan
iifname "{EXT}" jump forward_wan
jump handle_reject
}}
chain output {{
type filter hook output priority filter; policy accept;
oifname "lo" accept
ct state vmap {{ established : accept, related : accept }}
oifname "{EXT}" jump accept_to_wan
}}
chain dstnat {{
type nat hook prerouting priority dstnat; policy accept;
iifname "{EXT}" meta nfproto ipv4 tcp dport 7063 counter dnat ip to {POD}:22
}}
chain srcnat {{
type nat hook postrouting priority srcnat; policy accept;
oifname "{EXT}" meta nfproto ipv4 masquerade
}}
}}
"""
VYOS = f"""table ip vyos_conntrack {{
chain FW_CONNTRACK {{
accept
}}
chain PREROUTING {{
type filter hook prerouting priority raw; policy accept;
counter jump FW_CONNTRACK
notrack
}}
chain OUTPUT {{
type filter hook output priority raw; policy accept;
counter jump FW_CONNTRACK
notrack
}}
}}
table ip vyos_filter {{
chain STATE_POLICY {{
ct state {{ established, related }} accept
ct state invalid drop
return
}}
chain INPUT_filter {{
type filter hook input priority filter; policy accept;
jump STATE_POLICY
iifname "lo" accept
meta l4proto icmp accept
iifname "{EXT}" tcp dport 8063 counter accept
counter drop
}}
chain FORWARD_filter {{
type filter hook forward priority filter; policy accept;
jump STATE_POLICY
tcp dport 8063 accept
counter drop
}}
}}
"""
WG_QUICK = f"""table ip wg-quick-wg0 {{
chain preraw {{
type filter hook prerouting priority raw; policy accept;
iifname != "{BR}" ip daddr {GATE} fib saddr type != local drop
}}
chain premangle {{
type filter hook prerouting priority mangle; policy accept;
meta l4proto udp meta mark set ct mark
}}
chain postmangle {{
type filter hook postrouting priority mangle; policy accept;
meta l4proto udp meta mark 0xca6c ct mark set meta mark
}}
}}
"""
TAILSCALE_MANGLE = """
PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j CONNMARK --restore-mark \
--nfmask 0xff0000 --ctmask 0xff0000
OUTPUT -m conntrack --ctstate NEW -m mark ! --mark 0x0/0xff0000 -j CONNMARK --save-mark \
--nfmask 0xff0000 --ctmask 0xff0000
"""
TAILSCALE_FILTER = f"""
INPUT -j ts-input
FORWARD -j ts-forward
ts-input -s {GATE}/32 -i lo -j ACCEPT
ts-input -s {NET} ! -i {BR} -j DROP
ts-input -i {BR} -j ACCEPT
ts-input -p udp -m udp --dport 41641 -j ACCEPT
ts-forward -i {BR} -j MARK --set-xmark 0x40000/0xff0000
ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT
ts-forward -s {NET} -o {BR} -j DROP
ts-forward -o {BR} -j ACCEPT
"""
TAILSCALE_NAT = """
POSTROUTING -j ts-postrouting
ts-postrouting -m mark --mark 0x40000/0xff0000 -j MASQUERADE
"""
FAIL2BAN = """table inet f2b-table {
set addr-set-sshd { type ipv4_addr; elements = { 10.77.1.100, 198.51.100.3 } ; }
chain f2b-chain {
type filter hook input priority filter - 1; policy accept;
tcp dport { 22, 8063 } ip saddr @addr-set-sshd reject with icmp port-unreachable
}
}
"""

STRUCTURES: Final = (
    Structure("docker", ("server",), v4(
        "nft", table("raw", DOCKER_RAW), table("nat", DOCKER_NAT),
        table("filter", DOCKER_FILTER, FORWARD="DROP")), common=True),
    Structure("kube-proxy nftables", ("server",), nft(KUBE_NFT), common=True),
    Structure("firewalld zones", ("server",), nft(FIREWALLD), common=True),
    Structure("ufw", ("client",), ufw("plain"), common=True),
    Structure("tailscale", ("server", "loopback"), v4(
        "nft", table("mangle", TAILSCALE_MANGLE), table("filter", TAILSCALE_FILTER),
        table("nat", TAILSCALE_NAT)), common=True),
    Structure("calico", ("server",), both(
        "legacy", table("raw", CALICO_RAW), table("filter", CALICO_FILTER, FORWARD="DROP")),
        common=True),
    Structure("docker legacy, its own port", ("server", "forward"), v4(
        "legacy", table("nat", DOCKER_NAT.replace("7063", "8063")),
        table("filter", DOCKER_FILTER, FORWARD="DROP")), harmless=False),
    Structure("docker nftables", ("server", "loopback"), nft(DOCKER_NFT)),
    Structure("netavark", ("server",), nft(NETAVARK), harmless=False),
    Structure("libvirt", ("loopback",), nft(LIBVIRT)),
    Structure("kube-proxy iptables", ("server",), v4(
        "legacy", table("nat", KUBE_NAT), table("filter", KUBE_FILTER))),
    Structure("flannel", ("server",), v4(
        "nft", table("nat", FLANNEL_NAT), table("filter", FLANNEL_FILTER, FORWARD="DROP"))),
    Structure("istio", ("server",), v4("nft", table("nat", ISTIO)), harmless=False),
    Structure("shorewall", ("server", "forward"), both(
        "nft", table("filter", SHOREWALL, INPUT="DROP", FORWARD="DROP", OUTPUT="DROP"))),
    Structure("firehol", ("client",), both(
        "nft", table("filter", FIREHOL, INPUT="DROP", OUTPUT="DROP"))),
    Structure("csf", ("server",), both(
        "legacy", table("filter", CSF, INPUT="DROP", FORWARD="DROP", OUTPUT="DROP"))),
    Structure("fw4", ("server",), nft(FW4), harmless=False),
    Structure("vyos", ("server",), nft(VYOS)),
    Structure("wg-quick", ("server", "client"), nft(WG_QUICK), proto="udp"),
    Structure("ufw and fail2ban", ("server",), (*ufw("allow", "legacy"), *nft(FAIL2BAN))),
    Structure("tailscale and firewalld", ("client",), (*v4(
        "nft", table("filter", TAILSCALE_FILTER)), *firewalld("plain"))),
)  # fmt: skip
