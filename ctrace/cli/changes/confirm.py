"""``ctrace confirm``: keep what apply put in place."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Optional

import click

from ctrace.cli.options import need_root, netns_option, say
from ctrace.errors import CtraceError, UsageError
from ctrace.interpreter import called

if TYPE_CHECKING:
    from ctrace.change.undo import Applied
    from ctrace.plan.plan import Plan


@click.command()
@click.argument("plan", required=False, type=click.Path(readable=False), metavar="[PLAN]")
@netns_option("Which namespace's trial")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option(
    "--flush/--no-flush",
    default=None,
    help="Delete the services' old entries [default: as given to apply].",
)
def command(plan: Optional[str], netns: Optional[str], yes: bool, flush: Optional[bool]) -> None:
    """Keep the change that is on trial.

    On a terminal it says what it will keep and where, and asks. Without a terminal it needs
    -y. If several trials are running, name one: its PLAN, or its namespace with --netns.
    """
    from ctrace.change import apply, keep
    from ctrace.change.undo import applied

    need_root("changing rules")
    inum = None
    if netns is not None:
        from ctrace.host.netns import resolve

        inum = resolve(netns)
    wanted = _read(plan, inum) if plan is not None else None
    if wanted is not None:
        inum = wanted.netns
    unread: list[str] = []
    found = applied(inum, unread if inum is None else None)
    for line in unread:
        say(f"Warning: {line}.", err=True)
    trials = [change for change in found if change.installed.state == "trial"]
    if trials and wanted is not None:
        _compare(str(plan), wanted, trials[0])
    if inum is None:
        if not trials:
            raise CtraceError("no trial is running: ctrace applied lists what is there")
        if len(trials) > 1:
            raise CtraceError(several("trials are running", trials))
        inum = trials[0].namespace.inum
        if not yes and not sys.stdin.isatty():
            raise CtraceError(
                f"one trial is running ({what(trials[0])}): name it with --netns, or add -y"
            )
    for trial in trials:
        say(f"Keep {what(trial)}.")
    if trials and not yes and sys.stdin.isatty() and not click.confirm("Keep it?", default=False):
        raise CtraceError("nothing was confirmed: it still reverts by itself")
    plan_kept, said = apply.confirm(inum, flush=flush)
    say("\n".join([f"Confirmed. {keep.stays(plan_kept)}", *said]))


def _read(path: str, inum: Optional[int]) -> Plan:
    """The plan named on the command line. Raises UsageError when it is for a namespace other than
    the one named beside it."""
    from ctrace.change import plan_file

    wanted = plan_file.read(path)
    if inum not in (None, wanted.netns):
        raise UsageError(f"{path} is a plan for {wanted.netns_name}: leave out --netns")
    return wanted


def _compare(path: str, wanted: Plan, trial: Applied) -> None:
    """Raise CtraceError when another plan than this one is on trial."""
    from ctrace.change.steps import named
    from ctrace.plan.plan import from_json

    if trial.note is None:
        return
    there = from_json(trial.note.plan)
    if sorted(map(named, there.levers)) != sorted(map(named, wanted.levers)):
        raise CtraceError(
            f"{path} is not what is on trial ({what(trial)}): "
            f"{called()} confirm --netns {there.netns} keeps that"
        )


def what(change: Applied) -> str:
    """``server tcp/80 in web (3 rules)``: a change in words."""
    services = ", ".join(change.installed.services) or "nothing but an empty table or chains"
    return f"{services} in {change.namespace.name} ({len(change.installed.rules)} rules)"


def nothing(unread: list[str]) -> str:
    """That nothing was found, where some namespaces may not have been read."""
    return f"Nothing of ctrace is applied{' in those that could be read' if unread else ''}."


def tell_failed(lines: list[str]) -> None:
    """Tell what could not be done, a line each, and end with status 1; nothing, if all was."""
    for line in lines[:-1]:
        say(f"Error: {line}", err=True)
    if lines:
        raise CtraceError(lines[-1])


def several(are: str, changes: list[Applied]) -> str:
    """The error when none of several trials was named."""
    names = "; ".join(what(change) for change in changes)
    return f"several {are}: name one with --netns ({names})"
