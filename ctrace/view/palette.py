"""Colours by meaning, for a dark screen, a light one, and the terminal's own sixteen.

Colour only repeats what a word or a shape already says: without it nothing is lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Optional

from rich.style import Style


@dataclass(frozen=True)
class Palette:
    """One style per meaning."""

    name: str
    background: str
    """Colour behind everything; ``default`` leaves the terminal's own."""
    band: Style
    """Table heads and the footer."""
    cursor: Style
    text: Style
    strong: Style
    dim: Style
    """Units, labels, and anything of secondary interest."""
    faint: Style
    """Lines and empty parts of bars."""
    accent: Style
    """Titles and keys."""
    good: Style
    warn: Style
    bad: Style
    alarm: Style
    """The one word that must be seen from across the room."""
    evictable: Style
    """The part of a gauge that early_drop may evict."""
    area: Style
    """Large areas are calmer than words: curves and bars."""
    area_good: Style
    area_warn: Style
    area_bad: Style

    @property
    def behind(self) -> Style:
        """The background."""
        return Style(bgcolor=self.background)

    def gauge(self, share: float, trouble: bool) -> Style:
        """Like :meth:`fill`, for a whole bar."""
        if trouble or share >= 0.95:
            return self.area_bad
        return self.area_warn if share >= 0.75 else self.area_good

    def fill(self, share: float, trouble: bool) -> Style:
        """How a table's fill is painted: by the word beside it."""
        if trouble or share >= 0.95:
            return self.bad
        return self.warn if share >= 0.75 else self.good


DARK: Final = Palette(
    "dark",
    "#11151a",
    band=Style(color="#aab4be", bgcolor="#1d242c"),
    cursor=Style(bgcolor="#263d52"),
    text=Style(color="#d6dce2"),
    strong=Style(color="#ffffff", bold=True),
    dim=Style(color="#8794a0"),
    faint=Style(color="#3d4751"),
    accent=Style(color="#7cc0e0", bold=True),
    good=Style(color="#8cc07f"),
    warn=Style(color="#e5b654"),
    bad=Style(color="#f47c7c"),
    alarm=Style(color="#ffffff", bgcolor="#b02a37", bold=True),
    evictable=Style(color="#8a74a0"),
    area=Style(color="#466a86"),
    area_good=Style(color="#5b8b53"),
    area_warn=Style(color="#b88c35"),
    area_bad=Style(color="#c2525b"),
)

LIGHT: Final = Palette(
    "light",
    "#fbfbfa",
    band=Style(color="#46525e", bgcolor="#e8ecef"),
    cursor=Style(bgcolor="#cfe2f1"),
    text=Style(color="#222c36"),
    strong=Style(color="#000000", bold=True),
    dim=Style(color="#5d6974"),
    faint=Style(color="#c3cad0"),
    accent=Style(color="#0a5f8a", bold=True),
    good=Style(color="#2c7430"),
    warn=Style(color="#8a5a00"),
    bad=Style(color="#b8212a"),
    alarm=Style(color="#ffffff", bgcolor="#b8212a", bold=True),
    evictable=Style(color="#8d7a9c"),
    area=Style(color="#8fb0c8"),
    area_good=Style(color="#7fb37a"),
    area_warn=Style(color="#d3a94e"),
    area_bad=Style(color="#d0606a"),
)

TERMINAL: Final = Palette(
    "terminal",
    "default",
    band=Style(underline=True),
    cursor=Style(reverse=True),
    text=Style(),
    strong=Style(bold=True),
    dim=Style(),
    faint=Style(dim=True),
    accent=Style(color="cyan", bold=True),
    good=Style(color="green"),
    warn=Style(color="yellow"),
    bad=Style(color="red", bold=True),
    alarm=Style(color="red", bold=True, reverse=True),
    evictable=Style(color="magenta"),
    area=Style(color="blue"),
    area_good=Style(color="green"),
    area_warn=Style(color="yellow"),
    area_bad=Style(color="red"),
)

PALETTES: Final[dict[str, Palette]] = {one.name: one for one in (DARK, LIGHT, TERMINAL)}


def choose(asked: str = "", environ: Optional[Mapping[str, str]] = None) -> Palette:
    """The palette that was asked for, else ``CTRACE_THEME``, else the best that the terminal can
    show.

    ``NO_COLOR`` and terminals of fewer than 256 colours get their own colours only.
    """
    environ = os.environ if environ is None else environ
    asked = asked or environ.get("CTRACE_THEME", "")
    if environ.get("NO_COLOR"):
        return TERMINAL
    if asked in PALETTES:
        return PALETTES[asked]
    term = environ.get("TERM", "")
    rich_colour = environ.get("COLORTERM", "") in ("truecolor", "24bit") or any(
        word in term for word in ("256color", "kitty", "alacritty", "direct")
    )
    if not rich_colour:
        return TERMINAL
    # COLORFGBG ends in the background's number: 7 and 15 are the light ones.
    return LIGHT if environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15") else DARK
