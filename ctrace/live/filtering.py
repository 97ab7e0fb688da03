"""The filter that a person types on the screen: which flows, and which rows of them.

Fields of flows (namespace, service, addresses) choose flows in the model, whatever rows are
grouped by; text, NAT and owner choose among the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from ctrace.errors import UsageError, nearest
from ctrace.filters import Network, parse_network, parse_proto
from ctrace.live.protocol import MOST_ROWS
from ctrace.model import by_status
from ctrace.model.scope import Scope
from ctrace.model.snapshot import Culprit, Snapshot, Victim
from ctrace.record import PROTO_NUMBERS, proto_name

if TYPE_CHECKING:
    from ctrace.model.model import Model

SEARCHED = 5000
"""Culprits that a filter of rows is applied to: a match may be small."""

Row = Union[Culprit, Victim]
Test = Callable[[Row], bool]

FIELDS = {
    "proto": "protocol, by name or number",
    "src": "original source, an address or prefix",
    "dst": "original destination",
    "dport": "service port",
    "port": "the same",
    "netns": "namespace, by name or inode number",
    "nat": "src, dst or no",
    "owner": "part of a process's, unit's, container's or pod's name",
    "status": "ASSURED, SEEN_REPLY or UNREPLIED, of a sample of what is held",
}

FLOWS = ("netns", "proto", "port", "dport", "src", "dst")
"""Fields that select flows, in the model."""
_SERVICE = ("netns", "proto", "port", "dport")
TOLD = {
    "pair": (*_SERVICE, "src"),
    "service": _SERVICE,
    "src": ("netns", "src"),
    "dst": ("netns", "dst"),
    "netns": ("netns",),
    "process": ("netns",),
}
"""The flow fields that rows of each grouping still have."""


def parse(text: str) -> list[tuple[str, Test]]:
    """The tests that a row must pass, each with its field: ``dport=53 proto=udp nginx``.

    A word without ``=`` is looked for in the key, the owner and the namespace; ``udp/53``
    is ``proto=udp dport=53``. Raises UsageError.
    """
    return [_test(word) for word in _words_of(text)]


def _words_of(text: str) -> list[str]:
    found = []
    for word in text.replace(",", " ").split():
        proto, slash, port = word.partition("/")
        if slash and port.isascii() and port.isdecimal() and proto.lower() in PROTO_NUMBERS:
            found += [f"proto={proto}", f"dport={port}"]
        else:
            found.append(word)
    return found


def scope_of(text: str, netns: Callable[[str], int] = lambda _: 0) -> Scope:
    """The flows that a filter selects; ``netns`` gives a namespace's number. Raises UsageError."""
    parse(text)
    chosen: dict[str, Any] = {}
    for word in _words_of(text):
        name, equals, value = word.partition("=")
        name = name.lower().lstrip("-")
        if name not in FLOWS or not equals:
            continue
        if name in ("src", "dst"):
            chosen[name] = (*chosen.get(name, ()), parse_network(value))
            continue
        field = "port" if name == "dport" else name
        one = (
            netns(value)
            if field == "netns"
            else (parse_proto(value) if field == "proto" else int(value))
        )
        if chosen.setdefault(field, one) != one:
            raise UsageError(f"no flow has two of {field}: give one")
    return Scope(**chosen)


def check(group: str, text: str) -> None:
    """Raises UsageError, with what to do, when a grouping's rows can't be narrowed this way."""
    if refusal := scope_of(text).refusal(group):
        raise UsageError(refusal)
    by_status.check(_statuses(text))


def _statuses(text: str) -> tuple[str, ...]:
    """The words of a filter that ask for a status."""
    words = (word.partition("=") for word in _words_of(text))
    return tuple(value for name, _, value in words if name.lower() == "status")


class View(NamedTuple):
    """What a screen asks for."""

    group: str = "pair"
    sort: str = "held"
    text: str = ""
    """The filter."""
    limit: int = MOST_ROWS
    """Culprits."""


def view(model: Model, asked: View, flow_filter: str = "", whole: str = "") -> Snapshot:
    """A screen's request, applied to what was captured as ``whole`` says.

    ``flow_filter`` is the part of it that selected among a table's flows. Raises UsageError.
    """
    group, sort, text, limit = asked
    scope = scope_of(text, model.netns)
    of_rows = any(name not in FLOWS for name, _ in parse(text))
    snapshot = model.snapshot(
        group=group,
        sort=sort,
        limit=SEARCHED if of_rows else limit,
        filter_text=flow_filter,
        scope=scope,
    )
    if statuses := _statuses(text):
        every = model.snapshot(group="service", limit=SEARCHED, scope=scope).culprits
        snapshot = by_status.narrowed(snapshot, statuses, every)
    if text:
        snapshot = filtered(snapshot, text)
        snapshot = replace(snapshot, culprits=snapshot.culprits[:limit])
    return replace(snapshot, filter=_both(whole, text))


def _both(whole: str, text: str) -> str:
    """The words of two filters, each once."""
    return " ".join(dict.fromkeys([*whole.split(), *text.split()]))


def _test(word: str) -> tuple[str, Test]:
    name, equals, value = word.partition("=")
    if not equals:
        wanted = word.lower()
        return "", lambda row: wanted in _words(row)
    name = name.lower().lstrip("-")
    make = _TESTS.get(name)
    if make is None:
        known = f"{', '.join(FIELDS)}, or any text{nearest(name, FIELDS)}"
        raise UsageError(f"unknown filter {name!r}: use {known}")
    return name, make(name, value)


def _proto(_: str, value: str) -> Test:
    proto = proto_name(parse_proto(value))
    return lambda row: row.proto == proto


def _network(name: str, value: str) -> Test:
    network = parse_network(value)
    return lambda row: _inside(getattr(row, name), network)


def _port(_: str, value: str) -> Test:
    if not (value.isascii() and value.isdecimal()) or int(value) > 65535:
        raise UsageError(f"{value!r} is not a port: give a number up to 65535")
    port = int(value)
    return lambda row: row.port == port


def _netns(_: str, value: str) -> Test:
    return lambda row: value in (row.netns_name, str(row.netns))


def _status(_: str, value: str) -> Test:
    by_status.check((value,))
    return lambda _: True  # its rows were reckoned before


def _nat(_: str, value: str) -> Test:
    return lambda row: value in getattr(row, "nat", "").split(",")


def _owned(_: str, value: str) -> Test:
    wanted = value.lower()
    return lambda row: wanted in _owner(row)


_TESTS: dict[str, Callable[[str, str], Test]] = {
    "proto": _proto,
    "src": _network,
    "dst": _network,
    "dport": _port,
    "port": _port,
    "netns": _netns,
    "nat": _nat,
    "owner": _owned,
    "status": _status,
}


def _inside(address: str, network: Network) -> bool:
    try:
        return ip_address(address) in network
    except ValueError:
        return False


def _owner(row: Row) -> str:
    owner = row.owner
    opened = f"{owner.comm} {owner.unit} {owner.cmdline} " if owner else ""
    return f"{opened}{row.pod}".lower()


def _words(row: Row) -> str:
    service = f"{row.proto}/{row.port}" if row.port is not None else row.proto
    return f"{row.key} {service} {row.netns_name} {_owner(row)}".lower()


def filtered(snapshot: Snapshot, text: str) -> Snapshot:
    """The snapshot with only the rows that pass. Raises UsageError.

    Where rows are grouped so that they lack such a field, the flows were selected before.
    """
    tests = parse(text)
    if not tests:
        return snapshot
    told = TOLD.get(snapshot.group, ())
    of_rows = [test for name, test in tests if name in told or name not in FLOWS]
    return replace(
        snapshot,
        culprits=tuple(row for row in snapshot.culprits if all(test(row) for test in of_rows)),
        victims=tuple(row for row in snapshot.victims if all(test(row) for _, test in tests)),
        filter=_both(snapshot.filter, text),
    )
