"""Recordings of several hosts merged into one, with the host in the name of each namespace."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Optional

import numpy as np

from ctrace.batch import Batch, Clock, Counts, HookInfo, Names, TableReading
from ctrace.cost.result import Perf
from ctrace.errors import UsageError
from ctrace.record import Events, Kind, words
from ctrace.recording.assembly import Missing
from ctrace.recording.derived import Headed, Recorded
from ctrace.recording.format.meta import Header
from ctrace.recording.reader import Recording
from ctrace.recording.series import NUMBER, SESSION, Series, open_recording

HOSTS = 255


def open_several(paths: Sequence[str]) -> Recorded:
    """A single recording as it is, consecutive segments as one, those of several hosts merged.

    Raises CtraceError when one of them cannot be read, UsageError when two are of the same flows
    of one host: its entries would count twice.
    """
    if len(paths) == 1:
        return open_recording(paths[0])
    opened: list[Recording] = []
    try:
        opened.extend(open_recording(path) for path in paths)
        if _consecutive(opened):
            opened.sort(key=lambda one: one.started)
            for one in opened:
                one.close()
            return Series([one.path for one in opened])
        _check_hosts(opened)
    except BaseException:
        for one in opened:
            one.close()
        raise
    return Merged(opened)


def _consecutive(recordings: Sequence[Recording]) -> bool:
    facts = [one.header.facts for one in recordings]
    sessions = {one.get(SESSION) for one in facts}
    numbers = sorted(int(text) for one in facts if (text := one.get(NUMBER, "")).isdigit())
    if len(sessions) > 1 or None in sessions or len(numbers) != len(facts):
        return False
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _check_hosts(recordings: Sequence[Recording]) -> None:
    """Raises UsageError when two recordings were made since one start of one host, with the same
    filter, or are one file."""
    seen: dict[tuple[str, str], str] = {}
    files = set()
    for one in recordings:
        boot = one.header.facts.get("boot_id", "")
        other = seen.setdefault((boot, one.header.filter), one.path)
        file = os.path.realpath(one.path)
        if file in files:
            raise UsageError(f"{one.path} is given twice: its entries would count twice")
        files.add(file)
        if boot and other != one.path:
            raise UsageError(
                f"{other} and {one.path} are of the same host: give one of them, or compare them "
                f"with ctrace diff. A flight recorder's files go together only without gaps"
            )


class Merged(Headed):
    """Several recordings on one clock, the first booted host's."""

    def __init__(self, recordings: Sequence[Recorded]) -> None:
        """Raises UsageError for more than 255 of them."""
        if len(recordings) > HOSTS:
            raise UsageError(f"at most {HOSTS} recordings can be merged")
        self._of = recordings
        self.path = ", ".join(one.path for one in recordings)
        self.ended = "" if all(one.ended is not None for one in recordings) else None
        names = _distinct([one.header.host or os.path.basename(one.path) for one in recordings])
        self._hosts = names
        clock = Clock(min(one.clock.offset for one in recordings))
        self._shifts = [one.clock.offset - clock.offset for one in recordings]
        self._netns, self._owners, self._cgroups = _Ids(32), _Ids(64), _Ids(64)
        self.header = Header(
            _hooks(recordings, names),
            clock,
            min(one.started + s for one, s in zip(recordings, self._shifts)),
            host=", ".join(names) if len(names) < 4 else f"{len(names)} hosts",
            kernel=", ".join(sorted({one.header.kernel for one in recordings})),
            filter=", ".join(
                dict.fromkeys(one.header.filter for one in recordings if one.header.filter)
            ),
            facts=_shared([one.header for one in recordings]),
            hosts=tuple(names),
        )

    @property
    def missing(self) -> Missing:
        """What is missing from all of them together."""
        total = Missing()
        for host, one in zip(self._hosts, self._of):
            total.bytes += one.missing.bytes
            total.events += one.missing.events
            total.truncated |= one.missing.truncated
            total.spent += [f"{host}: {what}" for what in one.missing.spent]
            total.damage += [f"{host}: {what}" for what in one.missing.damage]
        return total

    @property
    def until(self) -> int:
        """When the last of them ended."""
        return max(one.until + s for one, s in zip(self._of, self._shifts))

    def batches(self, interval: float = 0.0) -> Iterator[Batch]:
        """All batches in the order of their ends, each with every host's last counters."""
        counts: dict[int, Counts] = {}
        tables: dict[int, TableReading] = {}
        streams = [self._mapped(i, interval) for i in range(len(self._of))]
        for _, _, batch in heapq.merge(*streams, key=lambda item: item[:2]):
            counts.update(batch.counts)
            tables.update((table.netns, table) for table in batch.tables)
            yield replace(
                batch, counts=dict(counts), tables=tuple(tables.values()) if batch.tables else ()
            )

    def seek(self, utc: int) -> None:
        """Where :meth:`batches` begins."""
        for one in self._of:
            one.seek(utc)

    def counts(self) -> Iterator[tuple[int, dict[int, Counts]]]:
        """Counters by time, each moment with every host's last."""
        known: dict[int, Counts] = {}
        streams = [self._counted(i) for i in range(len(self._of))]
        for until, _, counts in heapq.merge(*streams, key=lambda item: item[:2]):
            known.update(counts)
            yield until, dict(known)

    def rulesets(self) -> Iterator[tuple[int, str]]:
        """Every host's."""
        for i, one in enumerate(self._of):
            for netns, text in one.rulesets():
                yield self._netns.get(i, netns), text

    def measurements(self) -> Iterator[tuple[str, Perf]]:
        """Every host's."""
        for host, one in zip(self._hosts, self._of):
            for _, perf in one.measurements():
                yield host, perf

    def notes(self) -> Iterator[str]:
        """Every host's, with its name."""
        for host, one in zip(self._hosts, self._of):
            for note in one.notes():
                yield f"{host}: {note}"

    def close(self) -> None:
        """Let go of all files."""
        for one in self._of:
            one.close()

    def _mapped(self, i: int, interval: float) -> Iterator[tuple[int, int, Batch]]:
        shift = self._shifts[i]
        for batch in self._of[i].batches(interval):
            until = batch.until + shift
            yield (
                until,
                i,
                replace(
                    batch,
                    events=self._events(i, batch.events, shift),
                    until=until,
                    counts={self._netns.get(i, n): values for n, values in batch.counts.items()},
                    tables=tuple(
                        replace(t, netns=self._netns.get(i, t.netns), at=t.at and t.at + shift)
                        for t in batch.tables
                    ),
                    names=self._names(i, batch.names),
                    beside=tuple(
                        replace(b, netns=self._netns.get(i, b.netns)) for b in batch.beside
                    ),
                ),
            )

    def _counted(self, i: int) -> Iterator[tuple[int, int, dict[int, Counts]]]:
        for until, counts in self._of[i].counts():
            mapped = {self._netns.get(i, netns): values for netns, values in counts.items()}
            yield until + self._shifts[i], i, mapped

    def _events(self, i: int, events: Events, shift: int) -> Events:
        events = words(events).copy().view(events.dtype).reshape(-1)
        events["ts"] += np.uint64(shift)
        # The top byte of an identity is the same on all entries of a host.
        tracked = events["ct"] != 0
        ct = events["ct"][tracked] & np.uint64((1 << 56) - 1)
        events["ct"][tracked] = ct | np.uint64(i << 56)
        events["netns"] = self._netns.map(i, events["netns"])
        packets = (events["kind"] != Kind.DESTROY) & (events["kind"] != Kind.EXISTING)
        events["owner"][packets] = self._owners.map(i, events["owner"][packets])
        events["cgroup"][packets] = self._cgroups.map(i, events["cgroup"][packets])
        return events

    def _names(self, i: int, names: Names) -> Names:
        host = self._hosts[i]

        def owner(one: Any) -> Any:
            return replace(
                one, key=self._owners.get(i, one.key), cgroup=self._cgroups.get(i, one.cgroup)
            )

        return Names(
            {
                (inum := self._netns.get(i, n.inum)): replace(n, inum=inum, name=f"{host}:{n.name}")
                for n in names.netns.values()
            },
            {(new := owner(one)).key: new for one in names.owners.values()},
            {self._cgroups.get(i, key): name for key, name in names.cgroups.items()},
            {
                (self._netns.get(i, netns), proto, port): owner(one)
                for (netns, proto, port), one in names.listeners.items()
            },
        )


class _Ids:
    """Numbers that each host assigns by itself, made distinct: most stay as they are."""

    def __init__(self, bits: int) -> None:
        self._last = (1 << bits) - 1
        self._of: dict[tuple[int, int], int] = {}
        self._taken: set[int] = set()

    def get(self, host: int, number: int) -> int:
        """The number to use for a host's number; 0 stays 0."""
        if not number:
            return 0
        found = self._of.get((host, number))
        if found is None:
            found = number
            while found in self._taken:
                found = found - 1 if found > 1 else self._last
            self._taken.add(found)
            self._of[host, number] = found
        return found

    def map(self, host: int, numbers: Any) -> Any:
        """The same for an array."""
        distinct, inverse = np.unique(numbers, return_inverse=True)
        new = np.array([self.get(host, number) for number in distinct.tolist()], numbers.dtype)
        return new[inverse]


def _distinct(names: list[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name}#{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


def _hooks(recordings: Sequence[Recorded], names: Sequence[str]) -> HookInfo:
    all_ = [one.hooks for one in recordings]
    blind: dict[str, list[str]] = {}
    for host, hooks in zip(names, all_):
        for sentence in hooks.blind:
            blind.setdefault(sentence, []).append(host)
    return HookInfo(
        all_[0].family if len({hooks.family for hooks in all_}) == 1 else "several",
        (),
        tuple(
            sentence if len(hosts) == len(names) else f"{', '.join(hosts)}: {sentence}"
            for sentence, hosts in blind.items()
        ),
        all(hooks.drop_tuples for hooks in all_),
        all(hooks.evictions for hooks in all_),
        all(hooks.owners for hooks in all_),
        all(hooks.changes for hooks in all_),
        all(hooks.refusals for hooks in all_),
        "; ".join(f"{host}: {one.note}" for host, one in zip(names, all_) if one.note),
    )


def _shared(headers: Sequence[Header]) -> dict[str, str]:
    """Facts on which all hosts agree; of the others, each host's."""
    out: dict[str, str] = {}
    for name, value in headers[0].facts.items():
        values: list[Optional[str]] = [header.facts.get(name) for header in headers]
        same = all(other == value for other in values)
        out[name] = value if same else " / ".join(other or "-" for other in values)
    return {name: value for name, value in out.items() if not name.startswith("segment.")}
