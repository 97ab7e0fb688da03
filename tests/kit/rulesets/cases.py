"""Rulesets, each with what NOTRACK for port 8063 would meet there."""

from __future__ import annotations

from dataclasses import dataclass

from kit.rulesets.texts import (
    EST,
    LO,
    NAT_DROP_IN,
    ND,
    PING,
    STRICT,
    XT_EST,
    XT_ICMP,
    XT_ICMP6,
    XT_LO,
    Setup,
    chain,
    docker,
    egress,
    firewalld,
    fw,
    kube,
    nft,
    ufw,
    xt,
    xt_both,
    xt_filter,
)

SAFE, RULES, UNSAFE = "safe", "safe-with-rules", "unsafe"


@dataclass(frozen=True)
class Case:
    """A ruleset and what is expected of the verdict and of reality."""

    name: str
    role: str
    setup: Setup
    verdict: str
    breaks: bool
    """Whether NOTRACK without the tool's accepts and ICMP rules really does harm."""
    proto: str = "tcp"
    reason: str = ""
    """A word that the reasons must have."""
    stays: bool = False
    """Whether entries are made under NOTRACK all the same, which is why it is not proposed."""


def iptables_cases(variant: str) -> tuple[Case, ...]:
    """The same through iptables-nft and iptables-legacy, IPv4 and IPv6."""
    v = variant
    accept = "-A INPUT -p tcp --dport 8063 -j ACCEPT\n"
    new = "-A INPUT -p tcp --dport 8063 -m conntrack --ctstate NEW -j ACCEPT\n"
    web = (
        "-N web\n-A INPUT -p tcp -m multiport --dports 80,8063 -j web\n"
        "-A web -m state --state NEW -j ACCEPT\n-A INPUT -j DROP\n"
    )
    out = (
        "-A OUTPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n"
        "-A OUTPUT -o lo -j ACCEPT\n"
    )
    out6 = "-A OUTPUT -p ipv6-icmp -j ACCEPT\n"
    limit = "-A INPUT -p tcp --syn --dport 8063 -m connlimit --connlimit-above 100 -j REJECT\n"
    mark = "-A PREROUTING -j CONNMARK --restore-mark\n-A OUTPUT -j CONNMARK --restore-mark\n"
    half = (
        "*raw\n-A OUTPUT -p tcp --sport 8063 -j CT --notrack\nCOMMIT\n"
        "*filter\n-A INPUT -m conntrack --ctstate INVALID\nCOMMIT\n"
    )
    zone = (
        "*raw\n-A PREROUTING -p tcp --dport 8063 -j CT --zone 3\n"
        "-A OUTPUT -p tcp --sport 8063 -j CT --zone 3\nCOMMIT\n"
        "*filter\n-A INPUT -m conntrack --ctstate INVALID\nCOMMIT\n"
    )
    proxy = (
        "*raw\n-A PREROUTING -i to-r2 -p tcp --syn --dport 8063 -j CT --notrack\nCOMMIT\n"
        "*filter\n-A INPUT -i to-r2 -p tcp --dport 8063 -m conntrack --ctstate INVALID,UNTRACKED "
        "-j SYNPROXY --sack-perm --timestamp --wscale 7 --mss 1220\n"
        "-A INPUT -m conntrack --ctstate INVALID -j DROP\nCOMMIT\n"
    )
    base = XT_EST + XT_LO
    lan = "-A INPUT -i to-r2 {} -p tcp --dport 8063 -m conntrack --ctstate NEW -j ACCEPT\n"
    one = xt(
        v,
        xt_filter(base + XT_ICMP + lan.format("-s 10.77.1.1")),
        xt_filter(base + XT_ICMP6 + lan.format("-s fd77:1::1")),
    )
    found = (
        ("one interface, one source", one, RULES, True, ""),
        ("stateless accept", xt_both(v, base, accept), SAFE, False, ""),
        ("new only", xt_both(v, base, new), RULES, True, ""),
        ("multiport, user chain", xt_both(v, base, web, inp="ACCEPT"), RULES, True, ""),
        ("established output", xt_both(v, base, accept + out, out6, out="DROP"), RULES, True, ""),
        ("connlimit", xt_both(v, limit, inp="ACCEPT"), UNSAFE, False, "limit"),
        ("connmark", xt(v, f"*mangle\n{mark}COMMIT\n"), SAFE, False, ""),
        ("half a pair already", xt(v, half), SAFE, False, "one direction"),
        ("zone by template", xt(v, zone), SAFE, False, ""),
        ("SYNPROXY", (STRICT, *xt(v, proxy)), UNSAFE, True, "SYNPROXY"),
    )
    return tuple(
        Case(f"iptables-{v}: {name}", "server", setup, verdict, breaks, reason=reason)
        for name, setup, verdict, breaks, reason in found
    )


CASES: tuple[Case, ...] = (
    # ---- server, nftables -------------------------------------------------------
    Case("nft: no decision", "server", fw(chain("input", "ct state invalid counter")), SAFE, False),
    Case("nft: stateless accept", "server", NAT_DROP_IN, SAFE, False),
    Case("nft: new only", "server",
         fw(chain("input", EST + LO + PING + "ct state new tcp dport 8063 accept", "drop")),
         RULES, True),
    Case("nft: reject at the end", "server",
         fw(chain("input", EST + LO + PING + "ct state new tcp dport 8063 accept\nreject")),
         RULES, True),
    Case("nft: new, untracked", "server",
         fw(chain("input", EST + LO + PING + "ct state { new, untracked } tcp dport 8063 accept",
                  "drop")),
         SAFE, False),
    Case("nft: anything but est, rel, new drops", "server",
         fw(chain("input", "ct state != { established, related, new } drop\n" + EST + LO + PING
                  + "tcp dport 8063 accept", "drop")),
         RULES, True),
    Case("nft: SYN only", "server",
         fw(chain("input", EST + LO + PING
                  + "tcp flags & (fin|syn|rst|ack) == syn tcp dport 8063 accept", "drop")),
         RULES, True),
    Case("nft: vmap", "server",
         fw(chain("input", "ct state vmap { established : accept, related : accept, "
                  "invalid : drop }\n" + LO + PING + "tcp dport 8063 accept", "drop")),
         SAFE, True, reason="path MTU"),
    Case("nft: state and interface at once", "server",
         fw("chain web {\ntcp dport 8063 accept\n}\n", chain("input", (
             LO + PING + "ct state . iifname vmap { established . to-r2 : accept, "
             "established . to-s : accept, new . to-r2 : jump web, new . to-s : jump web }"),
             "drop")),
         RULES, True),
    Case("nft: invalid drop, then icmp", "server",
         fw(chain("input", "tcp dport 22 ct state new ct count over 900 drop\n" + EST + LO
                  + "ct state invalid drop\n" + PING + "tcp dport 8063 accept", "drop")),
         SAFE, True, reason="path MTU"),
    Case("nft: related only, no icmp accept", "server",
         fw(chain("input", EST + LO + ND + "tcp dport 8063 accept", "drop")), RULES, True),
    Case("nft: established output", "server",
         fw(chain("input", EST + LO + PING + "tcp dport 8063 accept", "drop"),
            chain("output", EST + 'oif "lo" accept\n' + PING, "drop")),
         RULES, True),
    Case("nft: jump to a services chain", "server",
         fw(chain("input", "jump base\njump services\nreject"), extra=(
             f"chain base {{ {EST}{LO}ct state invalid drop\n{PING} }}\n"
             "chain services { ct state new tcp dport { 22, 8063 } jump allow\n }\n"
             "chain allow { counter accept\n }\n")),
         RULES, True),
    Case("nft: named set of devices and ports", "server",
         fw(chain("input", EST + LO + PING + "ct state new iifname . tcp dport @open accept",
                  "drop"),
            extra='set open { type ifname . inet_service; elements = { "to-r2" . 8063 } }\n'),
         RULES, True),
    Case("nft: two tables, both decide", "server",
         nft("table inet a { chain input { type filter hook input priority -10; policy drop;\n"
             + EST + LO + PING + "ct state new tcp dport 8063 accept\n}\n}\n"
             "table inet b { chain input { type filter hook input priority 10; policy drop;\n"
             + EST + LO + PING + "ct state new tcp dport 8063 accept\n}\n}\n"),
         RULES, True),
    Case("nft: v4 open, v6 new only", "server",
         nft("table ip fw { chain input { type filter hook input priority 0; "
             "ct state invalid counter\n}\n}\n"
             "table ip6 fw { chain input { type filter hook input priority 0; policy drop;\n"
             + EST + LO + PING.split("\n")[1] + "\nct state new tcp dport 8063 accept\n}\n}\n"),
         RULES, True),
    Case("nft: drop in prerouting", "server",
         fw(chain("prerouting", EST + PING + "ct state new tcp dport { 8063 } accept\n" + LO,
                  "drop", "mangle"),
            chain("output", "ct state invalid counter")),
         RULES, True),
    Case("nft: one source only", "server",
         fw(chain("input", EST + LO + PING + "ct state new ip saddr 10.77.1.1 tcp dport 8063 "
                  "accept\nct state new ip6 saddr fd77:1::1 tcp dport 8063 accept", "drop")),
         RULES, True),
    Case("nft: one interface, one source, output by state", "server",
         fw(chain("input", EST + LO + PING + 'iifname "to-r2" jump lan', "drop"),
            chain("output", EST + LO.replace("iif", "oif") + PING, "drop"),
            extra="chain lan { ct state new ip saddr 10.77.1.0/26 tcp dport 8063 accept\n"
                  "ct state new ip6 saddr fd77:1::1 tcp dport 8063 accept\n }\n"),
         RULES, True),
    Case("nft: all untracked accepted, one source", "server",
         fw(chain("input", EST + LO + PING + "ct state untracked accept\nct state new ip saddr "
                  "10.77.1.1 tcp dport 8063 accept\nip6 saddr fd77:1::1 tcp dport 8063 accept",
                  "drop")),
         UNSAFE, True, reason="gets through"),
    Case("nft: stateless, one source", "server",
         fw(chain("input", "tcp flags syn tcp dport 8063 limit rate over 400000/second drop\n" + EST
                  + LO + PING + "ip saddr 10.77.1.1 tcp dport 8063 accept\n"
                  "ip6 saddr fd77:1::1 tcp dport 8063 accept", "drop")),
         SAFE, False),
    Case("nft: rate limit on new", "server",
         fw(chain("input", EST + LO + PING + "ct state new tcp dport 8063 limit rate 100/second "
                  "burst 50 packets accept", "drop")),
         UNSAFE, True),
    Case("nft: a length behind a limit that is never reached", "server",
         fw(chain("output", "limit rate over 400000/second drop\n" + EST
                  + "meta length > 1000 drop")),
         UNSAFE, True),
    Case("nft: connection limit", "server",
         fw(chain("input", "tcp dport 8063 ct state new add @many { ip saddr ct count over 100 } "
                  "reject\ntcp dport 8063 ct state new add @many6 { ip6 saddr ct count over 100 } "
                  "reject"),
            extra="set many { type ipv4_addr; flags dynamic; }\n"
                  "set many6 { type ipv6_addr; flags dynamic; }\n"),
         UNSAFE, False, reason="many"),
    Case("nft: mark kept in entries", "server",
         fw(chain("prerouting", "ct mark set 7", priority="mangle"),
            chain("output", "meta mark set ct mark", priority="mangle").replace(
                "type filter", "type route")),
         SAFE, False),
    *(
        Case(f"nft: zone forced at {priority}", "server",
             fw(chain("prerouting", "ct zone set 3", priority=priority),
                chain("output", "ct zone set 3", priority=priority),
                chain("input", "ct state invalid counter")),
             SAFE, False, reason="no effect", stays=True)
        for priority in ("-350", "-310", "-300")
    ),
    Case("nft: untracked drops, at our priority", "server",
         fw(chain("prerouting", "ct state untracked tcp dport 8063 drop", priority="-310"),
            chain("input", "ct state invalid counter")),
         RULES, True),
    Case("nft: untracked drops, just before us", "server",
         fw(chain("prerouting", "ct state untracked tcp dport 8063 drop", priority="-311"),
            chain("input", "ct state invalid counter")),
         RULES, True),
    Case("nft: SYNPROXY", "server",
         (STRICT, *fw(
             chain("prerouting", 'iifname "to-r2" tcp dport 8063 tcp flags syn notrack',
                   priority="raw"),
             chain("input", 'iifname "to-r2" tcp dport 8063 ct state invalid,untracked synproxy '
                   "mss 1220 wscale 7 timestamp sack-perm\nct state invalid drop"))),
         UNSAFE, True, reason="SYNPROXY"),
    Case("nft: half a pair already", "server",
         fw(chain("prerouting", "tcp dport 8063 notrack", priority="raw"),
            chain("input", "ct state invalid counter"),
            chain("output", "ct state invalid counter")),
         SAFE, False, reason="one direction"),
    Case("nft: redirect to another port", "server",
         nft("table inet n { chain pre { type nat hook prerouting priority -100;\n"
             "tcp dport 8063 redirect to :9063\n}\n}\n"),
         UNSAFE, True, reason="translate"),
    Case("nft: redirected to it", "server",
         nft("table inet n { chain pre { type nat hook prerouting priority -100;\n"
             "tcp dport 7063 redirect to :8063\n}\n}\n"),
         SAFE, False, reason="translated"),
    Case("nft: dnat away", "server",
         nft("table inet n { chain pre { type nat hook prerouting priority -100;\n"
             "tcp dport 8063 dnat ip to 10.77.4.2:8063\n}\n"
             "chain post { type nat hook postrouting priority 100;\n"
             "ip daddr 10.77.4.2 masquerade\n}\n}\n"),
         UNSAFE, True, reason="translate"),
    Case("nft: interface and new", "server",
         fw(chain("input", EST + LO + PING
                  + 'iifname "to-r2" ct state new tcp dport 8063 accept', "drop")),
         RULES, True),
    Case("nft: local checks, output by state", "server",
         fw(chain("input", EST + PING + "tcp dport 8063 accept\nct state new iif lo accept",
                  "drop")),
         RULES, True),
    Case("nft: masquerading draws ports by lot, as for a node port", "server",
         nft("table ip n { chain post { type nat hook postrouting priority 100;\n"
             'oifname "to-r2" masquerade fully-random\n}\n}\n'),
         SAFE, False, reason="keep them tracked"),
    # ---- server, iptables -------------------------------------------------------
    *iptables_cases("nft"),
    *iptables_cases("legacy"),
    # The answer of a REJECT goes through the same chains as what it is about.
    Case("iptables-legacy: output ends in a reject", "server",
         xt_both("legacy", XT_EST + XT_LO,
                 "-A INPUT -p tcp --dport 8063 -j ACCEPT\n-A OUTPUT -o lo -j ACCEPT\n"
                 "-A OUTPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n"
                 "-A OUTPUT -p ipv6-icmp -j ACCEPT\n-A OUTPUT -j REJECT\n"), RULES, True),
    # ---- server, as the tools themselves generate it -----------------------------
    Case("ufw: allow (iptables-nft)", "server", ufw("allow"), SAFE, True, reason="path MTU"),
    Case("ufw: allow (legacy)", "server", ufw("allow", "legacy"), SAFE, True, reason="path MTU"),
    Case("ufw: allow from one source", "server", ufw("allow-from"), SAFE, True,
         reason="path MTU"),
    Case("ufw: limit", "server", ufw("limit"), UNSAFE, True),
    Case("ufw: deny outgoing", "server", ufw("deny-out"), RULES, True),
    Case("firewalld: open port", "server", firewalld("port"), RULES, True, reason="path MTU"),
    Case("firewalld: rich rule, one source", "server", firewalld("rich"), SAFE, True),
    Case("firewalld: forward port", "server", firewalld("forward-port"), UNSAFE, True,
         reason="translate"),
    Case("docker: published on the port", "server", docker(8063, 8063), UNSAFE, True,
         reason="translate"),
    Case("docker: published on another", "server", docker(7063, 80), SAFE, False),
    Case("kube-proxy: node port", "server", kube(8063), UNSAFE, True, reason="translate"),
    Case("kube-proxy: other node port", "server", kube(30063, 80, 8080), SAFE, False),
    # ---- client ------------------------------------------------------------------
    Case("client: calls to others are dropped while new", "client",
         fw(chain("output", "ct state new tcp dport 8063 ip daddr != 10.77.0.0/16 drop"),
            chain("forward", "ct state invalid counter")),
         SAFE, False, reason="servers seen"),
    Case("client: established only (nft)", "client",
         fw(chain("input", EST + LO + PING, "drop")), RULES, True),
    Case("client: established only, invalid drop", "client",
         fw(chain("input", "ct state invalid drop\n" + EST + LO + PING, "drop")), RULES, True),
    *(
        Case(f"client: established only (iptables-{v})", "client",
             xt_both(v, XT_EST + XT_LO), RULES, True)
        for v in ("nft", "legacy")
    ),
    Case("client: output by state", "client",
         fw(chain("input", EST + LO + PING, "drop"),
            chain("output", EST + PING + "oif lo accept\nct state new tcp dport 8063 accept",
                  "drop")),
         RULES, True),
    Case("client: sport accept has a hole", "client",
         fw(chain("input", EST + LO + PING + "ct state untracked tcp sport 8063 accept", "drop")),
         SAFE, False, reason="keep them tracked"),
    Case("client: masquerading gateway", "client",
         nft("table ip n { chain post { type nat hook postrouting priority 100;\n"
             'ip saddr 10.77.4.0/24 oifname "to-r2" masquerade\n}\n}\n'),
         UNSAFE, False, reason="masquerade"),
    Case("client: ufw", "client", ufw("plain"), RULES, True),
    Case("client: ufw (legacy)", "client", ufw("plain", "legacy"), RULES, True),
    Case("client: firewalld", "client", firewalld("plain"), RULES, True),
    Case("client: output DNAT", "client",
         nft("table ip n { chain out { type nat hook output priority -100;\n"
             "ip daddr 10.96.0.10 tcp dport 8063 dnat to 10.77.1.1:8063\n}\n}\n"
             "table ip6 n { chain out { type nat hook output priority -100;\n"
             "tcp dport 8063 dnat to [fd77:1::1]:8063\n}\n}\n"),
         UNSAFE, False, reason="translate"),
    # ---- forwarded ---------------------------------------------------------------
    Case("forward: no decision", "forward",
         fw(chain("forward", "ct state invalid counter")), SAFE, False),
    Case("forward: new only", "forward",
         fw(chain("forward", EST + PING + "ct state new tcp dport 8063 accept", "drop")),
         RULES, True),
    Case("forward: invalid drop", "forward",
         fw(chain("forward", "ct state invalid drop\n" + EST + PING + "tcp dport 8063 accept\n"
                  "tcp sport 8063 tcp flags & (syn|ack) != syn accept", "drop")),
         SAFE, True, reason="path MTU"),
    Case("forward: established back (iptables)", "forward",
         xt("nft", xt_filter("-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
                             "-A FORWARD -p tcp --dport 8063 -j ACCEPT\n", inp="ACCEPT",
                             fwd="DROP")),
         RULES, True),
    Case("forward: ufw routed", "forward", ufw("routed"), RULES, True),
    Case("forward: addresses of no service are refused when new (kube-proxy)", "forward",
         fw(chain("forward", "ct state new ip daddr 10.96.0.0/24 drop"), chain("input", "")),
         SAFE, False, reason="only the servers seen"),
    Case("forward: masquerade", "forward",
         nft("table inet n { chain post { type nat hook postrouting priority 100;\n"
             'oifname "to-s" masquerade\n}\n}\n'),
         UNSAFE, False, reason="translate"),
    Case("forward: backend of a DNAT", "forward", docker(7063, 8063), UNSAFE, False,
         reason="translate"),
    Case("nft: a door for whoever is connected", "server",
         fw(chain("input", "tcp dport 8063 ct state established update @known { ip saddr }\n"
                  + EST + LO + PING + "tcp dport 8063 accept\nip saddr @known tcp dport 22 accept",
                  "drop"),
            extra="set known { type ipv4_addr; flags dynamic,timeout; timeout 1m; }\n"),
         UNSAFE, False, reason="set"),
    # ---- what only shows behind routing ------------------------------------------
    Case("netdev: egress wants the mark of a connection", "server",
         egress("ct state established", "meta mark 0x9 accept\ntcp sport 8063 drop"),
         UNSAFE, True, reason="netdev"),
    Case("netdev: egress drops what is untracked", "server",
         egress("ct state untracked", "meta mark 0x9 drop"), UNSAFE, True, reason="netdev"),
    Case("netdev: egress asks for another mark", "server",
         egress("ct state established", "meta mark 0x7 drop"), SAFE, False),
    Case("nft: a hop limit for what is untracked", "server",
         fw(chain("output", "ct state untracked ip ttl set 1")),
         UNSAFE, True, reason="TTL"),
    # ---- loopback ----------------------------------------------------------------
    Case("loopback: no decision", "loopback",
         fw(chain("input", "ct state invalid counter"), chain("output", "")), SAFE, False),
    Case("loopback: by state", "loopback",
         fw(chain("input", EST + PING + "ct state new tcp dport 8063 accept", "drop")),
         RULES, True),
    Case("loopback: output by state", "loopback",
         fw(chain("input", EST + PING + "iif lo accept", "drop"),
            chain("output", EST + PING + "ct state new tcp dport 8063 accept", "drop")),
         RULES, True),
    Case("loopback: ufw", "loopback", ufw("plain"), SAFE, False),
    # ---- UDP ---------------------------------------------------------------------
    Case("udp server: stateless", "server",
         fw(chain("input", EST + LO + PING + "udp dport 8063 accept", "drop")), SAFE, False,
         "udp"),
    Case("udp server: new only", "server",
         fw(chain("input", EST + LO + PING + "ct state new udp dport 8063 accept", "drop")),
         RULES, True, "udp"),
    Case("udp client: established only", "client",
         fw(chain("input", EST + LO + PING, "drop")), RULES, True, "udp"),
    Case("udp client: ufw", "client", ufw("plain"), RULES, True, "udp"),
)  # fmt: skip
