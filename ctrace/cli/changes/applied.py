"""``ctrace applied``: list what ctrace has applied, from the kernel's own rules."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Optional

import click

from ctrace.cli.changes.confirm import nothing, tell_failed
from ctrace.cli.options import answer_options, need_root, netns_option
from ctrace.cli.output import number

if TYPE_CHECKING:
    from ctrace.change.condition import Condition
    from ctrace.change.undo import Applied


@click.command()
@netns_option("Only in this namespace")
@answer_options("text", "json")
def command(netns: Optional[str], format: str) -> None:
    """List what ctrace has applied: where, what, until when, and how much it caught.

    It says when a change is not in force: its accepts are missing, its services are tracked
    for now, or something else removed it. If the rules around a change are no longer those
    that it was judged by, it is judged again.
    """
    from ctrace.advice.again import objection
    from ctrace.change.condition import OFF, OVER, conditions
    from ctrace.change.undo import applied
    from ctrace.host.netns import resolve

    need_root("reading every namespace's rules")
    only = resolve(netns) if netns else None
    unread: list[str] = []
    changes = applied(only, unread if only is None else None)
    known = {one.netns: one for one in conditions(objection) if only in (None, one.netns)}
    there = {change.namespace.inum for change in changes}
    gone = [one for one in known.values() if one.netns not in there and one.state in (OFF, OVER)]
    if format == "json":
        found = [_json(change, known.get(change.namespace.inum)) for change in changes]
        click.echo(json.dumps(found + [_gone(one) for one in gone], indent=2))
        tell_failed(unread)
        return
    if not changes and not gone:
        click.echo(nothing(unread))
    for change in changes:
        click.echo(f"{change.namespace.name}: {_state(change, known.get(change.namespace.inum))}")
        for rule in change.installed.rules:
            count = "" if rule.packets is None else f"  {number(rule.packets)} packets"
            count += " dropped" if count and rule.drops else ""
            click.echo(f"  {rule.tool} {rule.family} {rule.table} {rule.chain}  {rule.tag}{count}")
    for one in gone:
        until = "any more" if one.state == OVER else "for now"
        click.echo(
            f"{one.name}: nothing is applied {until} ({', '.join(one.services)}): {one.told}"
        )
    tell_failed(unread)


def _state(change: Applied, known: Optional[Condition]) -> str:
    left = change.installed.seconds_left
    told = f"; {known.told}" if known and known.told else ""
    if change.installed.state == "trial":
        return f"on trial, reverts by itself in {left:.0f} s unless confirmed{told}"
    if known and known.state in ("off", "broken"):
        return f"confirmed, but {known.told}"
    if change.installed.state == "expired":
        return "a trial that is over: its rules are off, ctrace undo removes them"
    return f"confirmed{told}"


def _json(change: Applied, known: Optional[Condition]) -> dict[str, Any]:
    return {
        "netns": change.namespace.inum,
        "name": change.namespace.name,
        "state": change.installed.state,
        "condition": known.state if known else None,
        "told": known.told if known else "",
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


def _gone(one: Condition) -> dict[str, Any]:
    return {
        "netns": one.netns,
        "name": one.name,
        "state": "nothing",
        "condition": one.state,
        "told": one.told,
        "seconds_left": None,
        "services": list(one.services),
        "rules": [],
    }
