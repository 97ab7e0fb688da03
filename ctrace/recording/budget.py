"""Limits on what one file may expand to: one for each section, and one for their sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ctrace.batch import Names
from ctrace.recording.format import evidence
from ctrace.recording.format.layout import LIMIT_TIME, Block, BlockKind, Column, Damaged
from ctrace.recording.format.meta import Header

LIMIT_NAMES_BYTES: Final = 64 << 20
LIMIT_RULES_BYTES: Final = 64 << 20
LIMIT_NOTES_BYTES: Final = 1 << 20
"""Bytes of all names, all rules and all notes, expanded. Notes are shown as they are."""
LIMIT_NAMES: Final = 1 << 19
"""Names, including the addresses of namespaces."""
LIMIT_SPAN: Final = 400 * 86_400 * 1_000_000_000
"""Nanoseconds from the beginning of a recording to its last batch."""

TOO_LONG: Final = "it claims to last more than 400 days: what comes later is left out"


def latest(header: Header) -> int:
    """Boot clock, ns, after which a recording with this header holds nothing.

    A recording made of texts may contain moments that are years apart.
    """
    if evidence.FACT in header.facts:
        return LIMIT_TIME
    return max(0, min(LIMIT_TIME, header.started + LIMIT_SPAN))


class Spent(Damaged):
    """The file as a whole asks for more than it may take."""


class Budget:
    """What is left for one file. A block is charged once, however often it is read."""

    def __init__(self) -> None:
        self._names = _Purse(LIMIT_NAMES_BYTES, "bytes of names")
        self._count = _Purse(LIMIT_NAMES, "names")
        self._rules = _Purse(LIMIT_RULES_BYTES, "bytes of rules")
        self._notes = _Purse(LIMIT_NOTES_BYTES, "bytes of notes")

    def names(self, block: Block) -> None:
        """Charge for a block's names before they are expanded. Raises Spent."""
        self._names.pay(block.offset, _size(block, Column.NAMES))

    def learned(self, block: Block, found: Sequence[Names]) -> None:
        """Charge for their number afterwards: there may be many small ones. Raises Spent."""
        n = 0
        for names in found:
            n += len(names.netns) + len(names.owners) + len(names.cgroups) + len(names.listeners)
            n += sum(len(one.addresses) for one in names.netns.values())
        self._count.pay(block.offset, n)

    def text(self, block: Block) -> None:
        """Charge for a note or a ruleset before it is expanded; other blocks are free. Raises
        Spent."""
        purse = {BlockKind.NOTE: self._notes, BlockKind.RULESET: self._rules}.get(
            BlockKind(block.head.kind)
        )
        if purse is not None:
            purse.pay(block.offset, _size(block, Column.JSON))


def _size(block: Block, column: Column) -> int:
    entries = block.columns.get(column)
    return entries[0].values if entries else 0


class _Purse:
    def __init__(self, limit: int, what: str) -> None:
        self._left = limit
        self._said = f"it has more than {limit:,} {what}: the rest of them is left out"
        self._paid: dict[int, bool] = {}
        """By offset of a block: whether there was enough for it."""

    def pay(self, at: int, amount: int) -> None:
        if amount and at not in self._paid:
            # Once a block was too much, nothing after it is taken: what is kept is the beginning.
            self._paid[at] = 0 <= amount <= self._left
            self._left = self._left - amount if self._paid[at] else -1
        if amount and not self._paid[at]:
            raise Spent(self._said)
