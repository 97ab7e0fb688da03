"""What hosts have beside a filter, as small blocks: policy routing, marks, meters, maps, lookups.

Each is common by itself. Some concern the service of :mod:`kit.rulesets.kinds`, most pass it by; a
verdict has to be right either way. :data:`BESIDE` adds some by lot to the other rule sets, and
to the structures of common tools.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from kit.rulesets.beside_xt import xt_filter_rules, xt_mangle_rules, xt_set_rules
from kit.rulesets.drawn_nft import EXT, INT, PORT, Draw
from kit.rulesets.kinds import KINDS, Maker
from kit.rulesets.net import Net
from kit.rulesets.texts import Setup
from kit.rulesets.tool.structures import STRUCTURES
from kit.rulesets.tool.words import HOST, NET, POD, VIP

GATEWAY: Final = ("10.77.3.1", "fd77:3::1")
TABLE: Final = 100
"""Of the policy routes, and their preference."""
BRIDGE: Final = "br9"


def _chain(name: str, hook: str, priority: str, rules: str, kind: str = "filter") -> str:
    return f"chain {name} {{\ntype {kind} hook {hook} priority {priority};\n{rules}\n}}\n"


def _table(name: str, body: str, family: str = "inet") -> Setup:
    return (("nft", f"table {family} {name} {{\n{body}}}\n"),)


def _hook(d: Draw) -> str:
    """Where the service's own packets come by, more often than not."""
    return d.one(d.hook, d.hook, "input", "forward", "output", "prerouting", "postrouting")


# ---- routing --------------------------------------------------------------------------------


def _policy_routing(d: Draw) -> Setup:
    """Replies leave by the line that the question came by: a mark, kept in the entry, routes."""
    by = d.one(
        f'iifname "{EXT}" ct state new ct mark set 0x10',
        f'iifname "{EXT}" ct mark 0 ct mark set 0x10',
        f'ct state new iifname vmap {{ "{EXT}" : jump one, "{INT}" : jump two }}',
        f'iifname "{EXT}" ct mark set mark or 0x10',
        "ct mark set 0x10",
    )  # fmt: skip
    restore = d.one("meta mark set ct mark", "ct mark 0x10 meta mark set 0x10",
                    "ct mark != 0 meta mark set ct mark",
                    "ct direction reply meta mark set ct mark")  # fmt: skip
    jumped = "chain one {\nct mark set 0x10\n}\nchain two {\nct mark set 0x20\n}\n"
    body = (jumped if "jump" in by else "") + _chain("pre", "prerouting", "mangle", (
        f"{by}\n" + d.one("", f'iifname "{INT}" {restore}', restore)).strip())  # fmt: skip
    body += _chain("out", "output", "mangle", restore, "route")
    ways = [f"ip rule add pref {TABLE} fwmark 0x10 lookup {TABLE}",
            f"ip -6 rule add pref {TABLE} fwmark 0x10 lookup {TABLE}"]  # fmt: skip
    ways += [f"ip route add default via {GATEWAY[0]} dev {EXT} table {TABLE}",
             f"ip -6 route add default via {GATEWAY[1]} dev {EXT} table {TABLE}"]  # fmt: skip
    if d.rng.random() < 0.5:  # connected networks as in the main table
        ways += [f"ip route add {NET} dev {INT} table {TABLE}"]
    return (("sh", "\n".join(ways) + "\n"), *_table("pbr", body))


def _strict_reverse_path(d: Draw) -> Setup:
    value = d.one("1", "1", "2")
    names = d.one("all", f"all {EXT} {INT}", EXT)
    lines = [f"echo {value} > /proc/sys/net/ipv4/conf/{name}/rp_filter" for name in names.split()]
    if d.rng.random() < 0.3:
        lines.append("echo 1 > /proc/sys/net/ipv4/conf/all/src_valid_mark")
    return (("sh", "\n".join(lines) + "\n"),)


def _lookups(d: Draw) -> Setup:
    rule = d.one(
        "meta nfproto ipv6 fib saddr . mark . iif oif missing drop",
        "fib saddr . iif oif missing drop", "fib saddr . iif oif 0 drop",
        'fib daddr . iif type != { local, unicast, multicast, broadcast } drop',
        "fib saddr type { broadcast, multicast } drop", "fib saddr oif 0 counter",
        f'iifname "{EXT}" fib daddr type local counter',
        f'iifname "{EXT}" ip saddr {{ 10.77.4.0/24, 127.0.0.0/8 }} drop',
    )  # fmt: skip
    return _table("reverse", _chain("pre", "prerouting", d.one("raw", "mangle", "-310", "-299"),
                                    rule))  # fmt: skip


# ---- tracking -----------------------------------------------------------------------------


def _own_notrack(d: Draw) -> Setup:
    """Notrack by others, whole pairs and halves."""
    near, far = d.one(
        ("iif lo", "oif lo"), (f"{d.proto} dport 22", f"{d.proto} sport 22"),
        ("udp dport 53", "udp sport 53"), ("ip saddr 10.77.1.100", "ip daddr 10.77.1.100"),
        (f"ip daddr {VIP}", f"ip saddr {VIP}"), (f'iifname "{INT}" udp dport 4789', ""),
        (f"{d.proto} dport {PORT} ip saddr 10.77.1.100", ""),
        ("meta l4proto icmp", "meta l4proto icmp"),
    )  # fmt: skip
    body = _chain("pre", "prerouting", "raw", f"{near} notrack")
    if far:
        body += _chain("out", "output", "raw", f"{far} notrack")
    return _table("untracked", body)


def _states(d: Draw) -> Setup:
    """Odd questions about an entry, in a chain that lets everything else pass."""
    rule = d.one(
        "ct state invalid drop", "ct state invalid counter",
        "ct state new tcp flags & (fin|syn|rst|ack) != syn drop",
        "tcp flags & (fin|syn|rst|psh|ack|urg) == 0x0 drop",
        "tcp flags & (syn|fin) == (syn|fin) drop",
        f"meta l4proto {d.proto} ct original proto-dst {PORT} counter",
        "ct original ip saddr 192.0.2.0/24 drop",
        f"ct original ip daddr != {HOST} counter", "ct direction reply counter",
        "ct status expected counter", "ct status dnat accept", "ct status assured counter",
        'ct helper "ftp" accept', "ct state untracked counter", "ct state related counter accept",
        f"meta l4proto {d.proto} ct reply proto-src {PORT} counter", "ct bytes > 100000000 drop",
        "ct packets < 3 counter", "ct label 5 counter", "ct id 0 counter",
        f"{d.proto} dport {PORT} ct state new counter", "ct state established accept",
        "meta l4proto tcp ct state { new } tcp flags ! syn counter",
    )  # fmt: skip
    return _table("states", _chain("odd", _hook(d), d.one("-150", "-5", "5", "50"), rule))


def _expecting(d: Draw) -> Setup:
    port = d.one("21", "5060", "69")
    body = ("ct expectation more {\nprotocol tcp\ndport 9876\ntimeout 2m\nsize 8\nl3proto ip\n}\n"
            + _chain("want", "prerouting", "filter", f"tcp dport {port} ct state new ct "
                     "expectation set more"))  # fmt: skip
    if d.rng.random() < 0.5:
        body = ('ct helper std {\ntype "ftp" protocol tcp\n}\n'
                + _chain("help", d.one("prerouting", "output"), "filter",
                         f'tcp dport {port} ct helper set "std"'))  # fmt: skip
    return _table("helpers", body)


# ---- limits -------------------------------------------------------------------------------


def _meters(d: Draw) -> Setup:
    service = d.one(f"{d.proto} dport {PORT} ", f"{d.proto} dport {PORT} ct state new ", "",
                    "tcp dport 22 ct state new ")  # fmt: skip
    rule, kept = d.one(
        ("add @m { ip saddr limit rate over 900/second burst 900 packets } drop", "dynamic"),
        ("update @m { ip saddr timeout 1m limit rate over 900/second burst 900 packets } drop",
         "dynamic,timeout"),
        ("update @m { ip saddr timeout 1m }", "dynamic,timeout"),
        ("add @m { ip saddr ct count over 500 } drop", "dynamic"),
        ("limit rate over 9000/second drop", ""), ("quota over 900 mbytes drop", ""),
        ("ct count over 900 drop", ""), ("counter name hits", "object"),
        ("limit rate over 100 mbytes/second drop", ""),
    )  # fmt: skip
    held = ""
    if kept == "object":
        held = "counter hits {\n}\n"
    elif kept:
        held = f"set m {{\ntype ipv4_addr\nsize 65535\nflags {kept}\n}}\n"
    return _table("meters", held + _chain("rates", d.hook, d.one("-10", "5", "filter"),
                                          service + rule))  # fmt: skip


# ---- maps and translations ----------------------------------------------------------------


def _dispatch(d: Draw) -> Setup:
    """Zones by a map, as several generators write them: each opens what is for it."""
    inner = d.one("accept", "ct state { established, related, new } accept")
    outer = d.one(f"{d.proto} dport {{ 22, {PORT} }} accept\n", f"{d.proto} dport {PORT} "
                  "ct state new accept\n", "accept\n")  # fmt: skip
    head = d.one("ct state vmap { established : accept, related : accept }\n",
                 "ct state established,related accept\n", "")  # fmt: skip
    word = "oifname" if d.hook == "output" else "iifname"
    end = d.one("", "reject with icmpx type admin-prohibited\n", "ct status dnat accept\n")
    body = f"chain outer {{\n{outer}{end}}}\nchain inner {{\n{inner}\n}}\n"
    body += _chain("zones", d.hook, d.one("1", "filter", "-1"), f'{head}{word} vmap {{ "{EXT}" : '
                   f'jump outer, "{INT}" : goto inner, "lo" : accept }}')  # fmt: skip
    return _table("zones", body)


def _allow_list(d: Draw) -> Setup:
    """Sets with intervals and concatenations: what is on it passes, the rest of the port not."""
    side, word = ("daddr", "oifname") if d.hook == "output" else ("saddr", "iifname")
    kind, key, elements = d.one(
        ("ipv4_addr . inet_service", f"ip {side} . {d.proto} dport",
         f"10.77.1.0/24 . 8000-9000, 192.0.2.0/24 . 443, {POD} . {PORT}"),
        ("ifname . ipv4_addr", f"{word} . ip {side}",
         f'"{EXT}" . 10.77.1.0/24, "{INT}" . 10.77.4.0/24, "{EXT}" . 10.77.4.0/24'),
        ("ipv4_addr . inet_proto . inet_service", f"ip {side} . meta l4proto . th dport",
         f"10.77.1.1-10.77.1.99 . {d.proto} . {PORT}, {POD} . {d.proto} . {PORT}"),
    )  # fmt: skip
    body = f"set may {{\ntype {kind}\nflags interval\nelements = {{ {elements} }}\n}}\n"
    rule = d.one(f"{d.proto} dport {PORT} ct state new {key} != @may drop",
                 f"{key} @may accept\n{d.proto} dport {PORT} ct state new ip {side} != 0.0.0.0/8 "
                 "counter",
                 f"meta nfproto ipv4 {d.proto} dport {PORT} {key} != @may reject")  # fmt: skip
    return _table("allowed", body + _chain("listed", d.hook, d.one("-5", "5"), rule))


def _balanced(d: Draw) -> Setup:
    """A cluster's address in front of backends drawn by lot or by hash."""
    port = d.one("22", str(PORT), str(PORT))
    spread = d.one(
        "numgen random mod 2 vmap { 0 : goto ep0, 1 : goto ep1 }",
        "jhash ip saddr mod 2 vmap { 0 : goto ep0, 1 : goto ep1 }",
        "numgen inc mod 3 vmap { 0 : goto ep0, 1 : goto ep1, 2 : goto ep0 }",
        f"dnat to {POD}:{port}",
    )  # fmt: skip
    body = "".join(f"chain ep{n} {{\nip saddr {POD} meta mark set 0x4000\n{d.proto} dport 80 dnat "
                   f"to {POD}:{port}\n}}\n" for n in (0, 1))  # fmt: skip
    serve = f"ip daddr {VIP} {d.proto} dport 80 {spread}"
    body += _chain("pre", "prerouting", "dstnat", serve, "nat")
    body += _chain("out", "output", "-100", serve, "nat")
    body += _chain("post", "postrouting", "srcnat", d.one(
        "meta mark & 0x4000 == 0x4000 masquerade", "meta mark 0x4000 masquerade fully-random",
        f'ip saddr {NET} oifname != "{INT}" masquerade'), "nat")  # fmt: skip
    return _table("cluster", body, "ip")


def _copies(d: Draw) -> Setup:
    """To a monitor, a proxy, a log; fields of packets rewritten."""
    rule, hook = d.one(
        (f'tcp dport 514 dup to 10.77.4.9 device "{INT}"', "prerouting"),
        ("tcp dport 15006 tproxy ip to :15001 meta mark set 1 accept", "prerouting"),
        ("tcp dport 25 ct state new log group 2", "input"),
        ("tcp dport 25 tcp flags syn notrack", "prerouting"),
        ("meta l4proto tcp ip dscp set cs1", "postrouting"),
        ("ct mark 0x5 ip dscp set af11", "postrouting"),
        ("tcp flags syn tcp option maxseg size set 1200", "forward"),
        ("meta priority set 1:10", "postrouting"),
    )  # fmt: skip
    family = "ip" if "dup" in rule else "inet"
    return _table("copies", _chain("some", hook, "mangle", rule), family)


# ---- beside the hooks of IP ------------------------------------------------------------


def _fast_path(d: Draw) -> Setup:
    which = d.one("ct state established", "meta l4proto { tcp, udp }", f"{d.proto} dport {PORT}")
    held = f'flowtable fast {{\nhook ingress priority 0\ndevices = {{ "{EXT}", "{INT}" }}\n}}\n'
    return _table("fast", held + _chain(
        "speed", "forward", d.one("filter", "-5", "5"), f"{which} flow add @fast"))  # fmt: skip


def _at_a_device(d: Draw) -> Setup:
    """Before routing is asked, and behind it."""
    side, rule = d.one(
        ("ingress", "ip saddr 192.0.2.0/24 drop"), ("egress", "meta mark 0x10 counter"),
        ("ingress", "tcp flags & (fin|syn) == fin|syn drop"), ("ingress", "meta mark set 0x10"),
        ("ingress", f'udp dport 4789 fwd to "{INT}"'), ("egress", "ip dscp set cs1"),
        ("ingress", f'ip daddr 192.0.2.77 dup to "{INT}"'),
        ("egress", f"{d.proto} sport {PORT} meta mark 0x5 drop"),
        ("egress", f"{d.proto} sport {PORT} meta mark != 0x0 drop"),
    )  # fmt: skip
    where = f'type filter hook {side} device "{EXT}" priority {d.one("0", "-10")};'
    return _table("device", f"chain near {{\n{where}\n{rule}\n}}\n", "netdev")


def _shield(d: Draw) -> Setup:
    """Handshakes answered by the kernel, for one port."""
    port = d.one("80", "80", str(PORT))
    shield = (f"tcp dport {port} ct state invalid,untracked synproxy mss 1460 wscale 7 timestamp "
              f"sack-perm\ntcp dport {port} ct state invalid drop")  # fmt: skip
    body = _chain("pre", "prerouting", "raw", f"tcp dport {port} tcp flags syn notrack")
    return (("sh", "echo 0 > /proc/sys/net/netfilter/nf_conntrack_tcp_loose\n"),
            *_table("shield", body + _chain("in", "input", "-5", shield)))  # fmt: skip


def _bridged(d: Draw) -> Setup:
    """A bridge without ports, and rules about what it would carry."""
    rule = d.one("ip saddr 192.0.2.9 drop", "ct state invalid drop", "ether type arp accept",
                 f"{d.proto} dport {PORT} counter")  # fmt: skip
    made = f"ip link add {BRIDGE} type bridge\nip addr add 10.77.9.1/24 dev {BRIDGE}\n"
    chain = _chain("carried", d.one("forward", "input", "prerouting"), "0", rule)
    return (("sh", f"{made}ip link set {BRIDGE} up\n"), *_table("bridged", chain, "bridge"))


Block = Callable[[Draw], Setup]
BLOCKS: Final[tuple[Block, ...]] = (
    _policy_routing, _strict_reverse_path, _lookups, _own_notrack, _states, _states, _expecting,
    _meters, _meters, _dispatch, _allow_list, _balanced, _copies, _fast_path, _at_a_device,
    _shield, _bridged,
)  # fmt: skip
XT_BLOCKS: Final = (xt_filter_rules, xt_filter_rules, xt_mangle_rules, xt_set_rules)
CLEAN: Final = (
    f"ip rule del pref {TABLE}; ip -6 rule del pref {TABLE}; ip route flush table {TABLE}; "
    f"ip -6 route flush table {TABLE}; for n in all {EXT} {INT}; do "
    "echo 0 > /proc/sys/net/ipv4/conf/$n/rp_filter; done; "
    f"echo 0 > /proc/sys/net/ipv4/conf/all/src_valid_mark; ip link del {BRIDGE}; ipset destroy"
)


def clean(net: Net) -> None:
    """Take away what :func:`kit.rulesets.net.reset` does not know of."""
    net.h.run(["sh", "-c", CLEAN], check=False)


def beside(rng: random.Random, role: str, proto: str, tool: str = "") -> Setup:
    """One to three blocks; ``tool``: of iptables, for some of them."""
    d = Draw(rng, role, proto)
    chosen = rng.sample(range(len(BLOCKS)), rng.randint(1, 2))
    found = {BLOCKS[n].__name__: BLOCKS[n](d) for n in chosen}
    if tool:
        one = rng.choice(XT_BLOCKS)
        found = {**dict([*found.items()][:1]), one.__name__: one(d, tool)}
    return tuple(part for setup in found.values() for part in setup)


def _with(kind: str, tool: str = "") -> Maker:
    def made(rng: random.Random, role: str, proto: str) -> Setup:
        base = KINDS[kind](rng, role, proto)
        return (*base, *beside(rng, role, proto, tool))

    return made


def _tools(rng: random.Random, role: str, proto: str) -> Setup:
    """A common tool's structure, whichever role it has the service in."""
    one = rng.choice(STRUCTURES)
    tool = next((name.replace("-restore", "") for name, _ in one.setup if "restore" in name), "")
    setup: Setup = tuple((name, text) for name, text in one.setup)
    if rng.random() < 0.8:
        setup = (*setup, *beside(rng, role, proto, tool if "ip6" not in tool else ""))
    return setup


BESIDE: Final[dict[str, Maker]] = {
    "nft and beside": _with("mixed nft"),
    "plain nft and beside": _with("nft"),
    "gateway and beside": _with("gateway"),
    "iptables-nft and beside": _with("mixed iptables-nft", "iptables-nft"),
    "iptables-legacy and beside": _with("mixed iptables-legacy", "iptables-legacy"),
    "tools": _tools,
}
