"""What an option's value may be: a time and a size, written alike in every verb."""

from __future__ import annotations

import re
from typing import Any, Optional

import click

_TIME_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


class Time(click.ParamType):  # type: ignore[type-arg]
    """``30``, ``500ms``, ``5m``, ``2h``, ``1d`` as seconds (float), between two bounds."""

    name = "time"

    def __init__(self, least: float = 0.0, most: float = float("inf")) -> None:
        """``least`` and ``most`` in seconds; a time of 0 is none."""
        self.least = least
        self.most = most

    def get_metavar(self, *_: Any, **__: Any) -> str:
        """What the help shows in place of a value."""
        return "TIME"

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> float:
        """The time in seconds; a usage error in one line else."""
        if isinstance(value, (int, float)):
            return float(value)
        match = re.fullmatch(
            r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*(ms|s|min|m|h|d|)", str(value).strip().lower()
        )
        seconds = float(match[1]) * _TIME_UNITS[match[2]] if match else 0.0
        if not seconds:
            self.fail(f"{str(value)[:40]!r} is not a time: give one like 30, 5m or 2h", param, ctx)
        if not self.least <= seconds <= self.most:
            self.fail(f"{value} is not between {_shown(self.least)} and {_shown(self.most)}",
                      param, ctx)  # fmt: skip
        return seconds


class Size(click.ParamType):  # type: ignore[type-arg]
    """``8M``, ``1G`` as bytes (int), of at least some."""

    name = "size"

    def __init__(self, least: int) -> None:
        """``least`` in bytes, a whole number of MiB."""
        self.least = least

    def get_metavar(self, *_: Any, **__: Any) -> str:
        """What the help shows in place of a value."""
        return "SIZE"

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> int:
        """The size in bytes; a usage error in one line else."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,12})\s*([kmgt]?)(?:i?b)?", str(value).strip().lower())
        if match is None:
            self.fail(f"{str(value)[:40]!r} is not a size: give one like 32M or 1G", param, ctx)
        size = int(match[1]) << _SIZE_SHIFTS[match[2]]
        if size < self.least:
            self.fail(f"{value} is too little: at least {self.least >> 20}M", param, ctx)
        return size


def _shown(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("m", 60.0)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"
