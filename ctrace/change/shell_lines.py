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
        steps += [
            f"{argv[0]} -t raw -D {hook} {notrack_iptables.jump(chain)}"
            for argv in (_tables_argv(plan.backend, family) for family in ("ip", "ip6"))
            for hook, chain in notrack_iptables.HOOKS
        ]
        steps += [
            f"{_tables_argv(plan.backend, family)[0]} -t raw -{verb} {chain}"
            for family in ("ip", "ip6")
            for chain in CHAINS
            for verb in ("F", "X")
        ]
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
            command, *flags = notrack_iptables.restore_argv(tool, family)
            save = command.replace("-restore", "-save")
            found = f'sed -n "/--comment .\\{{0,1\\}}{TAG}/s/^-A /-D /p"'
            steps.append(
                f'{{ echo "*{table}"; {save} -t {table} | {found}; echo COMMIT; }} | '
                f"{' '.join((command, *flags))}"
            )
    return "; ".join(steps)


def _tables_argv(tool: str, family: str) -> tuple[str, ...]:
    return (notrack_iptables.restore_argv(tool, family)[0].removesuffix("-restore"),)
