"""The filter that a person types on the screen, applied to rows that are there already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from typing import Union

from ctrace.errors import UsageError
from ctrace.filters import Network, parse_network, parse_proto
from ctrace.model.snapshot import Culprit, Snapshot, Victim
from ctrace.record import proto_name

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
    "owner": "part of a process's, unit's or container's name",
}


def parse(text: str) -> list[Test]:
    """The tests that a row must pass: ``dport=53 proto=udp nginx``, joined by AND.

    A word without ``=`` is looked for in the key, the owner and the namespace; ``udp/53``
    is such a word. Raises UsageError.
    """
    return [_test(word) for word in text.replace(",", " ").split()]


def _test(word: str) -> Test:
    name, equals, value = word.partition("=")
    if not equals:
        wanted = word.lower()
        return lambda row: wanted in _words(row)
    name = name.lower().lstrip("-")
    make = _TESTS.get(name)
    if make is None:
        raise UsageError(f"unknown filter {name!r}: use {', '.join(FIELDS)}, or any text")
    return make(name, value)


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


def _nat(_: str, value: str) -> Test:
    return lambda row: getattr(row, "nat", "") == value


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
}


def _inside(address: str, network: Network) -> bool:
    try:
        return ip_address(address) in network
    except ValueError:
        return False


def _owner(row: Row) -> str:
    owner = row.owner
    return f"{owner.comm} {owner.unit} {owner.cmdline}".lower() if owner else ""


def _words(row: Row) -> str:
    service = f"{row.proto}/{row.port}" if row.port is not None else row.proto
    return f"{row.key} {service} {row.netns_name} {_owner(row)}".lower()


def filtered(snapshot: Snapshot, text: str) -> Snapshot:
    """The snapshot with only the rows that pass. Raises UsageError."""
    tests = parse(text)
    if not tests:
        return snapshot
    return replace(
        snapshot,
        culprits=tuple(row for row in snapshot.culprits if all(test(row) for test in tests)),
        victims=tuple(row for row in snapshot.victims if all(test(row) for test in tests)),
        filter=snapshot.filter if text in snapshot.filter else f"{snapshot.filter} {text}".strip(),
    )
