"""``ctrace applied``: list what ctrace has applied, from the kernel's own rules."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Optional

import click

from ctrace.cli.options import answer_options, need_root, netns_option
from ctrace.cli.output import number

if TYPE_CHECKING:
    from ctrace.change.undo import Applied


@click.command()
@netns_option("Only in this namespace")
@answer_options("text", "json")
def command(netns: Optional[str], format: str) -> None:
    """List what ctrace has applied: where, what, until when, and how much it caught."""
    from ctrace.change.undo import applied
    from ctrace.host.netns import resolve

    need_root("reading every namespace's rules")
    changes = applied(resolve(netns) if netns else None)
    if format == "json":
        click.echo(json.dumps([_json(change) for change in changes], indent=2))
        return
    if not changes:
        click.echo("Nothing of ctrace is applied.")
    for change in changes:
        click.echo(f"{change.namespace.name}: {_state(change)}")
        for rule in change.installed.rules:
            count = "" if rule.packets is None else f"  {number(rule.packets)} packets"
            click.echo(f"  {rule.tool} {rule.family} {rule.table} {rule.chain}  {rule.tag}{count}")


def _state(change: Applied) -> str:
    left = change.installed.seconds_left
    if change.installed.state == "trial":
        return f"on trial, reverts by itself in {left:.0f} s unless confirmed"
    if change.installed.state == "expired":
        return "a trial that is over: its rules are off, ctrace undo removes them"
    return "confirmed"


def _json(change: Applied) -> dict[str, Any]:
    return {
        "netns": change.namespace.inum,
        "name": change.namespace.name,
        "state": change.installed.state,
        "seconds_left": change.installed.seconds_left,
        "services": list(change.installed.services),
        "rules": [
            {
                "tool": rule.tool,
                "family": rule.family,
                "table": rule.table,
                "chain": rule.chain,
                "comment": rule.tag,
                "packets": rule.packets,
            }
            for rule in change.installed.rules
        ],
    }
