"""Limits on what one file may expand to: one for each section, and one for their sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.batch import Names
from ctrace.record import RECORD
from ctrace.recording.format import evidence
from ctrace.recording.format.layout import LIMIT_TIME, Block, BlockKind, Column, Damaged
from ctrace.recording.format.meta import Header

LIMIT_NAMES_BYTES: Final = 64 << 20
LIMIT_RULES_BYTES: Final = 64 << 20
LIMIT_NOTES_BYTES: Final = 1 << 20
"""Bytes of all names, all rules and all notes, expanded. Notes are shown as they are."""
LIMIT_NAMES: Final = 1 << 19
"""Names, including the addresses of namespaces."""
LIMIT_SPACES: Final = 1 << 14
"""Network namespaces by number. The kernel gives a number that is free again to the next one."""
FREE: Final = 8 << 20
"""Bytes that any file may expand to."""
RATIO: Final = 250
"""Bytes that each stored byte may expand to. A quiet host's recording comes to 130."""
OF_BATCH: Final = 1 << 11
"""Bytes that a batch counts for, besides what it holds: each takes time."""
OF_SECOND: Final = 1 << 15
"""Bytes that a batch counts for if it is a second or more after the one before: the model then
ages its figures."""
OF_SPACE: Final = 64
"""Bytes that a batch counts for with each namespace known so far: it carries their counters."""
LIMIT_SPAN: Final = 400 * 86_400 * 1_000_000_000
"""Nanoseconds from the beginning of a recording to its last batch."""

_BLOBS: Final = (Column.BATCHES, Column.COUNTS, Column.TABLES, Column.BESIDE)
"""Names are charged by themselves."""

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
        self._spaces: set[int] = set()
        self._whole = 0
        self._fits: dict[int, bool] = {}
        """By offset of a block: whether the file had room for it."""

    def block(self, block: Block, until: npt.NDArray[np.uint64], stored: int) -> None:
        """Charge for all that a block expands to. ``until``: the ends of its batches, ns;
        ``stored``: bytes of the file. Raises Spent where a file is denser than a recorder's is."""
        if block.offset not in self._fits:
            seconds = 1 + int(np.count_nonzero(np.diff(until) >= np.uint64(1_000_000_000)))
            size = block.head.rows * RECORD.itemsize + seconds * OF_SECOND
            size += sum(_size(block, column) for column in _BLOBS)
            size += len(until) * (OF_BATCH + OF_SPACE * len(self._spaces))
            fits = self._whole + size <= FREE + RATIO * stored
            self._whole += size * fits
            self._fits[block.offset] = fits
        if not self._fits[block.offset]:
            raise Spent(f"parts of it expand to more than {RATIO} times their size: left out")

    def spaces(self, numbers: Iterable[int]) -> None:
        """Take the namespaces that a block tells of. Raises Spent where they are too many."""
        found = self._spaces.union(numbers)
        if len(found) > LIMIT_SPACES:
            raise Spent(f"it has more than {LIMIT_SPACES:,} namespaces: the rest is left out")
        self._spaces = found

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
