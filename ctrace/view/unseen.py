"""Which measures a source cannot tell at all: views show these as unknown, never as zero."""

from __future__ import annotations

from typing import Any, Final

from ctrace.batch import HookInfo
from ctrace.view import format as fmt

CHANGES: Final = frozenset(
    ("insert", "destroy", "expired", "deleted", "inserts", "new_per_s", "destroys", "ends")
)
REFUSALS: Final = frozenset(
    ("drop", "early_drop", "insert_failed", "clash_resolved", "drops", "drop_per_s", "off_by",
     "chain_too_long", "invalid", "evicted")
)  # fmt: skip


def unseen(hooks: HookInfo) -> frozenset[str]:
    """Names of fields, of snapshots and their parts, that are unknown under these hooks."""
    changes = frozenset() if hooks.changes else CHANGES
    return changes if hooks.refusals else changes | REFUSALS


def told(data: dict[str, Any], absent: frozenset[str]) -> dict[str, Any]:
    """JSON's object with null for what is unknown."""
    return {name: None if name in absent else value for name, value in data.items()}


def number(hooks: HookInfo, name: str, value: int) -> str:
    """A count, or what stands for an unknown one."""
    return fmt.UNKNOWN if name in unseen(hooks) else fmt.count(value)


def nobody(hooks: HookInfo, refused: int) -> str:
    """What stands where victims would, where whose a refused packet was is not seen."""
    if not hooks.refusals:
        return "dumps do not tell whose packets were refused"
    return fmt.nameless(hooks.family, refused)
