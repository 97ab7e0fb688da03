"""Which measures a source cannot tell at all: views show these as unknown, never as zero."""

from __future__ import annotations

from typing import Any, Final, Optional

from ctrace.batch import DUMP, HookInfo
from ctrace.view import format as fmt

CHANGES: Final = frozenset(
    ("insert", "destroy", "expired", "deleted", "inserts", "new_per_s", "destroys", "ends",
     "table_seconds", "table_seconds_total", "insert_per_s", "destroy_per_s")
)  # fmt: skip
REFUSALS: Final = frozenset(
    ("drop", "early_drop", "insert_failed", "clash_resolved", "drops", "drop_per_s", "off_by",
     "chain_too_long", "invalid", "evicted", "drop_per_s", "early_drop_per_s")
)  # fmt: skip


def unseen(hooks: HookInfo) -> frozenset[str]:
    """Names of fields, of snapshots and their parts, that are unknown under these hooks."""
    changes = frozenset() if hooks.changes else CHANGES
    return changes if hooks.refusals else changes | REFUSALS


def told(data: dict[str, Any], absent: frozenset[str]) -> dict[str, Any]:
    """A JSON object with null for what is unknown."""
    return {name: None if name in absent else value for name, value in data.items()}


def number(hooks: HookInfo, name: str, value: int) -> str:
    """A count, or the text for an unknown one."""
    return fmt.UNKNOWN if name in unseen(hooks) else fmt.count(value)


def rate(hooks: HookInfo, name: str, value: float) -> str:
    """The same of a rate."""
    return fmt.UNKNOWN if name in unseen(hooks) else fmt.rate(value)


def newcomers(unseen: int) -> str:
    """Appended to a count of events: how many entries nobody saw made; empty for none."""
    return f"; {_made_before(unseen)}" if unseen else ""


def blind(hooks: HookInfo, unseen: int) -> tuple[str, ...]:
    """What this family cannot show here, one sentence each; what it actually missed comes first."""
    return (f"inserts: {_made_before(unseen)}", *hooks.blind) if unseen else hooks.blind


def _made_before(unseen: int) -> str:
    entries = fmt.plural(unseen, "entry", "entries")
    return f"{entries} of new namespaces made before these were found"


def trusted(hooks: HookInfo) -> Optional[str]:
    """Text in place of ``exact`` where a source cannot be exact: dumps miss what happened in
    between."""
    return "as read" if hooks.family == DUMP else None


def nobody(hooks: HookInfo, refused: int) -> str:
    """Text in place of victims, where it is not visible which flow a refused packet belonged to."""
    if not hooks.refusals:
        return "dumps do not tell whose packets were refused"
    return fmt.nameless(hooks.family, refused)
