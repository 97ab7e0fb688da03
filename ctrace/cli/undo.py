"""``ctrace undo``: remove exactly what ctrace applied."""

from __future__ import annotations

from typing import Optional

import click

from ctrace.cli.options import need_root


@click.command()
@click.option("--netns", metavar="NAME", help="Only in this namespace: name, path, pid or inode.")
def command(netns: Optional[str]) -> None:
    """Remove everything that ctrace ever applied, and nothing else.

    Only the table inet ctrace, the chains CTRACE_* and rules whose comment begins
    with ctrace: are touched. Works from the ruleset itself, also after a crash.
    """
    from ctrace.change.undo import undo
    from ctrace.host.netns import resolve

    need_root("changing rules")
    removed = undo(resolve(netns) if netns else None)
    if not removed:
        click.echo("Nothing of ctrace is applied.")
    for change in removed:
        what = ", ".join(change.installed.services) or "empty table or chains"
        click.echo(f"{change.namespace.name}: removed {what} ({len(change.installed.rules)} rules)")
