"""The rules of firewalls for hosts and routers."""

from __future__ import annotations

from kit.rulesets.tool.words import BR, EST, EXT, GATE, ICMP, NET, POD, SERVE

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
