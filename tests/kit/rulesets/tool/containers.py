"""The rules of Docker, netavark and libvirt."""

from __future__ import annotations

from kit.rulesets.tool.words import BR, EST, NET, POD

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
