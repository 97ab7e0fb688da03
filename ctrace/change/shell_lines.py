"""Commands to run once a plan's rules are in place, and to remove them by hand."""

from __future__ import annotations

from ipaddress import ip_address

from ctrace.dropping import Drop
from ctrace.plan.plan import Notrack, Plan
from ctrace.ruleset import notrack_iptables
from ctrace.ruleset.notrack import CHAINS, TABLE, TAG


def flush_commands(plan: Plan) -> list[tuple[str, ...]]:
    """``conntrack -D`` for the entries that stay behind: to be run after the rules are in.

    Without it relief takes the old entries' timeouts, and connections that were
    ESTABLISHED leave theirs for nf_conntrack_tcp_timeout_established (5 days).
    """
    commands: list[tuple[str, ...]] = []
    for lever in plan.levers:
        if isinstance(lever, Drop):
            commands += _dropped(lever)
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


def _dropped(drop: Drop) -> list[tuple[str, ...]]:
    """Of what is dropped from now on; a limit leaves open connections alone."""
    if drop.rate:
        return []
    if drop.sources:
        return [
            ("conntrack", "-D", "-f", "ipv6" if ":" in one else "ipv4", "-s", one)
            for one in drop.sources
        ]
    port = ("-p", drop.proto, "--orig-port-dst", str(drop.port))
    return [("conntrack", "-D", "-f", name, *port) for name in ("ipv4", "ipv6")]


def undo_line(plan: Plan) -> str:
    """One shell line that removes all of this plan's rules without ctrace.

    Accepts in other tables are found by their comments and deleted as the tool itself prints them,
    so the line still works after other rules came and went.
    """
    steps = []
    if plan.backend == "nft":
        steps.append(f"nft delete table inet {TABLE}")
    else:
        flush = "".join(f'echo "-F {chain}"; ' for chain in CHAINS)
        for family in ("ip", "ip6"):
            steps.append(_taken_out(plan.backend, family, "raw", f"{TAG}jump", flush))
            command = notrack_iptables.restore_argv(plan.backend, family)[0]
            tables = command.replace("-restore", "")
            steps += [f"{tables} -w -t raw -X {chain}" for chain in CHAINS]
    accepts = [
        accept for lever in plan.levers if isinstance(lever, Notrack) for accept in lever.accepts
    ]
    places = dict.fromkeys((a.tool, a.family, a.table, a.chain) for a in accepts)
    steps += [
        f'nft -a list chain {family} {table} {chain} | sed -n "s/.* comment .{TAG}.* # handle '
        f'\\([0-9]*\\)$/delete rule {family} {table} {chain} handle \\1/p" | nft -f -'
        for tool, family, table, chain in places
        if tool == "nft"
    ]
    for tool, family, table in dict.fromkeys(place[:3] for place in places):
        if tool != "nft":
            steps.append(_taken_out(tool, family, table, TAG))
    return "; ".join(steps)


def _taken_out(tool: str, family: str, table: str, tag: str, more: str = "") -> str:
    """What takes all rules with such a comment out of a table of iptables, as often as they are
    there, in one transaction; ``more``: what prints further lines of it."""
    command, *flags = notrack_iptables.restore_argv(tool, family)
    save = command.replace("-restore", "-save")
    found = f'sed -n "/--comment .\\{{0,1\\}}{tag}/s/^-A /-D /p"'
    return (
        f'{{ echo "*{table}"; {save} -t {table} | {found}; {more}echo COMMIT; }} | '
        f"{' '.join((command, *flags))}"
    )
