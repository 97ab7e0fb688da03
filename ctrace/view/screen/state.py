"""The choices of the person at the screen. The screen is a function of these and a snapshot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ctrace.model.snapshot import GROUPS, SORTS

MODES: Final = ("top", "victims", "namespaces", "detail", "advice", "help")
TRAIL: Final = 16
"""Steps that are remembered."""


def without_namespace(text: str) -> str:
    """A filter for all namespaces."""
    return " ".join(word for word in text.split() if not word.startswith("netns="))


@dataclass(frozen=True)
class State:
    """One moment of the screen's own state."""

    mode: str = "top"
    group: str = "pair"
    sort: str = "held"
    reverse: bool = False
    filter: str = ""
    pane: str = "culprits"
    """Which table the cursor is in, in mode ``top``."""
    cursor: int = 0
    """Row of the cursor in the table that has it."""
    held: tuple[str, int] = ("", 0)
    """Key and namespace of the row that the cursor stays with; empty: the first row."""
    scroll: int = 0
    """First line shown of a page (detail, advice, help)."""
    subject: tuple[str, int] = ("", 0)
    """Key and namespace of the culprit that the detail page is about."""
    back: str = "top"
    """The mode that Backspace returns to."""
    trail: tuple[tuple[str, str], ...] = ()
    """Mode and filter of each step that narrowed what is shown: Esc walks back along it."""

    def next_group(self, step: int = 1) -> State:
        """The next way to group; the cursor goes back to the first row."""
        group = GROUPS[(GROUPS.index(self.group) + step) % len(GROUPS)]
        return replace(self, group=group, cursor=0, held=("", 0))

    def sorted_by(self, sort: str) -> State:
        """Sort by a column; the same column again turns the order round."""
        if sort == self.sort:
            return replace(self, reverse=not self.reverse)
        return replace(self, sort=sort, reverse=False, cursor=0, held=("", 0))

    def next_sort(self, step: int = 1) -> State:
        """The next column to sort by."""
        return self.sorted_by(SORTS[(SORTS.index(self.sort) + step) % len(SORTS)])

    def to(self, mode: str) -> State:
        """Another mode, from its beginning; the same mode again leads back."""
        if mode == self.mode:
            return self.up()
        if mode == "namespaces":  # of all: which one is shown alone is chosen here
            text = without_namespace(self.filter)
            return replace(self._step(), mode=mode, filter=text)
        # From help to where it was asked for; else from page to page without end.
        aside = self.mode == "help" or (self.mode == "advice" and mode != "help")
        back = self.back if aside else self.mode
        return replace(self, mode=mode, back=back, scroll=0, cursor=0, held=("", 0))

    def narrowed(self, text: str) -> State:
        """The first screen of other flows; Esc leads back to these."""
        mode = "victims" if self.mode == "victims" else "top"
        return self if text == self.filter else replace(self._step(), mode=mode, filter=text)

    def _step(self) -> State:
        trail = (*self.trail, (self.mode, self.filter))[-TRAIL:]
        return replace(self, trail=trail, back="top", cursor=0, held=("", 0), scroll=0)

    def up(self) -> State:
        """One step back: from a page to its list, from some flows to those before."""
        if self.mode in ("top", "namespaces"):
            mode, text = self.trail[-1] if self.trail else ("top", "")
            return replace(
                self,
                mode=mode,
                filter=text,
                back="top",
                trail=self.trail[:-1],
                cursor=0,
                held=("", 0),
                scroll=0,
            )
        # From help over a drill-down back into it, and from there to the top.
        target = self.back if self.back != self.mode else "top"
        return replace(self, mode=target, back="top", scroll=0, cursor=0, held=("", 0))

    @property
    def order(self) -> str:
        """The sort as asked of the feed, with a ``-`` where it is reversed."""
        return f"-{self.sort}" if self.reverse else self.sort

    @property
    def is_page(self) -> bool:
        """Whether lines are scrolled instead of rows selected."""
        return self.mode in ("detail", "advice", "help")
