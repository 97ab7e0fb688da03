"""Advice as text: what to do first, why, the rules, and further remedies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ctrace.advice.result import GOOD, Advice, Candidate, TableAdvice, blocks, flush_lines
from ctrace.change.steps import block
from ctrace.model.snapshot import Remedy as Helps
from ctrace.plan.plan import CtTimeout, Lever, alone
from ctrace.view import format as fmt
from ctrace.view.prose import prose
from ctrace.view.report.whatif_text import rising_text
from ctrace.view.screen.advice import Remedy

STYLE = {
    "safe": "green",
    "safe-with-rules": "green",
    "warn": "yellow",
    "cannot-say": "yellow",
    "unsafe": "red",
}
SHOWN = 8
"""Candidates shown; JSON has all."""


def advice_text(advice: Advice, width: int = 100, *, full: bool = False) -> str:
    """The advice in plain words, for a width. ``full`` prints the rules of every candidate."""
    # Without a colour system no style leaves an escape sequence, wherever this runs.
    console = Console(width=width, color_system=None, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(render(advice, full=full), crop=False)
    return capture.get()


def advice_lines(advice: Advice, width: int, *, folded: bool) -> list[Text]:
    """The same as lines with their colours, for a screen that applies it by a key.

    ``folded``: without rules and commands. Lines of rules are as long as they are.
    """
    console = Console(
        width=width,
        color_system="standard",
        force_terminal=True,
        no_color=False,
        highlight=False,
        markup=False,
    )
    with console.capture() as capture:
        console.print(render(advice, how="", folded=folded), crop=False)
    return [Text.from_ansi(line) for line in capture.get().splitlines()]


def rules_text(advice: Advice) -> str:
    """What to paste into a shell for the chosen levers (or the best safe candidate): one block a
    namespace, of the kind that the host takes, with its undo."""
    where = {c.netns: (c.enter, c.backend) for c in advice.candidates}
    parts = [
        block(alone(*table.levers, backend=where[table.netns][1]), where[table.netns][0])
        for table in advice.tables
        if table.levers and table.netns in where
    ]
    good = [c for c in advice.candidates if c.proposed]
    if not parts and good:
        parts = list(blocks(good[0]).values())[:1]
    return "\n\n".join(parts)


def remedy(advice: Advice, proto: str, port: int, netns: int) -> Optional[Remedy]:
    """The advice about one service in one namespace; None when it was not judged."""
    here = (proto, port, netns)
    found = next((c for c in advice.candidates if (c.proto, c.port, c.netns) == here), None)
    if found is None:
        return None
    text = f"NOTRACK {proto}/{port}: {_said(found)}; it frees "
    text += fmt.plural(found.frees, "entry", "entries")
    if found.fill_after:
        text += f"; fill then {_range(found.fill_after)}"
    if found.rising:
        text += f", {rising_text(found.rising)}"
    good = found.proposed
    rules = list(blocks(found).values())[:1]
    others = []
    for other in advice.alternatives:
        if other.netns == netns and other.service == f"{proto}/{port}":
            others += [f"- {other.text}", *(f"    {command}" for command in other.commands)]
    return Remedy(text, good, found.reasons, "\n".join(rules), tuple(others))


def render(
    advice: Advice, *, full: bool = False, how: str = "sudo ctrace advise", folded: bool = False
) -> RenderableType:
    """The advice as a rich renderable; ``how`` makes a plan of it (empty: one is made).

    Actions come first, a line each; then the reasons, and the rules unless ``folded``.
    """
    parts: list[RenderableType] = []
    for table in advice.tables:
        mine = [c for c in advice.candidates if c.netns == table.netns]
        parts += [_table(table, advice.target, mine), Text("")]
    if not advice.tables:
        parts += [Text("No service's entries were seen: there is nothing to advise."), Text("")]
    shown = advice.candidates[:SHOWN]
    if shown:
        parts += [Text("NOTRACK, by entries freed", style="bold"), _candidates(shown), Text("")]
    parts += _asked(advice, full, folded)
    parts += _alternatives(advice, how, full, folded)
    if shown:
        parts.append(Text("Why, by service", style="bold"))
    for candidate in shown:
        parts += _reasons(candidate)
        if folded:
            continue
        if candidate.chosen or full:
            parts += _rules(candidate, full)
        if candidate.chosen or candidate.in_place:
            parts += _flush(candidate)
    parts += [Text("")] if shown and folded else []
    parts += _in_place(advice)
    if advice.persist:
        parts.append(Text("To keep the rules over reloads and reboots", style="bold"))
        parts += [_item(prose(hint)) for hint in advice.persist]
        parts.append(Text(""))
    parts += [prose(f"Note: {note}", "dim") for note in advice.notes]
    if advice.plans and how:
        parts.append(Text("Apply it, watched, reverting by itself unless confirmed:"))
        for plan in advice.plans:
            where = f" --netns {plan.netns}" if len(advice.plans) > 1 else ""
            parts.append(Text(f"    {_planned(how, where)}", no_wrap=True, overflow="ignore"))
    return Group(*parts)


def _planned(how: str, options: str) -> str:
    """The command that makes a plan and applies it."""
    ctrace = how.partition(" advise")[0]
    return f"{how}{options} --plan plan.json && {ctrace} apply plan.json"


def _command(text: str) -> Text:
    return Text(f"    {text}", "dim", no_wrap=True, overflow="ignore")


def _asked(advice: Advice, full: bool, folded: bool) -> list[RenderableType]:
    """Requested drops: what they would have dropped, since nobody can tell which of that is
    wanted."""
    if not advice.asked:
        return []
    lines: list[RenderableType] = [Text("Asked for: dropped before tracking", style="bold")]
    for asked in advice.asked:
        lines.append(_item(prose(f"{asked.drop}: {asked.drop.effect}")))
        if not folded:
            lines.append(prose(f"    {asked.text}"))
    if full:
        levers = tuple(asked.drop for asked in advice.asked)
        lines.append(Text(block(alone(*levers)), no_wrap=True, overflow="ignore"))
    return [*lines, Text("")]


def _alternatives(advice: Advice, how: str, full: bool, folded: bool) -> list[RenderableType]:
    if not advice.alternatives:
        return []
    lines: list[RenderableType] = [Text("What else helps", style="bold")]
    several = len({alternative.netns for alternative in advice.alternatives}) > 1
    named = {table.netns: _name(table) for table in advice.tables} if several else {}
    for alternative in advice.alternatives:
        told = _alternative(alternative, named.get(alternative.netns, ""), full)
        if how and alternative.option:
            where = f" --netns {alternative.netns}" if len(advice.tables) > 1 else ""
            told.append(_command(f"on trial: {_planned(how, f'{where} {alternative.option}')}"))
        lines += told[:1] if folded else told
    return [*lines, Text("")]


def _in_place(advice: Advice) -> list[RenderableType]:
    if not advice.in_place:
        return []
    lines: list[RenderableType] = [Text("In place already", style="bold")]
    names = {table.netns: _name(table) for table in advice.tables}
    for netns, done in advice.in_place:
        lines.append(_item(Text(f"{names.get(netns, f'netns:{netns}')}: {fmt.clean(str(done))}")))
    return [*lines, Text("")]


def _table(table: TableAdvice, target: float, candidates: Sequence[Candidate]) -> Text:
    text = Text(no_wrap=True, overflow="ignore")
    held = ("" if table.read else "at least ") + fmt.plural(table.count, "entry", "entries")
    if table.max:
        held = f"{fmt.count(table.count)} of {fmt.count(table.max)} entries"
    text.append(f"{_name(table)}: {held}", "bold")
    if table.fill is None or table.needed is None:
        text.append("; nf_conntrack_max is not in the texts, so neither is the fill")
        return text
    text.append(f" ({fmt.share(table.count / table.max if table.max else None)})")
    if table.drops:
        text.append(f", {fmt.count(table.drops)} new flows refused", "red")
    if not table.needed and not table.levers:
        text.append(f"; below the target of {fmt.share(target)}")
        return text
    text.append(f"; {fmt.count(table.needed)} too many for {fmt.share(target)}\n")
    if table.levers:
        what = ", ".join(_lever(lever) for lever in table.levers)
        text.append(f"-> {what}: fill then {_range(table.fill_after)}", "green")
        if table.rising:
            text.append(f"\n   {rising_text(table.rising)}", "yellow")
        if not table.reached:
            text.append("\n   that is not enough by itself: see what else helps", "yellow")
    elif any(c.in_place for c in candidates):
        text.append(
            "-> NOTRACK is in place: existing entries go when they time out, or as described below",
            "green",
        )
    elif any(c.verdict in GOOD for c in candidates):
        text.append(
            "-> what is safe to untrack is not proposed: see why, and what else helps", "yellow"
        )
    else:
        text.append("-> nothing here is known to be safe to untrack: see what else helps", "yellow")
    return text


def _name(table: TableAdvice) -> str:
    return fmt.clean(table.name or f"netns:{table.netns}")


def _lever(lever: Lever) -> str:
    if isinstance(lever, CtTimeout):
        return f"shorter timeouts for {lever.proto}/{lever.port}"
    return f"NOTRACK {lever.proto}/{lever.port} ({', '.join(lever.roles)})"


def _candidates(candidates: tuple[Candidate, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("SERVICE", "VERDICT", "FREES", "OF TABLE", "FILL AFTER", "ROLE", "NAMESPACE"):
        right = column in ("FREES", "OF TABLE", "FILL AFTER")
        table.add_column(
            column, justify="right" if right else "left", no_wrap=column != "NAMESPACE"
        )
    for c in candidates:
        table.add_row(
            f"{c.proto}/{c.port}",
            Text(_said(c), _style(c)),
            fmt.count(c.frees),
            fmt.share(c.share),
            _range(c.fill_after),
            ", ".join(c.role) or "?",
            fmt.clean(c.netns_name or str(c.netns)),
        )
    return table


def _said(candidate: Candidate) -> str:
    """The verdict, and whether something else speaks against it."""
    return candidate.verdict + (", not proposed" if _held_back(candidate) else "")


def _style(candidate: Candidate) -> str:
    return "yellow" if _held_back(candidate) else STYLE[candidate.verdict]


def _held_back(candidate: Candidate) -> bool:
    return candidate.verdict in GOOD and not candidate.proposed


def _reasons(candidate: Candidate) -> list[RenderableType]:
    title = Text(f"{candidate.proto}/{candidate.port}: ")
    title.append(_said(candidate), _style(candidate))
    if not candidate.reasons:
        title.append(", no rule treats its packets differently once they are untracked")
    lines: list[RenderableType] = [title]
    reasons = [*candidate.reasons]
    if candidate.rising:
        reasons.append(f"without it the table is {rising_text(candidate.rising)}")
    lines += [Padding(prose(f"- {reason}"), (0, 0, 0, 2), expand=False) for reason in reasons]
    return lines


def _rules(candidate: Candidate, full: bool) -> list[RenderableType]:
    """Rules to copy, never wrapped: of the host's kind, and with ``full`` of the other, too."""
    lines: list[RenderableType] = []
    for kind, text in blocks(candidate).items():
        if not lines or full:
            lines.append(Text(f"  {kind}, to paste into a shell:", "dim"))
            # Nothing before a line: the word that ends the input stands alone.
            lines.append(Text(text, no_wrap=True, overflow="ignore"))
    if lines and not full:
        lines.append(Text("  (--rules prints the other kind, too)", "dim"))
    return [*lines, Text("")]


def _flush(candidate: Candidate) -> list[RenderableType]:
    """How to delete the entries that stay behind, to copy."""
    commands = flush_lines(candidate)
    lines: list[RenderableType] = [
        Text(
            f"  once these rules are in, its old entries go with{':' if commands else ' time'}",
            "dim",
        )
    ]
    lines += [Text(f"    sudo {command}", no_wrap=True, overflow="ignore") for command in commands]
    return [*lines, Text("")]


def _alternative(alternative: Helps, where: str, full: bool) -> list[RenderableType]:
    text = prose(f"{where}{': ' if where else ''}{alternative.text}")
    if alternative.detail:
        text.append(f": {fmt.prose(alternative.detail)}")
    if alternative.frees and alternative.frees[1] and not alternative.now:
        low, high = alternative.frees
        amount = fmt.count(high) if low == high else f"{fmt.count(low)} to {fmt.count(high)}"
        text.append(f"; frees {amount}")
    if alternative.fill_after:
        text.append(f", fill {_range(alternative.fill_after)}")
    if alternative.rising:
        text.append(f", {rising_text(alternative.rising)}")
    commands = alternative.commands
    if alternative.id == "ct-timeout" and commands and not full:
        commands = ("(--rules prints its rules)",)
    lines: list[RenderableType] = [_item(text)]
    lines += [_command(command.expandtabs(2)) for command in commands]
    if alternative.undo and (full or alternative.id != "ct-timeout"):
        lines += [_command(f"undo: {command}") for command in alternative.undo]
    return lines


def _item(text: Text) -> RenderableType:
    """A list item; its further lines are indented below the first."""
    grid = Table.grid(padding=0)
    grid.add_row("- ", text)
    return grid


def _range(fill: Optional[tuple[float, float]]) -> str:
    if fill is None:
        return "-"
    low, high = (fmt.share(value) for value in fill)
    return low if low == high else f"{low} to {high}"
