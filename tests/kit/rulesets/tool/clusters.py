"""The rules of kube-proxy, Calico, flannel and Istio."""

from __future__ import annotations

from kit.rulesets.tool.words import BR, EST, EXT, GATE, HOST, INVALID, NET, NODE, POD, VIP

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
