"""A length of time as people type it, the same wherever one is asked for."""

from __future__ import annotations

import re
from typing import Optional

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> Optional[float]:
    """``30``, ``500ms``, ``5m``, ``2h``, ``1d`` in seconds; None when it is no time."""
    match = re.fullmatch(
        r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*(ms|s|min|m|h|d|)", text.strip().lower()
    )
    return (float(match[1]) * _UNITS[match[2]] or None) if match else None
