"""Rules from a plan's fields: pure functions, text out, nothing run.

Every role of a port needs its own pair of rules, one a direction; half a pair
frees nothing, because nf_conntrack_tcp_loose picks the tracked direction up in
mid-stream. ICMP errors that quote an untracked flow are INVALID to conntrack,
so firewalls that drop INVALID would break path MTU discovery: precise rules
untrack those errors too.

The nftables form is gated by a set ``armed``: while a plan is on trial its
elements have a timeout, and when they expire the rules stop matching by
themselves. The iptables form uses an end date for the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from ipaddress import ip_address, ip_network
from typing import Final, Optional

from ctrace.advice.plan import Accept, CtTimeout, Notrack, Plan
from ctrace.errors import UsageError

TABLE: Final = "ctrace"
TAG: Final = "ctrace:"
"""How the comment of every rule of ours, in any table, begins."""

PRIORITY: Final = -310
"""``raw - 10``: after defragmentation (-400), before conntrack (-200), and before
templates at raw (-300), which would make a later notrack a silent no-op."""
TIMEOUT_PRIORITY: Final = -190
"""A ``ct timeout set`` needs the entry, so it must come after conntrack (-200)."""

CHAINS: Final = ("CTRACE_PRE", "CTRACE_OUT")
"""Our iptables chains in ``raw``, jumped to from PREROUTING and OUTPUT."""

ARMED: Final = ("tcp", "udp", "icmp", "ipv6-icmp")
_PROTO_NUMBER: Final = {"tcp": 6, "udp": 17}
_NOT_SYN_NFT: Final = "tcp flags & (syn | ack) != syn"
_NOT_SYN_XT: Final = ("-m", "tcp", "!", "--tcp-flags", "SYN,ACK", "SYN")
_GATE: Final = "meta l4proto @armed"
_OTHERS: Final = (("ip", "others4", "ipv4_addr"), ("ip6", "others6", "ipv6_addr"))
OTHERS_PRIORITY: Final = "srcnat + 10"
"""Translated packets have their new source here."""
MAX_OTHERS: Final = 65535
OTHERS_TIMEOUT: Final = {"tcp": 432000, "udp": 180}
"""Seconds without a packet: as long as conntrack itself keeps an entry by default."""


@dataclass(frozen=True)
class Step:
    """A command and its standard input."""

    argv: tuple[str, ...]
    stdin: str = ""


# ---- nftables ----------------------------------------------------------------


def nft_script(plan: Plan, timeout_s: Optional[int]) -> str:
    """One atomic transaction: ctrace's own table, and the accepts in native nft tables.

    With ``timeout_s`` the rules stop matching after that many seconds; None makes
    them permanent. Loading the script again replaces our table; accepts that are
    already there must be deleted first (:func:`nft_delete_accepts`).
    """
    lines = [nft_remove_table(), *_table(plan, timeout_s), ""]
    lines += nft_accepts(plan)
    return "\n".join(lines).rstrip() + "\n"


def nft_remove_table() -> str:
    """Remove our table, whether it is there or not."""
    return f"table inet {TABLE}\ndelete table inet {TABLE}"


def nft_confirm() -> str:
    """Make a trial permanent, in one transaction. Fails when it has already expired."""
    elements = ", ".join(ARMED)
    return (
        f"delete element inet {TABLE} armed {{ {elements} }}\n"
        f"add element inet {TABLE} armed {{ {elements} }}\n"
    )


def nft_accepts(plan: Plan) -> list[str]:
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
        for rule in nft_accept_rules(lever, accept):
            if accept.position < 0:
                lines.append(f"add rule {where} {rule}")
            else:
                lines.append(f"insert rule {where} index {accept.position} {rule}")
    return lines


def nft_delete_accepts(handles: list[tuple[str, str, str, int]]) -> str:
    """Delete rules by (family, table, chain, handle), as found by their comments."""
    return "".join(
        f"delete rule {family} {table} {chain} handle {int(handle)}\n"
        for family, table, chain, handle in handles
    )


def nft_accept_rules(lever: Notrack, accept: Accept) -> list[str]:
    """An accept as nft rules (one a family when the lever names peers)."""
    tag = _tag(lever, accept.role, accept.flow)
    end = f'counter accept comment "{tag}"'
    if accept.flow == "icmp":
        return [
            f"ct state {icmp_state(lever)} {rule} {end}"
            for rule in _icmp_nft(lever, accept.role)
            if accept.family == "inet" or rule.startswith("icmpv6") == (accept.family == "ip6")
        ]
    here = {"input": 'iifname "lo" ', "output": 'oifname "lo" '}.get(accept.hook, "")
    match = f"{lever.proto} {'dport' if accept.flow == 'to' else 'sport'} {lever.port} "
    if accept.role == "client":
        far = "sport" if accept.flow == "to" else "dport"
        match += f"{lever.proto} {far} {_range(lever)} "
    if accept.role in ("client", "forward") and accept.flow == "from" and lever.proto == "tcp":
        match += f"{_NOT_SYN_NFT} "
    if accept.role == "loopback":
        match = here + match
    peers = _peers_nft(lever, accept.role, "daddr" if accept.flow == "to" else "saddr")
    if accept.devices:
        names = ", ".join(f'"{device}"' for device in accept.devices)
        match = f"iifname {{ {names} }} {match}"
    if accept.sources:
        peers = [
            source + peer
            for source in _addresses_nft(accept.sources, "saddr")
            for peer in peers
            if not peer or peer.split(" ")[0] == source.split(" ")[0]
        ]
    if accept.family != "inet":
        peers = [peer for peer in peers if not peer or peer.startswith(f"{accept.family} ")]
    return [f"{peer}ct state untracked {match}{end}" for peer in peers]


def icmp_state(lever: Notrack) -> str:
    """What conntrack calls ICMP errors about the lever's flows."""
    return "untracked" if lever.icmp else "invalid"


def _table(plan: Plan, timeout_s: Optional[int]) -> list[str]:
    gate = "" if timeout_s is None else f" timeout {int(timeout_s)}s"
    elements = ", ".join(f"{name}{gate}" for name in ARMED)
    notracks = [lever for lever in plan.levers if isinstance(lever, Notrack)]
    timeouts = [lever for lever in plan.levers if isinstance(lever, CtTimeout)]
    lines = [
        f"table inet {TABLE} {{",
        "\tset armed {",
        "\t\ttype inet_proto",
        "\t\tflags timeout",
        f"\t\telements = {{ {elements} }}",
        "\t}",
    ]
    shared = [lever for lever in notracks if lever.shared]
    for _, name, address in _OTHERS if shared else ():
        lines += [
            f"\tset {name} {{",
            f"\t\ttype {address} . inet_proto . inet_service . inet_service",
            f"\t\tsize {MAX_OTHERS}",
            "\t\tflags dynamic,timeout",
            "\t}",
        ]
    for policy in timeouts:
        states = ", ".join(f"{state} : {seconds}" for state, seconds in policy.policy)
        for l3proto in ("ip", "ip6"):
            lines += [
                f"\tct timeout {_policy_name(policy, l3proto)} {{",
                f"\t\tprotocol {policy.proto}",
                f"\t\tl3proto {l3proto}",
                f"\t\tpolicy = {{ {states} }}",
                "\t}",
            ]
    if notracks:
        pre = [rule for lever in shared for rule in _others_nft(lever, "saddr", "sport", "dport")]
        out = [rule for lever in shared for rule in _others_nft(lever, "daddr", "dport", "sport")]
        pre += [rule for lever in notracks for rule in _notrack_nft(lever, "pre")]
        out += [rule for lever in notracks for rule in _notrack_nft(lever, "out")]
        lines += _chain("pre", "prerouting", "raw - 10", pre)
        lines += _chain("out", "output", "raw - 10", out)
        learn = [rule for lever in shared for rule in _learn_nft(lever)]
        lines += _chain("others", "postrouting", OTHERS_PRIORITY, learn)
    if timeouts:
        pre = [r for p in timeouts if {"server", "forward"} & set(p.roles) for r in _policy_nft(p)]
        out = [r for p in timeouts if {"client", "loopback"} & set(p.roles) for r in _policy_nft(p)]
        lines += _chain("timeout_pre", "prerouting", str(TIMEOUT_PRIORITY), pre)
        lines += _chain("timeout_out", "output", str(TIMEOUT_PRIORITY), out)
    return [*lines, "}"]


def _chain(name: str, hook: str, priority: str, rules: list[str]) -> list[str]:
    if not rules:
        return []
    return [
        f"\tchain {name} {{",
        f"\t\ttype filter hook {hook} priority {priority}; policy accept;",
        *(f"\t\t{rule}" for rule in rules),
        "\t}",
    ]


def _notrack_nft(lever: Notrack, chain: str) -> list[str]:
    to = f"{lever.proto} dport {lever.port}"
    back = f"{lever.proto} sport {lever.port}"
    near, eph = "fib daddr type local", _range(lever)
    rules: list[str] = []

    def add(role: str, flow: str, *matches: str) -> None:
        end = f'{_GATE} counter notrack comment "{_tag(lever, role, flow)}"'
        rules.extend(" ".join((match, end)) for match in matches)

    for role in lever.roles:
        sent, got = (_peers_nft(lever, role, side) for side in ("daddr", "saddr"))
        if role == "server":
            if chain == "pre":
                add(role, "to", f"{to} {near}")
            else:
                add(role, "from", back)
                # The host's own health checks would be half tracked otherwise.
                add(role, "lo", f'oifname "lo" {to}')
        elif role == "client":
            if chain == "pre":
                add(role, "from", *(f"{p}{back} {lever.proto} dport {eph} {near}" for p in got))
            else:
                add(role, "to", *(f"{p}{to} {lever.proto} sport {eph}" for p in sent))
        elif role == "forward" and chain == "pre":
            away = "fib daddr type != local"
            add(role, "to", *(f"{p}{to} {away}" for p in sent))
            add(role, "from", *(f"{p}{back} {away}" for p in got))
        elif role == "loopback" and chain == "out":
            add(role, "to", f'oifname "lo" {to}')
            add(role, "from", f'oifname "lo" {back}')
        # A router makes ICMP errors about forwarded packets itself: those leave through output.
        if lever.icmp and (chain == "pre" or role == "forward"):
            # Errors about this host's own packets are sent to it, and no others are its business.
            here = "" if role == "forward" else f" {near}"
            add(role, "icmp", *(rule + here for rule in _icmp_nft(lever, role)))
    return rules


def _learn_nft(lever: Notrack) -> list[str]:
    """Remember the far ends of forwarded packets that leave here from the port.

    They were translated to it: an incoming interface tells them from the service's own
    answers, which start here (postrouting knows it since 5.7).
    """
    return [
        f"iif != 0 {lever.proto} sport {lever.port} fib saddr type local {_GATE} update @{name} "
        f"{{ {family} daddr . meta l4proto . th dport . th sport "
        f'timeout {OTHERS_TIMEOUT[lever.proto]}s }} comment "{_tag(lever, "server", "others")}"'
        for family, name, _ in _OTHERS
    ]


def _others_nft(lever: Notrack, far: str, there: str, here: str) -> list[str]:
    """Leave packets of the far ends that were remembered tracked: this chain ends for them."""
    return [
        f"{lever.proto} {here} {lever.port} {family} {far} . meta l4proto . th {there} . th {here} "
        f'@{name} accept comment "{_tag(lever, "server", "others")}"'
        for family, name, _ in _OTHERS
    ]


def _icmp_nft(lever: Notrack, role: str) -> list[str]:
    """Errors that quote a packet of ours: bits into the ICMP message, no inner IP options."""
    number = _PROTO_NUMBER[lever.proto]
    sides = {"server": ("sport",), "client": ("dport",), "forward": ("sport", "dport")}.get(role)
    v4 = "icmp type { destination-unreachable, time-exceeded, parameter-problem }"
    v6 = "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem }"
    return [
        rule
        for side in sides or ()
        for rule in (
            f"{v4} @th,136,8 {number} @th,{224 if side == 'sport' else 240},16 {lever.port}",
            f"{v6} @th,112,8 {number} @th,{384 if side == 'sport' else 400},16 {lever.port}",
        )
    ]


def _policy_nft(policy: CtTimeout) -> list[str]:
    return [
        f"meta nfproto {nfproto} {policy.proto} dport {policy.port} {_GATE} "
        f'ct timeout set "{_policy_name(policy, l3proto)}" '
        f'comment "{TAG}timeout:{policy.proto}:{policy.port}"'
        for nfproto, l3proto in (("ipv4", "ip"), ("ipv6", "ip6"))
    ]


def _policy_name(policy: CtTimeout, l3proto: str) -> str:
    return f"{policy.proto}_{policy.port}_{l3proto}"


def _peers_nft(lever: Notrack, role: str, side: str) -> list[str]:
    """Address matches, one a family, each with a trailing space; one empty when unrestricted."""
    if role not in ("client", "forward") or not lever.peers:
        return [""]
    return _addresses_nft(lever.peers, side)


def _addresses_nft(addresses: Iterable[str], side: str) -> list[str]:
    found = []
    for version, family in ((4, "ip"), (6, "ip6")):
        mine = [address for address in addresses if ip_network(address).version == version]
        if mine:
            found.append(f"{family} {side} {{ {', '.join(mine)} }} ")
    return found


def _range(lever: Notrack) -> str:
    return f"{lever.ephemeral[0]}-{lever.ephemeral[1]}"


def _tag(lever: Notrack, role: str, flow: str) -> str:
    return f"{TAG}{role}:{lever.proto}:{lever.port}:{flow}"


# ---- iptables ----------------------------------------------------------------


def iptables_restore(
    plan: Plan, family: str, until: Optional[datetime] = None, *, jumps: bool = True
) -> str:
    """Input for ``iptables-restore -n`` (family ``ip``) or ``ip6tables-restore -n`` (``ip6``).

    Our chains are flushed and filled, so loading it again changes nothing;
    ``jumps`` adds the two jumps to them and must be False when they are there.
    After ``until`` (UTC) the rules stop matching. Raises UsageError for a timeout
    policy, which iptables can only refer to, and for a shared port: it has no chain that
    sees packets after their translation.
    """
    if any(isinstance(lever, CtTimeout) for lever in plan.levers):
        raise UsageError("timeout policies need nftables: leave them out of an iptables plan")
    if any(isinstance(lever, Notrack) and lever.shared for lever in plan.levers):
        raise UsageError("a port that translated connections may use, too, needs nftables")
    lines = ["*raw", *(f":{chain} - [0:0]" for chain in CHAINS)]
    for lever in plan.levers:
        if isinstance(lever, Notrack):
            for chain in CHAINS:
                for match in _notrack_xt(lever, family, chain):
                    lines.append(_line("-A", chain, (*match, *_until(until)), "CT --notrack"))
    if jumps:
        lines += [f"-I {hook} 1 {_jump(chain)}" for hook, chain in _HOOKS_XT]
    return "\n".join([*lines, "COMMIT"]) + "\n"


def iptables_remove() -> str:
    """Input for ``iptables-restore -n`` that removes our chains and the jumps to them."""
    return "\n".join(
        ["*raw"]
        + [f"-D {hook} {_jump(chain)}" for hook, chain in _HOOKS_XT]
        + [f"-F {chain}" for chain in CHAINS]
        + [f"-X {chain}" for chain in CHAINS]
        + ["COMMIT\n"]
    )


def restore_argv(tool: str, family: str) -> tuple[str, ...]:
    """The restore command for a tool (``iptables-nft``, ``iptables-legacy``) and family."""
    variant = "nft" if tool == "iptables-nft" else "legacy"
    command = f"{'ip6' if family == 'ip6' else 'ip'}tables-{variant}-restore"
    return (command, "-n") if variant == "nft" else (command, "-n", "-w")


def iptables_accepts(plan: Plan, tool: str, family: str, *, remove: bool = False) -> str:
    """Input for the restore command that adds (or removes) the accepts in that tool's chains.

    Empty when the plan has none there.
    """
    found = [
        (accept, lever)
        for lever in plan.levers
        if isinstance(lever, Notrack)
        for accept in lever.accepts
        if (accept.tool, accept.family) == (tool, family)
    ]
    found.sort(key=lambda pair: pair[0].position, reverse=True)
    tables: dict[str, list[str]] = {}
    for accept, lever in found:
        verb = "-D" if remove else "-A" if accept.position < 0 else "-I"
        at = accept.chain if verb != "-I" else f"{accept.chain} {accept.position + 1}"
        for match in iptables_accept_rules(lever, accept):
            tables.setdefault(accept.table, []).append(_line(verb, at, match, "ACCEPT"))
    return "".join(
        "\n".join([f"*{table}", *lines, "COMMIT"]) + "\n" for table, lines in tables.items()
    )


def iptables_accept_rules(lever: Notrack, accept: Accept) -> list[tuple[str, ...]]:
    """An accept as iptables matches, without chain and target."""
    comment = _comment(_tag(lever, accept.role, accept.flow))
    icmp = accept.flow == "icmp"
    state = ("-m", "conntrack", "--ctstate", icmp_state(lever).upper() if icmp else "UNTRACKED")
    if icmp:
        return [(*match, *state, *comment) for match in _icmp_xt(lever, accept.role, accept.family)]
    side, far = ("--dport", "--sport") if accept.flow == "to" else ("--sport", "--dport")
    match: tuple[str, ...] = ("-p", lever.proto, "-m", lever.proto, side, str(lever.port))
    if accept.role == "client":
        match += (far, _range_xt(lever))
    if accept.role in ("client", "forward") and accept.flow == "from" and lever.proto == "tcp":
        match += _NOT_SYN_XT[2:]
    if accept.role == "loopback":
        lo = {"input": ("-i", "lo"), "output": ("-o", "lo")}.get(accept.hook, ())
        match = (*lo, *match)
    peers = _peers_xt(lever, accept.role, accept.family, "-d" if accept.flow == "to" else "-s")
    version = 6 if accept.family == "ip6" else 4
    sources: list[tuple[str, ...]] = [
        ("-s", source) for source in accept.sources if ip_network(source).version == version
    ]
    devices: list[tuple[str, ...]] = [("-i", name) for name in accept.devices]
    if not accept.sources:
        sources = [()]
    return [
        (*device, *source, *peer, *match, *state, *comment)
        for device in devices or [()]
        for source in sources
        for peer in peers
    ]


_HOOKS_XT: Final = (("PREROUTING", "CTRACE_PRE"), ("OUTPUT", "CTRACE_OUT"))


def _jump(chain: str) -> str:
    return f'-m comment --comment "{TAG}jump" -j {chain}'


def _line(verb: str, chain: str, match: tuple[str, ...], target: str) -> str:
    return " ".join((verb, chain, *match, "-j", target))


def _comment(text: str) -> tuple[str, ...]:
    return ("-m", "comment", "--comment", f'"{text}"')


def _until(until: Optional[datetime]) -> tuple[str, ...]:
    if until is None:
        return ()
    stop = until.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    return ("-m", "time", "--datestop", stop)


def _notrack_xt(lever: Notrack, family: str, chain: str) -> list[tuple[str, ...]]:
    proto = ("-p", lever.proto, "-m", lever.proto)
    to = (*proto, "--dport", str(lever.port))
    back = (*proto, "--sport", str(lever.port))
    near = ("-m", "addrtype", "--dst-type", "LOCAL")
    away = ("-m", "addrtype", "!", "--dst-type", "LOCAL")
    lo = ("-o", "lo")
    pre = chain == CHAINS[0]
    rules: list[tuple[str, ...]] = []

    def add(role: str, flow: str, *matches: tuple[str, ...]) -> None:
        rules.extend((*match, *_comment(_tag(lever, role, flow))) for match in matches)

    for role in lever.roles:
        sent, got = (_peers_xt(lever, role, family, side) for side in ("-d", "-s"))
        if role == "server":
            if pre:
                add(role, "to", (*to, *near))
            else:
                add(role, "from", back)
                add(role, "lo", (*lo, *to))
        elif role == "client":
            if pre:
                far = ("--dport", _range_xt(lever))
                add(role, "from", *((*p, *back, *far, *near) for p in got))
            else:
                add(role, "to", *((*p, *to, "--sport", _range_xt(lever)) for p in sent))
        elif role == "forward" and pre:
            add(role, "to", *((*p, *to, *away) for p in sent))
            add(role, "from", *((*p, *back, *away) for p in got))
        elif role == "loopback" and not pre:
            add(role, "to", (*lo, *to))
            add(role, "from", (*lo, *back))
        if lever.icmp and (pre or role == "forward"):
            here = () if role == "forward" else near
            add(role, "icmp", *((*match, *here) for match in _icmp_xt(lever, role, family)))
    return rules


def _icmp_xt(lever: Notrack, role: str, family: str) -> list[tuple[str, ...]]:
    """As :func:`_icmp_nft`; xt_u32 counts bytes, from the start of the outer IP header."""
    number = _PROTO_NUMBER[lever.proto]
    sides = {"server": ("sport",), "client": ("dport",), "forward": ("sport", "dport")}.get(role)
    rules: list[tuple[str, ...]] = []
    for side in sides or ():
        port = ">>16" if side == "sport" else "&0xFFFF"
        if family == "ip6":
            # 40 bytes of IPv6, 8 of ICMPv6, then the inner header: next header at 54, ports at 88.
            types = ("destination-unreachable", "packet-too-big", "time-exceeded")
            match = f'"51&0xFF={number}&&88{port}={lever.port}"'
            for name in (*types, "parameter-problem"):
                icmp = ("-p", "ipv6-icmp", "-m", "icmp6", "--icmpv6-type", name)
                rules.append((*icmp, "-m", "u32", "--u32", match))
        else:
            # 0>>22&0x3C@ skips the outer header: inner protocol at 17, ports at 28.
            match = f'"0>>22&0x3C@14&0xFF={number}&&0>>22&0x3C@28{port}={lever.port}"'
            for name in ("destination-unreachable", "time-exceeded", "parameter-problem"):
                icmp = ("-p", "icmp", "-m", "icmp", "--icmp-type", name)
                rules.append((*icmp, "-m", "u32", "--u32", match))
    return rules


def _peers_xt(lever: Notrack, role: str, family: str, side: str) -> list[tuple[str, ...]]:
    if role not in ("client", "forward") or not lever.peers:
        return [()]
    version = 6 if family == "ip6" else 4
    return [(side, peer) for peer in lever.peers if ip_address(peer).version == version]


def _range_xt(lever: Notrack) -> str:
    return f"{lever.ephemeral[0]}:{lever.ephemeral[1]}"


# ---- afterwards --------------------------------------------------------------


def flush_commands(plan: Plan) -> list[tuple[str, ...]]:
    """``conntrack -D`` for the entries that stay behind: to be run after the rules are in.

    Without it relief takes the old entries' timeouts, and connections that were
    ESTABLISHED leave theirs for nf_conntrack_tcp_timeout_established (5 days).
    """
    commands: list[tuple[str, ...]] = []
    for lever in plan.levers:
        if not isinstance(lever, Notrack):
            continue
        port = ("-p", lever.proto, "--orig-port-dst", str(lever.port))
        for address in lever.addresses:
            family = ("-f", "ipv6" if ip_address(address).version == 6 else "ipv4")
            if {"server", "loopback"} & set(lever.roles):
                commands.append(("conntrack", "-D", *family, *port, "-d", address))
            if "client" in lever.roles:
                commands.append(("conntrack", "-D", *family, *port, "-s", address))
        if "forward" in lever.roles or not lever.addresses:
            commands += [("conntrack", "-D", "-f", name, *port) for name in ("ipv4", "ipv6")]
    return commands


def undo_line(plan: Plan) -> str:
    """What a person types to remove ctrace's own rules of this plan without ctrace."""
    if plan.backend == "nft":
        return f"nft delete table inet {TABLE}"
    return "; ".join(
        f"{argv[0]} -t raw -D {hook} {_jump(chain)}"
        for argv in (_tables_argv(plan.backend, family) for family in ("ip", "ip6"))
        for hook, chain in _HOOKS_XT
    )


def _tables_argv(tool: str, family: str) -> tuple[str, ...]:
    return (restore_argv(tool, family)[0].removesuffix("-restore"),)
