"""A plan's rules as input of iptables-restore and ip6tables-restore."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from ipaddress import ip_address, ip_network
from typing import Final, Optional

from ctrace.dropping import Drop
from ctrace.errors import UsageError
from ctrace.plan.plan import Accept, CtTimeout, Notrack, Plan
from ctrace.plan.terms import Term
from ctrace.ruleset.notrack import (
    AWAY,
    CHAINS,
    ENDS,
    LO,
    NEAR,
    OUT,
    PRE,
    PROTO_NUMBER,
    QUOTED,
    TAG,
    WIRE,
    Packets,
    far_ports,
    icmp_state,
    packets_of,
    peers_of,
    tag_of,
)

_NOT_SYN: Final = ("!", "--tcp-flags", "SYN,ACK", "SYN")
_WHERE: Final = {
    NEAR: ("-m", "addrtype", "--dst-type", "LOCAL"),
    AWAY: ("-m", "addrtype", "!", "--dst-type", "LOCAL"),
}
LEASED: Final = "2000-01-01T00:00:00"
"""The first day of rules that are renewed; no other rules have it."""
_OVER: Final = {NEAR: ("!", "-i", "lo"), LO: ("-o", "lo"), WIRE: ("!", "-o", "lo")}
_ADDRESS: Final = {"saddr": "-s", "daddr": "-d"}


def restore(
    plan: Plan,
    family: str,
    until: Optional[datetime] = None,
    *,
    jumps: bool = True,
    lease: bool = False,
) -> str:
    """Input for ``iptables-restore -n`` (family ``ip``) or ``ip6tables-restore -n`` (``ip6``).

    Our chains are flushed and filled, so loading it again changes nothing;
    ``jumps`` adds the two jumps to them and must be False when they are there.
    After ``until`` (UTC) the rules stop matching; with ``lease`` they are marked as rules that are
    renewed before. Raises UsageError for a timeout
    policy, which iptables can only refer to, for a drop, and for a shared port: it has no
    chain that sees packets after their translation.
    """
    if any(isinstance(lever, CtTimeout) for lever in plan.levers):
        raise UsageError("timeout policies need nftables: leave them out of an iptables plan")
    if any(isinstance(lever, Drop) for lever in plan.levers):
        raise UsageError("drops and limits need nftables: leave them out of an iptables plan")
    if any(isinstance(lever, Notrack) and lever.shared for lever in plan.levers):
        raise UsageError("a port that translated connections may also use needs nftables")
    lines = ["*raw", *(f":{chain} - [0:0]" for chain in CHAINS)]
    for lever in plan.levers:
        if isinstance(lever, Notrack):
            for hook, chain in zip((PRE, OUT), CHAINS):
                for match in _notrack(lever, family, hook):
                    lines.append(
                        _line("-A", chain, (*match, *_until(until, lease)), "CT --notrack")
                    )
    if jumps:
        lines += [f"-I {hook} 1 {jump(chain)}" for hook, chain in HOOKS]
    return "\n".join([*lines, "COMMIT"]) + "\n"


def remove() -> str:
    """Input for ``iptables-restore -n`` that removes our chains and the jumps to them."""
    return "\n".join(
        ["*raw"]
        + [f"-D {hook} {jump(chain)}" for hook, chain in HOOKS]
        + [f"-F {chain}" for chain in CHAINS]
        + [f"-X {chain}" for chain in CHAINS]
        + ["COMMIT\n"]
    )


def restore_argv(tool: str, family: str) -> tuple[str, ...]:
    """The restore command for a tool (``iptables-nft``, ``iptables-legacy``) and family."""
    variant = "nft" if tool == "iptables-nft" else "legacy"
    command = f"{'ip6' if family == 'ip6' else 'ip'}tables-{variant}-restore"
    return (command, "-n") if variant == "nft" else (command, "-n", "-w")


def accepts(plan: Plan, tool: str, family: str, *, remove: bool = False) -> str:
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
        for match in accept_rules(lever, accept):
            tables.setdefault(accept.table, []).append(_line(verb, at, match, "ACCEPT"))
    return "".join(
        "\n".join([f"*{table}", *lines, "COMMIT"]) + "\n" for table, lines in tables.items()
    )


def accept_rules(lever: Notrack, accept: Accept) -> list[tuple[str, ...]]:
    """An accept as iptables matches, without chain and target."""
    comment = _comment(tag_of(lever, accept.role, accept.flow))
    icmp = accept.flow == "icmp"
    state = ("-m", "conntrack", "--ctstate", icmp_state(lever).upper() if icmp else "UNTRACKED")
    if icmp:
        return [(*match, *state, *comment) for match in _icmp(lever, accept.role, accept.family)]
    match = _ports(lever, accept.flow, accept.role)
    own = accept.terms
    later = [term for term in own if term.field == "later"]
    if accept.flow == "from" and lever.proto == "tcp":
        match += _NOT_SYN  # and flags can be asked for once only
        own = tuple(term for term in own if term.field != "later")
    if later and (lever.proto != "tcp" or (accept.flow == "from" and later[0].negate)):
        return []
    peers = _peers(lever, accept.role, accept.family, _ADDRESS[ENDS[accept.flow].address])
    return [
        (*peer, *match, *terms, *state, *comment)
        for peer in peers
        for terms in _terms(own, accept.family, peer[:1])
    ]


def _terms(
    terms: Iterable[Term], family: str, taken: tuple[str, ...] = ()
) -> list[tuple[str, ...]]:
    """The conditions, as often as one of several values needs a rule of its own.

    ``taken``: an option that a rule has already, and can have only once.
    """
    found: list[tuple[str, ...]] = [()]
    for term in terms:
        word = ("!",) if term.negate else ()
        values = term.values
        choices: list[tuple[str, ...]]
        if term.field in ("saddr", "daddr"):
            version = 6 if family == "ip6" else 4
            mine = [v for v in values if ip_network(v).version == version]
            option = "-s" if term.field == "saddr" else "-d"
            choices = [(*word, option, v) for v in mine]
            if option in taken:
                choices = [("-m", "iprange", *word, *_span(option, v)) for v in mine]
            if not mine and term.negate:
                choices = [()]
        elif term.field in ("iif", "oif"):
            option = "-i" if term.field == "iif" else "-o"
            choices = [(*word, option, v.replace("*", "+")) for v in values]
        elif term.field == "set":
            sides, name = values[0].split(" @")
            choices = [("-m", "set", *word, "--match-set", name, sides)] if " " not in sides else []
        elif term.field == "family":
            choices = [()] if (values[0] == family) != term.negate else []
        elif term.field == "type":
            side = "--src-type" if values[0].startswith("saddr") else "--dst-type"
            choices = [("-m", "addrtype", *word, side, "LOCAL")]
        elif term.field == "mark":
            choices = [("-m", "mark", *word, "--mark", values[0])]
        elif term.field == "later":
            choices = [_NOT_SYN[1:] if term.negate else _NOT_SYN]
        elif term.field in ("uid", "gid"):
            choices = [("-m", "owner", *word, f"--{term.field}-owner", v) for v in values]
        else:
            choices = [("-m", "multiport", *word, f"--{term.field}s", values[0].replace("-", ":"))]
        found = [(*one, *more) for one in found for more in choices]
    return found


def _span(option: str, prefix: str) -> tuple[str, str]:
    net = ip_network(prefix)
    return f"--{'src' if option == '-s' else 'dst'}-range", f"{net[0]}-{net[-1]}"


HOOKS: Final = (("PREROUTING", "CTRACE_PRE"), ("OUTPUT", "CTRACE_OUT"))


def jump(chain: str) -> str:
    """The jump to one of our chains."""
    return f'-m comment --comment "{TAG}jump" -j {chain}'


def _line(verb: str, chain: str, match: tuple[str, ...], target: str) -> str:
    return " ".join((verb, chain, *match, "-j", target))


def _comment(text: str) -> tuple[str, ...]:
    return ("-m", "comment", "--comment", f'"{text}"')


def _until(until: Optional[datetime], lease: bool) -> tuple[str, ...]:
    if until is None:
        return ()
    stop = until.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    return ("-m", "time", *(("--datestart", LEASED) if lease else ()), "--datestop", stop)


def _notrack(lever: Notrack, family: str, hook: str) -> list[tuple[str, ...]]:
    return [
        (*match, *_comment(tag_of(lever, packets.role, packets.flow)))
        for packets in packets_of(lever, hook)
        for match in _matches(lever, family, packets)
    ]


def _matches(lever: Notrack, family: str, packets: Packets) -> list[tuple[str, ...]]:
    """Packets as iptables matches: one for each peer, one of ICMP for each type."""
    where = _WHERE.get(packets.where, ())
    over = _OVER.get(packets.where, ())
    if packets.flow == "icmp":
        return [(*over, *match, *where) for match in _icmp(lever, packets.role, family)]
    ports = _ports(lever, packets.flow, packets.role)
    address = _ADDRESS[ENDS[packets.flow].address]
    peers = _peers(lever, packets.role, family, address)
    return [(*peer, *over, *ports, *where) for peer in peers]


def _ports(lever: Notrack, flow: str, role: str) -> tuple[str, ...]:
    """The service's port, and the far ones."""
    ends = ENDS[flow]
    match = ("-p", lever.proto, "-m", lever.proto, f"--{ends.port}", str(lever.port))
    far = far_ports(lever, role)
    return (*match, f"--{ends.far_port}", f"{far[0]}:{far[1]}") if far else match


def _icmp(lever: Notrack, role: str, family: str) -> list[tuple[str, ...]]:
    """As :mod:`ctrace.ruleset.notrack_nft`; xt_u32 counts bytes, from the outer IP header on."""
    number = PROTO_NUMBER[lever.proto]
    rules: list[tuple[str, ...]] = []
    for side in QUOTED.get(role, ()):
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


def _peers(lever: Notrack, role: str, family: str, side: str) -> list[tuple[str, ...]]:
    peers = peers_of(lever, role)
    if not peers:
        return [()]
    version = 6 if family == "ip6" else 4
    return [(side, peer) for peer in peers if ip_address(peer).version == version]
