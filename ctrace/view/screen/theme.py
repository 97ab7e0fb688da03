"""The palettes as themes for the terminal library's own parts: prompt and command palette."""

from __future__ import annotations

from typing import Final

from textual.theme import BUILTIN_THEMES, Theme

from ctrace.view.palette import DARK, LIGHT

NAMES: Final = {"dark": "ctrace-dark", "light": "ctrace-light", "terminal": "ansi-dark"}


def themes() -> tuple[Theme, ...]:
    """Our two themes; the terminal's own colours are the library's ``ansi-dark``."""
    assert NAMES["terminal"] in BUILTIN_THEMES
    dark = Theme(
        NAMES["dark"],
        primary="#7cc0e0",
        accent="#7cc0e0",
        foreground="#d6dce2",
        background=DARK.background,
        surface="#171c22",
        panel="#1d242c",
        warning="#e5b654",
        error="#f47c7c",
        success="#8cc07f",
        dark=True,
    )
    light = Theme(
        NAMES["light"],
        primary="#0a5f8a",
        accent="#0a5f8a",
        foreground="#222c36",
        background=LIGHT.background,
        surface="#f1f3f4",
        panel="#e8ecef",
        warning="#8a5a00",
        error="#b8212a",
        success="#2c7430",
        dark=False,
    )
    return dark, light
