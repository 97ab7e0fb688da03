"""What is done already: services that a ruleset untracks, or gives timeouts of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Optional, Union

from ctrace.errors import CtraceError
from ctrace.plan.plan import ROLES
from ctrace.rehearsal.rehearse import Service
from ctrace.rehearsal.room import Room
from ctrace.ruleset.installed import Rule as OurRule
from ctrace.ruleset.model import Rule, Ruleset

MAX_PORTS: Final = 16
OURS: Final = "ctrace"
KINDS: Final = ("notrack", "timeout")


@dataclass(frozen=True)
class InPlace:
    """One service that rules treat already."""

    proto: str
    port: int
    roles: tuple[str, ...]
    """Roles that the rules cover; for half a pair of rules, the role that it is half of."""
    kind: str
    """``notrack``, ``timeout`` (a ct timeout policy) or ``drop``."""
    by: str
    """``ctrace``, or the chain that the rules are in."""
    packets: Optional[int]
    """Packets that the rules have matched so far; None where they don't count."""
    complete: bool = True
    """False: only one direction is untracked, which frees nothing."""
    drop: str = ""
    """``limit-source tcp/80``, ``drop-source 192.0.2.1`` where it drops before tracking; it is of
    no service then."""

    def covers(self, proto: str, port: int, roles: tuple[str, ...]) -> bool:
        """Whether a service in these roles needs nothing more of this kind."""
        same = self.complete and (self.proto, self.port) == (proto, port)
        return same and set(roles) <= set(self.roles)

    def __str__(self) -> str:
        service = f"{self.proto}/{self.port}"
        carried = "" if self.packets is None else f"; {self.packets} packets so far"
        if self.drop:
            return f"{self.drop} is in place already, by {self.by}{carried}"
        if not self.complete:
            return (
                f"the ruleset untracks {service} in one direction only (as {self.roles[0]}, in "
                f"{self.by}): that frees nothing, the other direction's packets make entries just "
                f"as long-lived{carried}"
            )
        what = "NOTRACK" if self.kind == "notrack" else "a timeout policy"
        roles = f" ({', '.join(self.roles)})" if self.roles else ""
        return f"{what} for {service}{roles} is in place already, by {self.by}{carried}"


def in_place(ruleset: Ruleset, room: Optional[Room]) -> Iterator[InPlace]:
    """ctrace's own rules, then everybody else's, as far as a rehearsal in ``room`` shows them."""
    yield from _ours(ruleset.ours)
    for (proto, port), found in _named(ruleset, "notrack").items() if room else ():
        roles, half = _covered(room, proto, port) if room else ((), "")
        if roles or half:
            yield InPlace(
                proto,
                port,
                roles or (half,),
                "notrack",
                _where(found),
                _packets(found),
                complete=bool(roles),
            )
    for (proto, port), found in _named(ruleset, "timeout").items():
        yield InPlace(proto, port, (), "timeout", _where(found), _packets(found))


def _ours(rules: tuple[OurRule, ...]) -> Iterator[InPlace]:
    services: dict[tuple[str, int, str], list[OurRule]] = {}
    dropping: dict[str, list[OurRule]] = {}
    for rule in rules:
        if rule.own and rule.drops:
            dropping.setdefault(rule.drops, []).append(rule)
        role, proto, port = rule.service
        if rule.own and port:
            kind = "timeout" if role == "timeout" else "notrack"
            services.setdefault((proto, port, kind), []).append(rule)
    for (proto, port, kind), found in services.items():
        roles = {rule.service[0] for rule in found}
        covered = tuple(role for role in ROLES if role in roles)
        yield InPlace(proto, port, covered, kind, OURS, _met(found))
    for what, found in dropping.items():
        yield InPlace("", 0, (), "drop", OURS, _met(found), drop=what)


def _covered(room: Room, proto: str, port: int) -> tuple[tuple[str, ...], str]:
    """(roles that are untracked both ways, a role that is one way; empty when none)."""
    try:
        entries = Service(room, proto, port, (32768, 60999), ()).entries_by_role()
    except (CtraceError, OSError):
        return (), ""
    whole = tuple(role for role in ROLES if entries.get(role) == "none")
    half = next((role for role in ROLES if entries.get(role) == "half"), "")
    return whole, half


Found = list[tuple[str, Rule]]
"""(chain, rule)."""


def _named(ruleset: Ruleset, kind: str) -> dict[tuple[str, int], Found]:
    """Services that a rule with such a statement names, with those rules."""
    found: dict[tuple[str, int], Found] = {}
    for chain in ruleset.chains:
        for rule in chain.rules:
            if not any(use.kind == kind for use in rule.uses):
                continue
            protos = [m.values[0][0] for m in rule.matches if m.key == "proto" and not m.negate]
            for match in rule.matches:
                if match.key in ("sport", "dport") and not match.negate:
                    for low, high in match.values:
                        for number, proto in ((6, "tcp"), (17, "udp")):
                            if low == high and number in (protos or [number]):
                                found.setdefault((proto, low), []).append((chain.where, rule))
    return dict(list(found.items())[:MAX_PORTS])


def _where(found: Found) -> str:
    return ", ".join(dict.fromkeys(where for where, _ in found))


def _packets(found: Found) -> Optional[int]:
    return _met([rule for _, rule in found])


def _met(rules: Sequence[Union[Rule, OurRule]]) -> Optional[int]:
    counts = [rule.packets for rule in rules if rule.packets is not None]
    return sum(counts) if counts else None
