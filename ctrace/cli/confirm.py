"""``ctrace confirm``: keep what apply put in place."""

from __future__ import annotations

from typing import Optional

import click

from ctrace.cli.options import need_root
from ctrace.errors import CtraceError


@click.command()
@click.argument("plan", required=False, type=click.Path(dir_okay=False), metavar="[PLAN]")
@click.option("--netns", metavar="NAME", help="Which namespace's trial: name, path, pid or inode.")
@click.option(
    "--flush/--no-flush", default=None, help="Delete the services' old entries (as apply was told)."
)
def command(plan: Optional[str], netns: Optional[str], flush: Optional[bool]) -> None:
    """Keep the change that is on trial.

    Without PLAN or --netns it is the only trial that runs.
    """
    from ctrace.change import apply
    from ctrace.change.undo import applied

    need_root("changing rules")
    if netns is not None:
        from ctrace.host.netns import resolve

        inum = resolve(netns)
    elif plan is not None:
        inum = _netns_of(plan)
    else:
        trials = [change for change in applied() if change.installed.state == "trial"]
        if not trials:
            raise CtraceError("no trial is running: ctrace applied lists what is there")
        if len(trials) > 1:
            names = ", ".join(change.namespace.name for change in trials)
            raise CtraceError(f"several trials are running: name one with --netns ({names})")
        inum = trials[0].namespace.inum
    _, flushed = apply.confirm(inum, flush=flush)
    click.echo("\n".join(["Confirmed: it stays until ctrace undo or a reboot.", *flushed]))


def _netns_of(path: str) -> int:
    from ctrace.change.plan import from_json
    from ctrace.errors import UsageError

    try:
        with open(path, encoding="utf-8") as file:
            return from_json(file.read((1 << 20) + 1)).netns
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a plan: it is not text") from None
