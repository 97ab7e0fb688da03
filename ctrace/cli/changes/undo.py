"""``ctrace undo``: remove exactly what ctrace applied."""

from __future__ import annotations

import sys
from typing import Optional

import click

from ctrace.cli.changes.confirm import nothing, several, tell_failed, what
from ctrace.cli.options import need_root, netns_option, say
from ctrace.errors import CtraceError, UsageError


@click.command()
@netns_option("Only in this namespace")
@click.option("--all", "every", is_flag=True, help="In every namespace where there is something.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def command(netns: Optional[str], every: bool, yes: bool) -> None:
    """Remove what ctrace applied, and nothing else.

    On a terminal it says what it will remove and where, and asks. Without a terminal it
    removes what is applied in the namespace that it runs in; for another, give --netns,
    --all or -y. If changes are applied in several namespaces, name one or give --all.

    Only the table inet ctrace, the chains CTRACE_* and rules whose comment begins with
    ctrace: are touched. They are found in the ruleset itself, so undo works after a crash.
    TCP connections that this host opened untracked continue: ctrace creates entries for them.
    """
    from ctrace.change.undo import applied, sweep, take_away
    from ctrace.host.netns import resolve

    if netns and every:
        raise UsageError("--netns is one namespace and --all is every one: give one of the two")
    need_root("changing rules")
    only = resolve(netns) if netns else None
    failed: list[str] = []
    there = applied(only, failed if only is None else None)
    sweep()
    if len(there) > 1 and not every:
        raise CtraceError(several("changes are applied", there) + ", or give --all")
    here = there and there[0].namespace.inum == resolve("/proc/self/ns/net")
    if there and not (here or only or every or yes or sys.stdin.isatty()):
        raise CtraceError(
            f"one change is applied ({what(there[0])}): name it with --netns, or add -y"
        )
    for change in there:
        say(f"Remove {what(change)}.")
    if there and not yes and sys.stdin.isatty() and not click.confirm("Remove?", default=True):
        raise CtraceError("nothing was changed")
    alone = there[0].namespace.inum if len(there) == 1 else only
    removed = take_away(there, alone, failed)
    if not removed and not there:
        say(nothing(failed))
    for change in removed:
        services = ", ".join(change.installed.services) or "empty table or chains"
        rules = len(change.installed.rules)
        say(f"{change.namespace.name}: removed {services} ({rules} rules)")
    tell_failed(failed)
