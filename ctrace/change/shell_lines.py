"""What is run once a plan's rules are in, and what removes them by hand."""

from __future__ import annotations

from ipaddress import ip_address

from ctrace.change.plan import Notrack, Plan
from ctrace.ruleset import notrack_iptables
from ctrace.ruleset.notrack import TABLE


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
        f"{argv[0]} -t raw -D {hook} {notrack_iptables.jump(chain)}"
        for argv in (_tables_argv(plan.backend, family) for family in ("ip", "ip6"))
        for hook, chain in notrack_iptables.HOOKS
    )


def _tables_argv(tool: str, family: str) -> tuple[str, ...]:
    return (notrack_iptables.restore_argv(tool, family)[0].removesuffix("-restore"),)
