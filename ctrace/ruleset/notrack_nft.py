"""A plan's rules as nftables text: our own table, and accepts in other tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import ip_network
from typing import Final, Optional

from ctrace.dropping import PRIORITY, Drop, rules, sets
from ctrace.plan.plan import Accept, CtTimeout, Notrack, Plan
from ctrace.plan.terms import Term
from ctrace.ruleset.notrack import (
    AWAY,
    ENDS,
    KEPT,
    LO,
    NEAR,
    OUT,
    PRE,
    PROTO_NUMBER,
    QUOTED,
    TABLE,
    TAG,
    WIRE,
    Packets,
    far_ports,
    icmp_state,
    packets_of,
    peers_of,
    tag_of,
)

TIMEOUT_PRIORITY: Final = -190
"""A ``ct timeout set`` needs the entry, so it must come after conntrack (-200)."""
ARMED: Final = ("tcp", "udp", "icmp", "icmpv6")  # nft itself knows these without /etc/protocols
_NOT_SYN: Final = "tcp flags & (syn | ack) != syn"
_GATE: Final = "meta l4proto @armed"
_WHERE: Final = {NEAR: " fib daddr type local", AWAY: " fib daddr type != local"}
_OVER: Final = {NEAR: 'iifname != "lo" ', LO: 'oifname "lo" ', WIRE: 'oifname != "lo" '}
_OTHERS: Final = (("ip", "others4", "ipv4_addr"), ("ip6", "others6", "ipv6_addr"))
_FAR: Final = {"sport": ("daddr", "dport"), "dport": ("saddr", "sport")}
"""The far end of a packet, by which of its ports is the service's."""
_BOTH: Final = {
    "sport": "{0} saddr . tcp sport . {0} daddr . tcp dport",
    "dport": "{0} daddr . tcp dport . {0} saddr . tcp sport",
}
_CALLS: Final = (("ip", "calls4", "ipv4_addr"), ("ip6", "calls6", "ipv6_addr"))
OTHERS_PRIORITY, MOVED_PRIORITY = "srcnat + 10", "110"
"""Translated packets have their new source here, on the way out and on the way in."""
MAX_OTHERS: Final = 1 << 19
"""Ends that a set remembers: twice the entries of a large host's table by default."""
OTHERS_TIMEOUT: Final = {"tcp": 432000, "udp": 180}
"""Seconds without a packet: as long as conntrack itself keeps an entry by default."""
CLOSING: Final = 300
"""Seconds that new and closing entries have at most; their ends are remembered no longer, so that
a set holds hardly more ends than the table has entries."""

_LEFT: Final = [
    (f" ct expiration < {CLOSING}s", CLOSING),
    (f" ct expiration >= {CLOSING}s", OTHERS_TIMEOUT["tcp"]),
]


def script(plan: Plan, timeout_s: Optional[int]) -> str:
    """One atomic transaction: ctrace's own table, and the accepts in native nft tables.

    With ``timeout_s`` the rules stop matching after that many seconds; None makes
    them permanent. Loading the script again replaces our table; accepts that are
    already there must be deleted first (:func:`delete_accepts`).
    """
    lines = [remove_table(), *_table(plan, timeout_s), ""]
    lines += accepts(plan)
    return "\n".join(lines).rstrip() + "\n"


def by_hand(plan: Plan, table: str) -> str:
    """The same as a person types it: in a table of its own, beside one that is applied."""
    text = re.sub(rf"inet {TABLE}\b", f"inet {table}", script(plan, None))
    return re.sub(rf' comment "{TAG}[^"]*"', "", text)


def remove_table() -> str:
    """Remove our table, whether it is there or not."""
    return f"table inet {TABLE}\ndelete table inet {TABLE}"


def confirm(lease_s: Optional[int] = None) -> str:
    """Make a trial permanent, or good for ``lease_s`` seconds more, in one transaction.

    Fails when it has already expired.
    """
    for_long = "" if lease_s is None else f' timeout {int(lease_s)}s comment "{KEPT}"'
    kept = ", ".join(f"{name}{for_long}" for name in ARMED)
    return (
        f"delete element inet {TABLE} armed {{ {', '.join(ARMED)} }}\n"
        f"add element inet {TABLE} armed {{ {kept} }}\n"
    )


def disarm() -> str:
    """Track everything again, and leave the rules where they are."""
    return f"flush set inet {TABLE} armed\n"


def accepts(plan: Plan) -> list[str]:
    """The commands that add the plan's accepts to native nft tables, last position first."""
    found = [
        (accept, lever)
        for lever in plan.levers
        if isinstance(lever, Notrack)
        for accept in lever.accepts
        if accept.tool == "nft"
    ]
    # From the end backwards, so that one insertion does not move another's index.
    found.sort(key=lambda pair: pair[0].position, reverse=True)
    lines = []
    for accept, lever in found:
        where = f"{accept.family} {accept.table} {accept.chain}"
        for rule in accept_rules(lever, accept):
            if accept.position < 0:
                lines.append(f"add rule {where} {rule}")
            else:
                lines.append(f"insert rule {where} index {accept.position} {rule}")
    return lines


def delete_accepts(handles: list[tuple[str, str, str, int]]) -> str:
    """Delete rules by (family, table, chain, handle), as found by their comments."""
    return "".join(
        f"delete rule {family} {table} {chain} handle {int(handle)}\n"
        for family, table, chain, handle in handles
    )


def accept_rules(lever: Notrack, accept: Accept) -> list[str]:
    """An accept as nft rules (one a family when the lever names peers)."""
    tag = tag_of(lever, accept.role, accept.flow)
    end = f'counter accept comment "{tag}"'
    if accept.flow == "icmp":
        return [
            f"ct state {icmp_state(lever)} {rule} {end}"
            for rule in _icmp(lever, accept.role)
            if accept.family == "inet" or rule.startswith("icmpv6") == (accept.family == "ip6")
        ]
    ends = ENDS[accept.flow]
    match = f"{lever.proto} {ends.port} {lever.port} "
    match += _far(lever, accept.role, ends.far_port)
    if accept.flow == "from" and lever.proto == "tcp":
        match += f"{_NOT_SYN} "
    peers = _peers(lever, accept.role, ends.address)
    rules = []
    for family in ("ip", "ip6"):
        terms = _terms(accept.terms, family, lever.proto)
        if terms is None or accept.family not in ("inet", family):
            continue
        for peer in peers:
            if not peer or peer.startswith(f"{family} "):
                anchor = _anchor(accept, family, peer + terms)
                rules.append(f"{anchor}{terms}{peer}ct state untracked {match}{end}")
    return list(dict.fromkeys(rules))


def _anchor(accept: Accept, family: str, match: str) -> str:
    """Holds a rule of an inet table to one family, where its terms are of one but don't say so."""
    bound = any("addr" in t.field or t.field in ("family", "set") for t in accept.terms)
    if accept.family != "inet" or not bound or f"{family} " in match:
        return ""
    return f"meta nfproto {'ipv4' if family == 'ip' else 'ipv6'} "


def _terms(terms: Iterable[Term], family: str, proto: str) -> Optional[str]:  # noqa: PLR0912
    """The conditions for packets of a family; None when such a packet never matches them."""
    out = ""
    for term in terms:
        unequal = "!= " if term.negate else ""
        values = term.values
        if term.field in ("saddr", "daddr"):
            version = 4 if family == "ip" else 6
            values = tuple(v for v in values if ip_network(v).version == version)
            if not values and not term.negate:
                return None
            if values:
                out += f"{family} {term.field} {unequal}{{ {', '.join(values)} }} "
        elif term.field == "set":
            keys, name = values[0].split("@")
            other = bool({"ip", "ip6", "src", "dst"} & {*re.split("[ ,]", keys)} - {family})
            if other and not term.negate:
                return None
            out += "" if other else f"{keys}{unequal}@{name} "
        elif term.field in ("iif", "oif"):
            names = ", ".join(f'"{name}"' for name in values)
            out += f"{term.field}name {unequal}{names if len(values) == 1 else f'{{ {names} }}'} "
        elif term.field == "family":
            if (values[0] == family) == term.negate:
                return None
        elif term.field == "type":
            out += f"fib {values[0].split(' ')[0]} type {unequal}local "
        elif term.field == "mark":
            value, mask = values[0].split("/")
            out += f"meta mark & {mask} {'!=' if term.negate else '=='} {value} "
        elif term.field == "later":
            if proto != "tcp":
                return None
            out += f"tcp flags & (syn | ack) {'==' if term.negate else '!='} syn "
        elif term.field in ("uid", "gid"):
            users = values[0] if len(values) == 1 else f"{{ {', '.join(values)} }}"
            out += f"meta sk{term.field} {unequal}{users} "
        else:
            out += f"{proto} {term.field} {unequal}{values[0]} "
    return out


def _table(plan: Plan, timeout_s: Optional[int]) -> list[str]:
    gate = "" if timeout_s is None else f" timeout {int(timeout_s)}s"
    elements = ", ".join(f"{name}{gate}" for name in ARMED)
    notracks = [lever for lever in plan.levers if isinstance(lever, Notrack)]
    timeouts = [lever for lever in plan.levers if isinstance(lever, CtTimeout)]
    drops = [lever for lever in plan.levers if isinstance(lever, Drop)]
    armed = ["type inet_proto", "flags timeout", f"elements = {{ {elements} }}"]
    lines = [f"table inet {TABLE} {{", *_block("set armed", armed)]
    shared = [lever for lever in notracks if lever.shared]
    served = [lever for lever in shared if "server" in lever.roles]
    called = [one for one in shared if {"client", "forward"} & {*one.roles} and one.proto == "tcp"]
    lines += _remembered(_OTHERS, "inet_proto . inet_service . inet_service") if served else []
    lines += _remembered(_CALLS, "inet_service . {0} . inet_service") if called else []
    for name, body in (one for drop in drops for one in sets(drop).items()):
        lines += _block(f"set {name}", body)
    for policy in timeouts:
        states = ", ".join(f"{state} : {seconds}" for state, seconds in policy.policy)
        for l3proto in ("ip", "ip6"):
            what = [f"protocol {policy.proto}", f"l3proto {l3proto}", f"policy = {{ {states} }}"]
            lines += _block(f"ct timeout {_policy_name(policy, l3proto)}", what)
    pre, out = ([rule for drop in drops for rule in rules(drop, chain, _GATE, TAG)]
                for chain in (PRE, OUT))  # fmt: skip
    pre += [rule for lever in served for rule in _others(lever, "dport")]
    pre += [rule for lever in called for rule in _call(lever, 'iifname != "lo"')]
    pre += [rule for lever in called for here in _BOTH for rule in _known(lever, here)]
    out += [rule for lever in served for rule in _called(lever)]
    out += [rule for lever in served for rule in _others(lever, "sport")]
    out += [rule for lever in called for rule in _known(lever, "dport")]
    pre += [rule for lever in notracks for rule in _notrack(lever, PRE)]
    out += [rule for lever in notracks for rule in _notrack(lever, OUT)]
    lines += _chain(PRE, "prerouting", PRIORITY, pre)
    lines += _chain(OUT, "output", PRIORITY, out)
    learn = [rule for lever in served for rule in _learn(lever)]
    learn += [rule for lever in called for rule in _call(lever, "ct status dnat")]
    lines += _chain("others", "postrouting", OTHERS_PRIORITY, learn)
    # Whoever comes by another port or address, which rules translate to the service's.
    dnat = "{0.proto} dport {0.port} ct status dnat"
    moved = [rule for one in served for rule in _remember(one, dnat.format(one), "dport")]
    lines += _chain("moved", "input", MOVED_PRIORITY, moved)
    if timeouts:
        pre = [r for p in timeouts if {"server", "forward"} & set(p.roles) for r in _policy(p)]
        out = [r for p in timeouts if {"client", "loopback"} & set(p.roles) for r in _policy(p)]
        lines += _chain("timeout_pre", "prerouting", str(TIMEOUT_PRIORITY), pre)
        lines += _chain("timeout_out", "output", str(TIMEOUT_PRIORITY), out)
    return [*lines, "}"]


def _remembered(kinds: Iterable[tuple[str, str, str]], rest: str) -> list[str]:
    """The sets of both families that rules fill by themselves."""
    end = [f"size {MAX_OTHERS}", "flags dynamic,timeout"]
    found = (_block(f"set {name}", [f"type {a} . {rest.format(a)}", *end]) for _, name, a in kinds)
    return [line for one in found for line in one]


def _chain(name: str, hook: str, priority: str, rules: list[str]) -> list[str]:
    what = f"type filter hook {hook} priority {priority}; policy accept;"
    return _block(f"chain {name}", [what, *rules]) if rules else []


def _block(head: str, body: Iterable[str]) -> list[str]:
    return [f"\t{head} {{", *(f"\t\t{line}" for line in body), "\t}"]


def _notrack(lever: Notrack, hook: str) -> list[str]:
    return [
        f'{match} {_GATE} counter notrack comment "{tag_of(lever, packets.role, packets.flow)}"'
        for packets in packets_of(lever, hook)
        for match in _matches(lever, packets)
    ]


def _matches(lever: Notrack, packets: Packets) -> list[str]:
    """Packets as nft matches: one a family when the lever names peers, one of ICMP each."""
    where, over = _WHERE.get(packets.where, ""), _OVER.get(packets.where, "")
    if packets.flow == "icmp":
        return [over + rule + where for rule in _icmp(lever, packets.role)]
    ends = ENDS[packets.flow]
    match = f"{lever.proto} {ends.port} {lever.port} "
    match = (match + _far(lever, packets.role, ends.far_port)).rstrip()
    return [f"{over}{peer}{match}{where}" for peer in _peers(lever, packets.role, ends.address)]


def _learn(lever: Notrack) -> list[str]:
    """Remember the far ends of translated packets that leave here from the port, and of this host's
    own calls: those have an entry, and the service's own answers have none."""
    own = 'oifname != "lo" ct state new,established,related'
    entry = own if lever.proto == "tcp" else "ct status snat,dnat"
    return _remember(lever, f"{lever.proto} sport {lever.port} {entry} fib saddr type local")


def _called(lever: Notrack) -> list[str]:
    """Remember whom this host calls from the port: no answer begins with a bare SYN.

    Of datagrams nothing tells a question from an answer.
    """
    match = f'oifname != "lo" tcp sport {lever.port} tcp flags & (syn | ack) == syn'
    return _remember(lever, match, first=True) if lever.proto == "tcp" else []


def _remember(lever: Notrack, match: str, here: str = "sport", *, first: bool = False) -> list[str]:
    """``here``: which of its ports is the service's; ``first``: a packet without an entry yet."""
    (far, there), long = _FAR[here], OTHERS_TIMEOUT[lever.proto]
    return [
        f"{match}{left} {_GATE} update @{name} {{ {family} {far} . meta l4proto . th {there} "
        f'. th {here} timeout {seconds}s }} comment "{tag_of(lever, "server", "others")}"'
        for family, name, _ in _OTHERS
        for left, seconds in ([("", long)] if first or lever.proto != "tcp" else _LEFT)
    ]


def _others(lever: Notrack, here: str) -> list[str]:
    """Leave packets of the far ends that were remembered tracked: this chain ends for them."""
    far, there = _FAR[here]
    return [
        f"{lever.proto} {here} {lever.port} {family} {far} . meta l4proto . th {there} . th {here} "
        f'@{name} accept comment "{tag_of(lever, "server", "others")}"'
        for family, name, _ in _OTHERS
    ]


def _call(lever: Notrack, match: str) -> list[str]:
    """Remember a connection from the service's port through this host, by all of its ends."""
    return [
        f"{match} tcp sport {lever.port} tcp flags & (syn | ack) == syn {_GATE} {kept} "
        f'comment "{tag_of(lever, "forward", "others")}"'
        for _, kept in _pairs("sport")
    ]


def _pairs(here: str) -> Iterator[tuple[str, str]]:
    """The ends of a packet as they are looked up, and what keeps them while they talk."""
    for family, name, _ in _CALLS:
        ends = _BOTH[here].format(family)
        yield f"{ends} @{name}", f"update @{name} {{ {ends} timeout {OTHERS_TIMEOUT['tcp']}s }}"


def _known(lever: Notrack, here: str) -> list[str]:
    """Leave packets of those calls tracked, translated or not, or (``dport``) of the answers."""
    tag = tag_of(lever, "forward", "others")
    return [
        f'tcp {here} {lever.port} {there} {kept} accept comment "{tag}"'
        for there, kept in _pairs(here)
    ]


def _icmp(lever: Notrack, role: str) -> list[str]:
    """Errors that quote a packet of ours: bits into the ICMP message, no inner IP options."""
    number = PROTO_NUMBER[lever.proto]
    v4 = "icmp type { destination-unreachable, time-exceeded, parameter-problem }"
    v6 = "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem }"
    return [
        rule
        for side in QUOTED.get(role, ())
        for rule in (
            f"{v4} @th,136,8 {number} @th,{224 if side == 'sport' else 240},16 {lever.port}",
            f"{v6} @th,112,8 {number} @th,{384 if side == 'sport' else 400},16 {lever.port}",
        )
    ]


def _policy(policy: CtTimeout) -> list[str]:
    return [
        f"meta nfproto {nfproto} {policy.proto} dport {policy.port} {_GATE} "
        f'ct timeout set "{_policy_name(policy, l3proto)}" '
        f'comment "{TAG}timeout:{policy.proto}:{policy.port}"'
        for nfproto, l3proto in (("ipv4", "ip"), ("ipv6", "ip6"))
    ]


def _policy_name(policy: CtTimeout, l3proto: str) -> str:
    return f"{policy.proto}_{policy.port}_{l3proto}"


def _peers(lever: Notrack, role: str, side: str) -> list[str]:
    """Address matches, one a family, each with a trailing space; one empty when unrestricted."""
    if not (peers := peers_of(lever, role)):
        return [""]
    found = []
    for version, family in ((4, "ip"), (6, "ip6")):
        if mine := [one for one in peers if ip_network(one).version == version]:
            found.append(f"{family} {side} {{ {', '.join(mine)} }} ")
    return found


def _far(lever: Notrack, role: str, port: str) -> str:
    ports = far_ports(lever, role)
    return f"{lever.proto} {port} {ports[0]}-{ports[1]} " if ports else ""
