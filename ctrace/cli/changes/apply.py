"""``ctrace apply``: put a plan in place, watched, reverting by itself unless confirmed."""

from __future__ import annotations

import select
import shlex
import sys
import time

import click

from ctrace.cli.kinds import Time
from ctrace.cli.options import say
from ctrace.errors import CtraceError, UsageError
from ctrace.interpreter import called


@click.command()
@click.argument("plan", type=click.Path(readable=False), metavar="PLAN")
@click.option("--yes", "-y", is_flag=True, help="Do not ask; keep it later with ctrace confirm.")
@click.option(
    "--confirm-within",
    type=Time(),
    default="2m",
    show_default=True,
    help="Revert by itself after this time unless confirmed.",
)
@click.option("--flush", is_flag=True, help="Once confirmed, delete the services' old entries.")
@click.option("--dry-run", is_flag=True, help="Check and show everything; change nothing.")
def command(plan: str, yes: bool, confirm_within: float, flush: bool, dry_run: bool) -> None:
    """Apply a PLAN made by ``ctrace advise``.

    The plan is shown in full first. Unless you confirm the change in time, the kernel itself
    takes it back, even if ctrace or your connection to this host dies. Until then a separate
    process watches, even with --yes: it reads the host's counters and, where there is no
    load, opens test connections. A change that makes things worse is taken back within two
    seconds.
    """
    from ctrace.advice.again import judge_plan
    from ctrace.change import apply, keep, plan_file

    if not apply.SHORTEST_S <= confirm_within <= apply.LONGEST_S:
        raise UsageError(
            f"the time to confirm must be from {apply.SHORTEST_S} to {apply.LONGEST_S} seconds"
        )
    within = round(confirm_within)
    wanted = plan_file.read(plan, unasked=yes and not dry_run)
    prepared = apply.prepare(wanted, judge_plan)
    say(apply.describe(prepared.plan, within, prepared.enter))
    for warning in prepared.warnings:
        say(f"Warning: {warning}.", err=True)
    if prepared.present == "permanent":
        say("This plan is applied and confirmed already: nothing to do.")
        return
    if dry_run:
        say("Checked: the kernel would take it. Nothing was changed.")
        return
    if not yes and not _wanted():
        raise CtraceError("nothing was changed")
    trial = apply.start(prepared, within, flush=flush)
    settled = False
    try:
        _checked(trial)
        if yes:
            settled = True
            _pending(plan, trial.seconds_left)
            return
        settled = _ask(trial)
    finally:
        if not settled and apply.revert(trial):
            say("Taken back: the rules are as they were.", err=True)
    if settled:
        kept, flushed = apply.confirm(wanted.netns)
        say("\n".join([f"Confirmed. {keep.stays(kept)}", *flushed]))


def _wanted() -> bool:
    """Ask. Raises CtraceError where nobody can answer."""
    try:
        return click.confirm("Apply it?", default=False)
    except click.Abort:
        if sys.stdin.isatty():
            raise
    say("")
    raise CtraceError("nothing was changed: nobody is here to answer; -y applies it without asking")


def _checked(trial: object) -> None:
    """Run one check and report it. Raises CtraceError when something got worse."""
    from ctrace.change import apply

    assert isinstance(trial, apply.Trial)
    verdict = apply.check(trial)
    for line in verdict.seen:
        say(f"  {line}")
    if verdict.worse:
        raise CtraceError("it made things worse: " + "; ".join(verdict.worse))
    tracked = [lever for lever in trial.prepared.plan.levers if lever.kind != "drop"]
    if tracked and not verdict.proven:
        say("  No complete traffic of the services passed yet: not proven, still watching.")


def _ask(trial: object) -> bool:
    """Ask whether to keep it; its guard watches meanwhile."""
    from ctrace.change import apply

    assert isinstance(trial, apply.Trial)
    click.echo(
        f"Keep it? Type yes within {trial.seconds_left:.0f} s; anything else takes it back: ",
        nl=False,
    )
    while trial.seconds_left > 1:
        ready, _, _ = select.select([sys.stdin], [], [], 0.5)
        if ready:
            return sys.stdin.readline().strip().lower() in ("y", "yes")
        over = apply.fate(trial)
        if over:
            say("")
            raise CtraceError(over)
    say("")
    return False


def _pending(plan: str, left: float) -> None:
    at = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
    say(
        f"In place, and nothing got worse. It reverts by itself at {at} unless you run: "
        f"{called()} confirm{'' if plan == '-' else ' ' + shlex.quote(plan)}"
    )
