"""The plan: what ``advise`` proposes and ``apply`` takes, as a small JSON file.

A plan holds validated fields, never rule text. :mod:`ctrace.ruleset.notrack`
generates every rule from these fields when it is needed, so a plan edited by
hand can ask only for what the fields can express: no nft, iptables or shell
syntax passes through it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Final, NoReturn, TypeVar, Union

from ctrace.dropping import FASTEST, Drop
from ctrace.errors import UsageError
from ctrace.plan.terms import FIELDS, MAX_TERMS, MAX_VALUES, Term

VERSION: Final = 1
MAX_BYTES: Final = 1 << 20
MAX_LEVERS: Final = 64
MAX_ACCEPTS: Final = 64
MAX_ADDRESSES: Final = 256
MAX_TIMEOUT: Final = 5 * 86400
PROTOS: Final = ("tcp", "udp")
ROLES: Final = ("server", "client", "forward", "loopback")
"""Listening here; calling out from here; routed through; both ends on this host."""
TOOLS: Final = ("nft", "iptables-nft", "iptables-legacy")
"""What owns a chain: a native nftables table, or one of iptables' two variants
(``ip6tables-*`` follows from the family)."""

FAMILIES: Final = ("ip", "ip6", "inet")
HOOKS: Final = ("prerouting", "input", "forward", "output", "postrouting")
FLOWS: Final = ("to", "from", "icmp")
"""Packets to the service's port, from it, and ICMP errors about its flows."""

POLICY_STATES: Final = {
    "tcp": (
        "syn_sent",
        "syn_recv",
        "established",
        "fin_wait",
        "close_wait",
        "last_ack",
        "time_wait",
        "close",
    ),
    "udp": ("unreplied", "replied"),
}
"""States that a conntrack timeout policy may set, as nft spells them."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}\Z")
_TEXT = re.compile(r"[A-Za-z0-9_.:@/+=\[\] -]{0,128}\Z")
_HEX = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Accept:
    """One accept rule to add to a chain that is not ours, before the rule that would drop.

    The rule matches untracked packets of its lever's port only. ``position`` is
    a 0-based rule index in ``chain`` that does not count ctrace's own rules: the
    new rule goes before that one; -1 means at the end. It is valid as long as the
    plan's fingerprint is.
    """

    tool: str
    family: str
    table: str
    chain: str
    position: int
    hook: str
    """The hook with the base chain that leads to ``chain``."""
    role: str
    flow: str
    terms: tuple[Term, ...] = ()
    """The conditions of the rule that accepts the tracked packets, but for their state."""


@dataclass(frozen=True)
class Notrack:
    """Take one service port out of connection tracking."""

    proto: str
    port: int
    roles: tuple[str, ...]
    ephemeral: tuple[int, int] = (32768, 60999)
    """``ip_local_port_range``: the guard of the client role."""
    icmp: bool = True
    """Also untrack the ICMP errors that quote this port (path MTU discovery)."""
    peers: tuple[str, ...] = ()
    """Servers called (client) or backends (forward): only these addresses; empty: any."""
    addresses: tuple[str, ...] = ()
    """Local addresses; their old entries are deleted once the rules are in place."""
    accepts: tuple[Accept, ...] = ()
    shared: bool = False
    """Others' connections may be translated to this port of ours: leave those tracked."""

    kind = "notrack"


@dataclass(frozen=True)
class CtTimeout:
    """A conntrack timeout policy for one service port: keeps tracking, holds entries shorter."""

    proto: str
    port: int
    roles: tuple[str, ...]
    policy: tuple[tuple[str, int], ...]
    """(state, seconds), states from :data:`POLICY_STATES`."""

    kind = "ct-timeout"


Lever = Union[Notrack, CtTimeout, Drop]


@dataclass(frozen=True)
class Plan:
    """What to change in one network namespace of one host."""

    created: int
    """UTC seconds."""
    host: str
    netns: int
    """Inode number of the namespace."""
    netns_name: str
    fingerprint: str
    """Of the ruleset that the plan was made for (:func:`ctrace.ruleset.reader.fingerprint`)."""
    backend: str
    """Where ctrace's own rules go: ``nft``, or an iptables variant where nft does not work."""
    levers: tuple[Lever, ...]
    version: int = VERSION


def alone(*levers: Lever, backend: str = "nft") -> Plan:
    """A plan for no host and no namespace: for its levers' rules as text only."""
    return Plan(0, "", 0, "", "0" * 64, backend, levers)


def to_json(plan: Plan) -> str:
    """The plan as JSON text; :func:`from_json` reads it back as an equal plan."""
    document = asdict(plan)
    document["levers"] = [{"kind": lever.kind, **asdict(lever)} for lever in plan.levers]
    return json.dumps(document, indent=2) + "\n"


def from_json(text: str) -> Plan:
    """Read and check a plan. Raises UsageError, in one line, for anything out of bounds."""
    if len(text) > MAX_BYTES:
        _bad("", f"is larger than {MAX_BYTES} bytes")
    try:
        document = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):
        _bad("", "is not valid JSON")
    fields = _Fields("plan", document)
    if (version := fields.integer("version", 0, 1 << 31)) != VERSION:
        _bad("version", f"is {version}, of another ctrace: this one reads version {VERSION}")
    plan = Plan(
        created=fields.integer("created", 0, 1 << 40),
        host=fields.text("host"),
        netns=fields.integer("netns", 0, (1 << 32) - 1),
        netns_name=fields.text("netns_name"),
        fingerprint=fields.match("fingerprint", _HEX),
        backend=fields.choice("backend", TOOLS),
        levers=fields.items("levers", MAX_LEVERS, _lever),
    )
    fields.end()
    if not plan.levers:
        _bad("levers", "is empty: there is nothing to apply")
    seen = set()
    for lever in plan.levers:
        key = (lever.kind, lever.proto, lever.port)
        if key in seen:
            _bad("levers", f"has {lever.kind} {lever.proto}/{lever.port} twice")
        seen.add(key)
    return plan


T = TypeVar("T")


class _Fields:
    """Takes typed, bounded values out of a JSON object; what is left over is an error."""

    def __init__(self, where: str, document: object) -> None:
        if not isinstance(document, dict):
            _bad(where, "must be a JSON object")
        self.where = where
        self.rest: dict[str, Any] = dict(document)

    def take(self, name: str) -> Any:
        if name not in self.rest:
            _bad(self.where, f"lacks {name!r}")
        return self.rest.pop(name)

    def end(self) -> None:
        if self.rest:
            _bad(self.where, f"has an unknown field {_shown(next(iter(self.rest)))}")

    def fail(self, name: str, problem: str) -> NoReturn:
        _bad(f"{self.where}.{name}", problem)

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.take(name)
        if type(value) is not int or not low <= value <= high:
            self.fail(name, f"must be a whole number from {low} to {high}")
        return int(value)

    def match(self, name: str, pattern: re.Pattern[str]) -> str:
        value = self.take(name)
        if not isinstance(value, str) or not pattern.match(value):
            self.fail(name, f"is not acceptable: {_shown(value)}")
        return value

    def text(self, name: str) -> str:
        return self.match(name, _TEXT)

    def choice(self, name: str, choices: Iterable[str]) -> str:
        value = self.take(name)
        if not isinstance(value, str) or value not in choices:
            self.fail(name, f"must be one of {', '.join(choices)}")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            self.fail(name, "must be true or false")
        return value

    def items(self, name: str, most: int, read: Callable[[str, Any], T]) -> tuple[T, ...]:
        value = self.take(name)
        if not isinstance(value, list) or len(value) > most:
            self.fail(name, f"must be a list of at most {most}")
        return tuple(read(f"{self.where}.{name}[{i}]", item) for i, item in enumerate(value))


def _lever(where: str, document: Any) -> Lever:
    fields = _Fields(where, document)
    kind = fields.choice("kind", ("notrack", "ct-timeout", "drop"))
    if kind == "drop":
        return _drop(fields)
    proto = fields.choice("proto", PROTOS)
    port = fields.integer("port", 1, 65535)
    roles = _some(fields.items("roles", len(ROLES), _one_of(ROLES)), f"{where}.roles")
    lever: Lever
    if kind == "notrack":
        low, high = _pair(fields, "ephemeral")
        lever = Notrack(
            proto=proto,
            port=port,
            roles=roles,
            ephemeral=(low, high),
            icmp=fields.flag("icmp"),
            peers=fields.items("peers", MAX_ADDRESSES, _address),
            addresses=fields.items("addresses", MAX_ADDRESSES, _address),
            accepts=fields.items("accepts", MAX_ACCEPTS, _accept),
            shared=fields.flag("shared") if "shared" in fields.rest else False,
        )
        if any(accept.role not in roles for accept in lever.accepts):
            _bad(f"{where}.accepts", "names a role that the lever does not have")
    else:
        states = POLICY_STATES[proto]
        policy = fields.items("policy", len(states), lambda at, item: _timeout(at, item, states))
        _some(tuple(state for state, _ in policy), f"{where}.policy")
        lever = CtTimeout(proto, port, roles, policy)
    fields.end()
    return lever


def _drop(fields: _Fields) -> Drop:
    drop = Drop(
        proto=fields.choice("proto", (*PROTOS, "")),
        port=fields.integer("port", 0, 65535),
        sources=fields.items("sources", MAX_ADDRESSES, _prefix),
        rate=fields.integer("rate", 0, FASTEST),
        each=fields.flag("each"),
    )
    fields.end()
    if drop.problem():
        _bad(fields.where, drop.problem())
    return drop


def _accept(where: str, document: Any) -> Accept:
    fields = _Fields(where, document)
    accept = Accept(
        tool=fields.choice("tool", TOOLS),
        family=fields.choice("family", FAMILIES),
        table=fields.match("table", _NAME),
        chain=fields.match("chain", _NAME),
        position=fields.integer("position", -1, 1 << 20),
        hook=fields.choice("hook", HOOKS),
        role=fields.choice("role", ROLES),
        flow=fields.choice("flow", FLOWS),
        terms=fields.items("terms", MAX_TERMS, _term),
    )
    fields.end()
    if accept.tool != "nft" and accept.family == "inet":
        _bad(where, "has family inet, which iptables does not know")
    if accept.table == "ctrace":
        _bad(where, "names ctrace's own table")
    return accept


def name_ok(name: str) -> bool:
    """Whether a table or chain name can stand in a plan."""
    return bool(_NAME.match(name))


def clean_text(text: str) -> str:
    """A host or namespace name with what a plan does not accept replaced by ``_``."""
    return re.sub(r"[^A-Za-z0-9_.:@/+=\[\] -]", "_", text)[:128]


def _timeout(where: str, item: Any, states: tuple[str, ...]) -> tuple[str, int]:
    if not isinstance(item, list) or len(item) != 2:
        _bad(where, "must be [state, seconds]")
    state, seconds = item
    if not isinstance(state, str) or state not in states:
        _bad(where, f"must name one of {', '.join(states)}")
    if type(seconds) is not int or not 1 <= seconds <= MAX_TIMEOUT:
        _bad(where, f"must be from 1 to {MAX_TIMEOUT} seconds")
    return state, seconds


def _pair(fields: _Fields, name: str) -> tuple[int, int]:
    value = fields.take(name)
    good = isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)
    if not good or not 1 <= value[0] <= value[1] <= 65535:
        fields.fail(name, "must be [low, high], ports from 1 to 65535")
    return value[0], value[1]


def _one_of(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def read(where: str, item: Any) -> str:
        if not isinstance(item, str) or item not in choices:
            _bad(where, f"must be one of {', '.join(choices)}")
        return item

    return read


def _address(where: str, item: Any, read: Callable[[str], object] = ip_address) -> str:
    # Scoped addresses (fe80::1%eth0) would carry an interface name: refused.
    try:
        return str(read(item if isinstance(item, str) and "%" not in item else ""))
    except ValueError:
        _bad(where, "must be an IPv4 or IPv6 address")


def _prefix(where: str, item: Any) -> str:
    return _address(where, item, ip_network if "/" in str(item) else ip_address)


def _term(where: str, document: Any) -> Term:
    fields = _Fields(where, document)
    term = Term(
        field=fields.choice("field", FIELDS),
        values=fields.items("values", MAX_VALUES, _word),
        negate=fields.flag("negate"),
    )
    fields.end()
    problem = term.problem()
    if problem:
        _bad(where, problem)
    return term


def _word(where: str, item: Any) -> str:
    if not isinstance(item, str):
        _bad(where, "must be a text")
    return item


def _some(values: tuple[str, ...], where: str) -> tuple[str, ...]:
    if not values or len(set(values)) != len(values):
        _bad(where, "must have at least one value, and none twice")
    return values


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("duplicate key")
    return document


def _shown(value: object) -> str:
    """A value in an error message: short, one line, no control characters."""
    return ascii(value)[:60]


def _bad(where: str, problem: str) -> NoReturn:
    # ``where`` is made of our own field names and list indexes only.
    place = f" ({where})" if where and where != "plan" else ""
    raise UsageError(f"the plan is not usable: it{place} {problem}; make a new one with advise")
