"""How many examples hypothesis draws for one property."""

from __future__ import annotations

from typing import Any

from hypothesis import settings


def examples(whole: int, **more: Any) -> settings:
    """So many in a thorough run, else as many of these as the profile draws of the usual 100."""
    usual = settings().max_examples
    return settings(max_examples=max(1, whole * usual // 100), **more)
