"""Sentences that rich wraps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from ctrace.view import format as fmt

if TYPE_CHECKING:
    from rich.console import Console
    from rich.containers import Lines

_HELD: Final = "\ue000"
"""Private use, one cell wide: rich breaks a line at every kind of space, also at one that forbids
a break."""


class Prose(Text):
    """A sentence whose numbers stay whole: ``1 193`` is not broken between its thousands."""

    def wrap(self, console: Console, width: int, **options: Any) -> Lines:
        """As rich does it, and not at a narrow no-break space."""
        held = self.copy()
        held.plain = self.plain.replace(fmt.THIN, _HELD)
        lines = Text.wrap(held, console, width, **options)
        for line in lines:
            line.plain = line.plain.replace(_HELD, fmt.THIN)
        return lines


def prose(text: str, style: str = "") -> Prose:
    """A sentence as a person reads it (:func:`ctrace.view.format.prose`), to be wrapped."""
    return Prose(fmt.prose(text), style=style)
