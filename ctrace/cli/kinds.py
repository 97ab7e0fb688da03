"""Types of option values, written and completed alike in every verb."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any, Optional

import click
from click.shell_completion import CompletionItem

from ctrace import units
from ctrace.errors import nearest
from ctrace.live.protocol import FASTEST, SLOWEST

MOST_PORT = 65535
_SIZE_SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


class Time(click.ParamType):  # type: ignore[type-arg]
    """``30``, ``500ms``, ``5m``, ``2h``, ``1d`` as seconds (float), between two bounds."""

    name = "time"

    def __init__(self, least: float = 0.0, most: float = float("inf")) -> None:
        """``least`` and ``most`` in seconds; a time of 0 is refused."""
        self.least = least
        self.most = most

    def get_metavar(self, *_: Any, **__: Any) -> str:
        """The placeholder for a value in the help."""
        return "TIME"

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> float:
        """The time in seconds; a usage error in one line else."""
        if isinstance(value, (int, float)):
            return float(value)
        seconds = units.seconds(str(value))
        if seconds is None:
            self.fail(f"{str(value)[:40]!r} is not a time: give one like 30, 5m or 2h", param, ctx)
        if not self.least <= seconds <= self.most:
            self.fail(
                f"{value} is not between {_shown(self.least)} and {_shown(self.most)}", param, ctx
            )
        return seconds


class Size(click.ParamType):  # type: ignore[type-arg]
    """``8M``, ``1G`` as bytes (int), of at least some."""

    name = "size"

    def __init__(self, least: int) -> None:
        """``least`` in bytes, a whole number of MiB."""
        self.least = least

    def get_metavar(self, *_: Any, **__: Any) -> str:
        """The placeholder for a value in the help."""
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


class Percent(click.ParamType):  # type: ignore[type-arg]
    """``60%``, ``60`` or ``0.6`` as a share (float)."""

    name = "share"

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> float:
        """The share; a usage error in one line else."""
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(%?)", str(value).strip())
        share = float(match[1]) if match else 0.0
        if match and (match[2] or share > 1):
            share /= 100
        if not 0 < share <= 1:
            self.fail(f"{str(value)[:40]!r} is not a share: give one like 60%", param, ctx)
        return share


class Port(click.ParamType):  # type: ignore[type-arg]
    """A port as its number (int); names and ranges are refused with what to type instead."""

    name = "port"

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> int:
        """The number; a usage error in one line else."""
        text = str(value)
        number = _number(text)
        if number is None or number > MOST_PORT:
            import socket

            known = ""
            with contextlib.suppress(OSError, ValueError):
                known = f", {socket.getservbyname(text)} for {text}"
            self.fail(
                f"{text[:40]!r} is not a port: give one number up to {MOST_PORT}{known}", param, ctx
            )
        return number


class Whole(click.IntRange):
    """A whole number (int) between two bounds."""

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> int:
        """The number; a usage error in one line else."""
        text = str(value)
        number = _number(text)
        least = 0 if self.min is None else self.min
        if number is None or number < least or (self.max is not None and number > self.max):
            words = f"give a whole number, {self._describe_range()}"
            self.fail(f"{text[:40]!r} does not fit: {words}", param, ctx)
        return number

    def _describe_range(self) -> str:
        """The bounds in words, for the help as well."""
        return f"at least {self.min}" if self.max is None else f"{self.min} to {self.max}"


class OneOf(click.Choice):  # type: ignore[type-arg]
    """One of a few words; the nearest is named when it is none of them."""

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> Any:
        """The word; a usage error in one line else."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            meant = nearest(str(value), self.choices)
            self.fail(f"{error.message.rstrip('.')}{meant}", param, ctx)


class Speed(click.ParamType):  # type: ignore[type-arg]
    """How many times as fast as it happened (float)."""

    name = "speed"

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> float:
        """The number; a usage error in one line else."""
        text = str(value)
        match = re.fullmatch(r"[0-9]{1,4}(?:\.[0-9]{1,9})?", text)
        if match is None or not SLOWEST <= float(text) <= FASTEST:
            self.fail(f"{text[:40]!r} is not a speed: give one like 0.5, 2 or 60", param, ctx)
        return float(text)


class Words(click.ParamType):  # type: ignore[type-arg]
    """Words with commas between, as they were typed; known ones are completed."""

    name = "list"

    def __init__(self, known: Sequence[str]) -> None:
        """``known``: offered by completion. The code that takes the value validates it."""
        self.known = known

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The words that the last one may become."""
        del ctx, param
        before, comma, last = incomplete.rpartition(",")
        taken = before.lower().split(",")
        return [
            CompletionItem(before + comma + word)
            for word in self.known
            if word.lower().startswith(last.lower()) and word.lower() not in taken
        ]


class Namespace(click.ParamType):  # type: ignore[type-arg]
    """A network namespace as it was typed; the host's are completed."""

    name = "namespace"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names of the namespaces that are here."""
        del ctx, param
        from ctrace.host.netns import find

        with contextlib.suppress(OSError):
            return [CompletionItem(s.name) for s in find() if s.name.startswith(incomplete)]
        return []


def _number(text: str) -> Optional[int]:
    """What consists of digits alone, as a number."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def _shown(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("m", 60.0)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s"
