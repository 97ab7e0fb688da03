"""Interfaces, routes, sets and filters as ip, tc and ipset print them, kept whole so that they can
be recreated."""

from __future__ import annotations

import re
from typing import Final, Optional

from ctrace.dumps.found import Space
from ctrace.dumps.host.blocks import Block
from ctrace.dumps.host.context import Context
from ctrace.dumps.host.facts import take_address

_ADDRESS: Final = rb"(?:default|[0-9a-fA-F]{1,4}[0-9a-fA-F.:]+(?:/\d{1,3})?)"
_TYPES: Final = (
    rb"(?:(?:unicast|local|broadcast|multicast|throw|unreachable|prohibit|blackhole|nat|anycast) )?"
)


class _Lines(Block):
    """Consecutive lines of the same form."""

    kind: str
    begins: re.Pattern[bytes]
    goes_on: re.Pattern[bytes]

    @classmethod
    def starting(cls, line: bytes, context: Context) -> Optional[Block]:
        """The block that a line begins, or None."""
        if not cls.begins.match(line):
            return None
        block = cls(context)
        block.take(line)
        return block

    def take(self, line: bytes) -> bool:
        """Until a line of another form comes."""
        if not (self.begins.match(line) or (self._lines and self.goes_on.match(line))):
            return False
        return super().take(line)

    def _goes_on(self, text: str) -> bool:
        del text
        return True

    def end(self, space: Space) -> None:
        """Output of the same command replaces the earlier one."""
        space.network[self._kind(), self._context.command or str(len(space.network))] = (
            "\n".join(self._lines) + "\n"
        )

    def _kind(self) -> str:
        return self.kind


class Links(_Lines):
    """``ip addr``, ``ip link``."""

    kind = "links"
    begins = re.compile(rb"^\d{1,9}: [^\s:]{1,40}: <[A-Z0-9,_-]*>")
    goes_on = re.compile(rb"^\s+\S")

    def end(self, space: Space) -> None:
        """The addresses are the host's, too."""
        super().end(space)
        for line in self._lines:
            take_address(line, space)


class Routes(_Lines):
    """``ip route``."""

    kind = "routes"
    begins = re.compile(
        rb"^" + _TYPES + _ADDRESS + rb" (?:\S+ ){0,12}?(?:via|dev|proto|nhid|scope|metric) \S"
    )
    goes_on = re.compile(rb"^\s+nexthop \S|^" + _TYPES + _ADDRESS + rb"\s*$")


class Rules(_Lines):
    """``ip rule``, of either family: only the command tells which."""

    kind = "rules"
    begins = re.compile(
        rb"^\d{1,10}:\s+(?:not )?from \S+.* (?:lookup|goto|blackhole|prohibit|unreachable|nop)\b"
    )
    goes_on = re.compile(rb"(?!)")

    def _kind(self) -> str:
        return "rules6" if self._context.ipv6 else "rules"


class Sets(_Lines):
    """``ipset save``."""

    kind = "ipsets"
    begins = re.compile(rb"^create \S{1,31} (?:hash|bitmap|list):\S+")
    goes_on = re.compile(rb"^add \S{1,31} \S")


class SetLists(_Lines):
    """``ipset list``, kept as ``ipset save`` has the same."""

    kind = "listed sets"
    begins = re.compile(rb"^Name: \S{1,31}$")
    goes_on = re.compile(
        rb"^(?:Type|Revision|Header|Size in memory|References|Number of entries|Members):"
        rb"|^[^\s#]\S*(?: (?:timeout|packets|bytes|comment|skb\w{4,5}|nomatch|before|after)\b.*)?$"
    )

    def take(self, line: bytes) -> bool:
        """Other things have names, too."""
        if self._lines and self._lines[-1].startswith("Name: ") and line[:6] != b"Type: ":
            return False
        return super().take(line)

    def end(self, space: Space) -> None:
        """A set's header is what it was created with."""
        saved: list[str] = []
        for one in re.split(r"(?m)^Name: ", "\n".join(self._lines))[1:]:
            head, there, members = one.partition("\nMembers:")
            if not there:
                continue
            name, *rest = head.split("\n")
            told = dict(line.split(": ", 1) for line in rest if ": " in line)
            adds = [f"add {name} {member}" for member in members.split("\n") if member]
            saved.append(f"create {name} {told.get('Type', '')} {told.get('Header', '')}".rstrip())
            saved += adds
            if told.get("Number of entries", str(len(adds))) != str(len(adds)):
                saved.append(f"the members of {name} are cut off")  # no tool takes it
        if saved:
            self._lines = saved
            super().end(space)


class Qdiscs(_Lines):
    """``tc qdisc``."""

    kind = "qdiscs"
    begins = re.compile(rb"^qdisc \S+ [0-9a-f]+: (?:dev \S+ )?")
    goes_on = re.compile(rb"^ \S")


class Filters(_Lines):
    """``tc filter show dev DEVICE SIDE: ...`` as ctrace collect prints it."""

    kind = "filters"
    begins = re.compile(rb"^tc filter show dev \S{1,15} (?:ingress|egress): \S")
    goes_on = re.compile(rb"(?!)")


NETWORK: Final[tuple[type[_Lines], ...]] = (Links, Routes, Rules, Sets, SetLists, Qdiscs, Filters)
