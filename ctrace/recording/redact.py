"""A recording fit to be shown to others: addresses and names replaced, consistently.

Addresses are mapped prefix-preserving: two that share their first n bits still do
afterwards, so subnets stay subnets, and nothing else is told. Which bits turn is decided
by a keyed hash of the bits before them, under a key that is never written anywhere.
Private, loopback, link-local and multicast ranges stay what they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Optional

import numpy as np
import numpy.typing as npt

from ctrace.batch import Batch, Counts, Names, Netns, Owner
from ctrace.beside import Beside
from ctrace.cost.result import Perf
from ctrace.record import MAPPED_PREFIX, Events, address_bytes, address_text, words
from ctrace.recording.assembly import Missing
from ctrace.recording.derived import Headed, Recorded
from ctrace.recording.format import evidence
from ctrace.recording.format.meta import Header

Bytes16 = npt.NDArray[np.uint8]

KEPT = (
    "10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
    "224.0.0.0/4", "240.0.0.0/4", "2000::/3", "fc00::/7", "fe80::/10", "ff00::/8",
)  # fmt: skip
"""Ranges that map onto themselves."""
VERBATIM = ("0.0.0.0/8", "127.0.0.0/8", "::/127")
"""Addresses that mean the same everywhere."""
FACTS = ("net.", "machine", "cpus", "memory", "segment.number")
"""Prefixes of facts that do not reveal whose host it is."""
REMEMBERED = 1 << 20
"""Addresses with a cached mapping."""


class Addresses:
    """The mapping of addresses under one random key."""

    def __init__(self, key: bytes = b"") -> None:
        self._key = key or os.urandom(32)
        self._known: dict[bytes, bytes] = {}
        self._fixed = {4: _paths(4), 6: _paths(6)}

    def text(self, address: str) -> str:
        """The same for an address as text; empty for anything that is no address."""
        try:
            raw = np.frombuffer(address_bytes(address.split("/", maxsplit=1)[0]), np.uint8)
        except (ValueError, OSError):
            return ""
        return address_text(self.map(raw.reshape(1, 16))[0].tobytes())

    def map(self, addresses: Bytes16) -> Bytes16:
        """(n, 16) address bytes to their replacements."""
        whole = np.ascontiguousarray(addresses).view("V16").reshape(-1)
        distinct, inverse = np.unique(whole, return_inverse=True)
        raw = [value.tobytes() for value in distinct]
        new = [value for value in raw if value not in self._known]
        if len(self._known) + len(new) > REMEMBERED:
            self._known.clear()
            new = raw
        four = [value for value in new if value[:12] == MAPPED_PREFIX]
        six = [value for value in new if value[:12] != MAPPED_PREFIX]
        self._known.update(zip(four, self._map4(four)))
        self._known.update(zip(six, self._map6(six)))
        table = np.frombuffer(b"".join(self._known[value] for value in raw), np.uint8)
        return table.reshape(-1, 16)[inverse.reshape(-1)]

    def _map4(self, addresses: list[bytes]) -> list[bytes]:
        values = np.array([int.from_bytes(a[12:], "big") for a in addresses], np.uint64)
        mapped = self._turn(values, 32, 4)
        return [MAPPED_PREFIX + int(value).to_bytes(4, "big") for value in mapped]

    def _map6(self, addresses: list[bytes]) -> list[bytes]:
        high = np.array([int.from_bytes(a[:8], "big") for a in addresses], np.uint64)
        mapped = self._turn(high, 64, 6)
        out = []
        for address, value in zip(addresses, mapped.tolist()):
            if address in (bytes(16), bytes(15) + b"\x01"):
                out.append(address)
            else:
                # Below a /64 no prefixes are preserved: one hash for the whole rest.
                low = hashlib.blake2b(address, digest_size=8, key=self._key).digest()
                out.append(value.to_bytes(8, "big") + low)
        return out

    def _turn(
        self, values: npt.NDArray[np.uint64], bits: int, family: int
    ) -> npt.NDArray[np.uint64]:
        out = np.zeros_like(values)
        fixed, verbatim = self._fixed[family]
        for level in range(bits):
            shift = np.uint64(bits - level)
            prefixes = values >> shift if level else np.zeros_like(values)
            distinct, inverse = np.unique(prefixes, return_inverse=True)
            flips = np.array(
                [self._flips(int(p), level, family, fixed, verbatim) for p in distinct], np.uint64
            )
            bit = values >> np.uint64(bits - 1 - level) & np.uint64(1)
            out = out << np.uint64(1) | (bit ^ flips[inverse] if len(values) else bit)
        return out

    def _flips(
        self,
        prefix: int,
        level: int,
        family: int,
        fixed: set[tuple[int, int]],
        verbatim: list[tuple[int, int]],
    ) -> int:
        if (prefix, level) in fixed:
            return 0
        if any(level >= n and prefix >> (level - n) == p for p, n in verbatim):
            return 0
        text = b"%d %d %x" % (family, level, prefix)
        return hashlib.blake2b(text, digest_size=1, key=self._key).digest()[0] & 1


def _paths(version: int) -> tuple[set[tuple[int, int]], list[tuple[int, int]]]:
    """Prefixes on the way to a range that is kept (no bit after them is flipped), and verbatim
    ones."""
    bits = 32 if version == 4 else 128
    fixed: set[tuple[int, int]] = set()
    verbatim = []
    for text in (*KEPT, *VERBATIM):
        network: IPv4Network | IPv6Network = ip_network(text)
        if network.version != version:
            continue
        value, length = int(network.network_address), min(network.prefixlen, 64)
        for level in range(length):
            fixed.add((value >> (bits - level), level))
        if text in VERBATIM and version == 4:
            verbatim.append((value >> (bits - length), length))
    return fixed, verbatim


class Labels:
    """``process-3`` for the third name of its kind, the same each time."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], str] = {}
        self._counts: dict[str, int] = {}

    def get(self, kind: str, name: str) -> str:
        """The replacement; an empty name stays empty."""
        if not name:
            return ""
        if (kind, name) not in self._known:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            self._known[kind, name] = f"{kind}-{self._counts[kind]}"
        return self._known[kind, name]


class Redacted(Headed):
    """A recording with everything replaced that reveals whose it is.

    Rules and notes are left out, identities of entries (kernel addresses) are mixed. Times, ports,
    protocols, states and counters stay.
    """

    def __init__(self, recording: Recorded, key: bytes = b"") -> None:
        self._of = recording
        self._addresses = Addresses(key)
        self._labels = Labels()
        mixers = np.frombuffer(os.urandom(16), np.uint64) | np.uint64(1)
        self._mixers: tuple[np.uint64, np.uint64] = (mixers[0], mixers[1])
        header = recording.header
        hosts = tuple(self._labels.get("host", host) for host in header.hosts)
        self.header: Header = replace(
            header,
            hooks=replace(header.hooks, blind=_nameless(header.hooks.blind), note=""),
            host=", ".join(hosts) or self._labels.get("host", header.host),
            hosts=hosts,
            filter="(redacted)"
            if header.flow_filter
            else "netns=(redacted)"
            if header.filter
            else "",
            facts={
                **{n: v for n, v in header.facts.items() if n.startswith(FACTS)},
                **evidence.redacted(header.facts),
            },
        )
        self.path = self._labels.get("recording", recording.path)
        self.ended = recording.ended

    @property
    def missing(self) -> Missing:
        """What the original lacks."""
        return self._of.missing

    @property
    def until(self) -> int:
        """As in the original."""
        return self._of.until

    def batches(self, interval: float = 0.0) -> Iterator[Batch]:
        """The original's batches, redacted."""
        for batch in self._of.batches(interval):
            yield replace(
                batch,
                events=self.events(batch.events),
                names=self._names(batch.names),
                beside=tuple(map(self._beside, batch.beside)),
            )

    def seek(self, utc: int) -> None:
        """As in the original."""
        self._of.seek(utc)

    def counts(self) -> Iterator[tuple[int, dict[int, Counts]]]:
        """As in the original."""
        return self._of.counts()

    def rulesets(self) -> Iterator[tuple[int, str]]:
        """None: rules are full of names and addresses."""
        yield from ()

    def measurements(self) -> Iterator[tuple[str, Perf]]:
        """The original's, with other names of hosts and namespaces; stacks name functions."""
        for host, perf in self._of.measurements():
            tables = tuple(replace(t, netns=self._space(t.netns)) for t in perf.tables)
            blind = _nameless(perf.blind)
            yield self._labels.get("host", host), replace(perf, tables=tables, blind=blind)

    def notes(self) -> Iterator[str]:
        """A single note: that this recording is redacted."""
        yield "addresses and names are replaced; rules are left out"

    def close(self) -> None:
        """Let go of the original."""
        self._of.close()

    def events(self, events: Events) -> Events:
        """Events with other addresses and identities."""
        events = words(events).copy().view(events.dtype).reshape(-1)
        if not len(events):
            return events
        sides = ("src", "dst", "reply_src", "reply_dst")
        mapped = self._addresses.map(np.concatenate([events[side] for side in sides]))
        for i, side in enumerate(sides):
            events[side] = mapped[i * len(events) : (i + 1) * len(events)]
        first, second = self._mixers
        ct = events["ct"] * first
        events["ct"] = (ct ^ (ct >> np.uint64(32))) * second
        return events

    def _names(self, names: Names) -> Names:
        get = self._labels.get
        return Names(
            {inum: self._netns(netns) for inum, netns in names.netns.items()},
            {key: self._owner(owner) for key, owner in names.owners.items()},
            {key: get("unit", name) for key, name in names.cgroups.items()},
            {key: self._owner(owner) for key, owner in names.listeners.items()},
        )

    def _beside(self, one: Beside) -> Beside:
        """With other addresses, and without the names of tables and chains."""
        at = self._addresses.text
        return replace(
            one,
            refusing=tuple(
                replace(r, place=self._labels.get("rule", f"{r.place} {r.handle}"), handle=0)
                for r in one.refusing
            ),
            left=tuple(replace(e, dst=at(e.dst), backend=at(e.backend)) for e in one.left),
            ports=tuple(replace(p, source=at(p.source), dst=at(p.dst)) for p in one.ports),
            strays=tuple(replace(s, src=at(s.src)) for s in one.strays),
            short=tuple(
                replace(s, name=self._labels.get("device", s.name) if s.name else "")
                for s in one.short
            ),
        )

    def _netns(self, netns: Netns) -> Netns:
        host, colon, name = (
            netns.name.rpartition(":") if self.header.hosts else ("", "", netns.name)
        )
        label = self._space(name)
        prefix = self._labels.get("host", host) + colon
        mapped: Iterator[Optional[str]] = map(self._addresses.text, netns.addresses)
        return replace(netns, name=prefix + label, addresses=tuple(a for a in mapped if a))

    def _space(self, name: str) -> str:
        return name if name == "init" else self._labels.get("netns", name)

    def _owner(self, owner: Owner) -> Owner:
        return replace(
            owner,
            comm=self._labels.get("process", owner.comm),
            unit=self._labels.get("unit", owner.unit),
            cmdline="",
        )


def _nameless(sentences: Sequence[str]) -> tuple[str, ...]:
    """Those of what could not be seen that name no host and no namespace, as some do beside a
    colon; and how many others there are."""
    kept = tuple(one for one in sentences if ":" not in one)
    others = len(sentences) - len(kept)
    return (*kept, f"{others} more, which may hold names (redacted)") if others else kept
