"""What a flight recorder keeps a recording for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ctrace.errors import UsageError


@dataclass(frozen=True)
class Trigger:
    """An event worth keeping a recording for."""

    name: str
    """``drop``, ``evict``, ``fill`` or ``inserts``."""
    value: float = 0.0
    """Share of the table, or inserts per second."""


def parse_trigger(text: str) -> Trigger:
    """``drop``, ``evict``, ``fill=90`` or ``inserts=20000/s``. Raises UsageError."""
    text = text.strip().lower()
    if text in ("drop", "evict"):
        return Trigger(text)
    match = re.fullmatch(r"fill[=>]+(\d+(?:\.\d+)?)%?", text)
    if match and 0 < float(match[1]) <= 100:
        return Trigger("fill", float(match[1]) / 100)
    match = re.fullmatch(r"inserts[=>]+(\d+)(?:/s)?", text)
    if match:
        return Trigger("inserts", float(match[1]))
    raise UsageError(f"{text!r} is not a trigger: use drop, evict, fill=90 or inserts=20000/s")
