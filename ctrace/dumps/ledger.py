"""From looks and events to what a live source yields: entries that come, stay and go.

The first look at a table gives EXISTING records. Between two looks that were made
alike, an entry that is new is an INSERT, and one that is missing a DESTROY. When
exactly they came and went is known as far as ages and timeouts tell, else to within
the time between the looks: a birth is put as late as they allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.dumps.found import NOT_TOLD, Dump, Spool
from ctrace.dumps.looks import Look
from ctrace.record import RECORD, TCP, TCP_STATES, Events, Kind, Reason, empty, join

PART: Final = 1 << 16
"""Records yielded together."""
CLOSED: Final = (TCP_STATES.index("TIME_WAIT"), TCP_STATES.index("CLOSE"))
"""States that no packet renews: their timeout tells when the connection closed."""
NO_STATE: Final = 255
MET: Final = 2048
"""Entries of a look whose remaining time is reported at most, an even sample."""
ESTABLISHED: Final = TCP_STATES.index("ESTABLISHED")
SHORTEST: Final = 3600
"""Seconds: a shorter timeout of ESTABLISHED may be another one (_unacknowledged, _max_retrans), and
does not tell for how long a connection was idle."""

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


@dataclass
class Timeouts:
    """Seconds by protocol and TCP state, where settings were given; -1 unknown."""

    tcp: I64
    closed: I64

    @classmethod
    def of(cls, sysctls: Mapping[str, str]) -> Timeouts:
        """From ``net.netfilter.nf_conntrack_*`` as given; missing ones stay unknown."""
        tcp = np.full(256, -1, np.int64)
        for state, name in enumerate(TCP_STATES):
            text = sysctls.get(f"net.netfilter.nf_conntrack_tcp_timeout_{name.lower()}", "")
            if text.isdigit() and len(text) < 10:
                tcp[state] = int(text)
        closed = np.full(256, -1, np.int64)
        closed[list(CLOSED)] = tcp[list(CLOSED)]
        return cls(tcp, closed)


@dataclass
class Ledger:
    """One namespace's table, dump after dump."""

    spool: Spool
    netns: int
    offset: int
    """UTC ns of boot."""
    timeouts: Timeouts
    alive: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    where: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    """Number in the spool of each entry alive, as it was last seen; sorted by ``alive``."""
    guessed: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Those alive that were made between two looks, nobody knows when: how long their connections
    lived is not known either."""
    at: dict[int, int] = field(default_factory=dict)
    """Boot ns of the last look of each series."""
    shown: dict[int, U64] = field(default_factory=dict)
    """The entries of that look."""
    seen: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of event streams: entry to (number in the spool, boot ns) of its last event."""

    def look(self, look: Look) -> Iterator[Events]:
        """The records that a look adds, in order of time."""
        now = self._boot(round(look.at * 1e9))
        series = look.series
        before = self.at.get(series)
        self.at[series] = now
        last, self.shown[series] = self.shown.get(series, look.ct), look.ct
        known = np.isin(look.ct, self.alive)
        at = look.start + look.rows
        if before is None or look.apart is None:
            yield from self._existing(at[~known], now)
            self._merge(look.ct, at)
            return
        gone = np.isin(self.alive, last) & ~np.isin(self.alive, look.ct)
        yield from self._changed(at[~known], self.where[gone], before, now)
        keep = ~gone
        self.alive, self.where = self.alive[keep], self.where[keep]
        self._merge(look.ct, at)
        self.guessed = self.guessed[np.isin(self.guessed, self.alive)]

    def met(self, look: Look) -> Events:
        """Looks at some of its entries: the time that each has left, and for how long it was idle,
        where the setting was given."""
        known = look.rows[look.left >= 0]
        at = look.start + known[:: max(1, -(-len(known) // MET))]
        edges = np.flatnonzero(np.diff(at // PART)) + 1  # what is read at once stays small
        rows = join([self._rows(some) for some in np.split(at, edges)])
        left = -rows["overdue_ms"].astype(np.int64)
        whole = np.where(rows["proto"] == TCP, self.timeouts.tcp[rows["state"]], -1) * 1000
        closed = np.isin(rows["state"], CLOSED)
        long_ = (rows["state"] == ESTABLISHED) & (np.minimum(left, whole) > SHORTEST * 1000)
        told = (whole >= left) & (closed | long_) & ~np.isin(rows["ct"], self.guessed)
        rows["idle_ms"] = np.where(told, whole - left, -1).clip(-1, (1 << 31) - 1)
        rows["timeout_ms"] = np.where(told & closed, whole, 0)
        rows["ts"], rows["kind"] = self._boot(round(look.at * 1e9)), Kind.MET
        rows["reason"] = Reason.NONE
        return rows

    def _boot(self, utc: int) -> int:
        return utc - self.offset

    def _merge(self, ct: U64, at: I64) -> None:
        """Replace what was known of these entries with how they were seen now."""
        whole, places = np.concatenate((ct, self.alive)), np.concatenate((at, self.where))
        self.alive, first = np.unique(whole, return_index=True)
        self.where = places[first]

    def _rows(self, at: I64) -> Events:
        """Records of the spool by number, without its own use of their last bytes."""
        order = np.argsort(at, kind="stable")
        rows: Events = np.zeros(len(at), RECORD)
        sorted_ = at[order]
        for part in range(0, len(at), PART):
            some = sorted_[part : part + PART]
            if len(some):
                first = int(some[0])
                last = int(some[-1])
                if last - first < 4 * PART:
                    found = self.spool.read(first, last + 1)[(some - first)]
                else:
                    found = self.spool.some(0, some)
                rows.view(_ROW)[order[part : part + PART]] = found.view(_ROW)
        rows["netns"] = self.netns
        return rows

    def _existing(self, at: I64, now: int) -> Iterator[Events]:
        for part in range(0, len(at), PART):
            rows = self._rows(at[part : part + PART])
            rows["ts"], rows["kind"], rows["reason"] = now, Kind.EXISTING, Reason.NONE
            rows["owner"], rows["cgroup"] = 0, 0
            yield rows

    def _changed(self, new: I64, gone: I64, before: int, now: int) -> Iterator[Events]:
        """Births and ends between two looks."""
        births, ends = [], []
        for part in range(0, len(new), PART):
            rows = self._rows(new[part : part + PART])
            births.append(self._births(rows, before, now))
            unknown = rows["ct"][rows["idle_ms"].astype(np.int64) < 0]
            self.guessed = np.union1d(self.guessed, unknown)
        for part in range(0, len(gone), PART):
            ends.append(self._ends(self._rows(gone[part : part + PART]), before, now)["ts"].copy())
        when = np.concatenate([np.zeros(0, np.uint64), *births, *ends])
        which = np.concatenate((new, gone))
        order = np.argsort(when, kind="stable")
        for part in range(0, len(order), PART):
            chosen = order[part : part + PART]
            rows, born = self._rows(which[chosen]), chosen < len(new)
            made = empty(len(rows))
            made.view(_ROW)[:] = rows.view(_ROW)
            made[born] = _inserted(made[born], when[chosen[born]])
            made[~born] = self._ends(made[~born], before, now)
            yield made

    def _births(self, rows: Events, before: int, now: int) -> U64:
        """When each was made: from its age, otherwise as late as its timeout allows."""
        age = rows["idle_ms"].astype(np.int64)
        idle = np.maximum(self._since_close(rows), 0)
        since = np.where(age >= 0, age, idle) * 1_000_000_000
        when: U64 = np.clip(now - since, before + 1, now).astype(np.uint64)
        return when

    def _since_close(self, rows: Events) -> I64:
        """Seconds since a closed connection's last packet; -1 where that is not known."""
        left = -rows["overdue_ms"].astype(np.int64) // 1000
        whole = np.where(rows["proto"] == TCP, self.timeouts.closed[rows["state"]], -1)
        known = (whole >= 0) & (rows["overdue_ms"] <= 0) & (left <= whole)
        return np.where(known, whole - left, -1)

    def _ends(self, rows: Events, before: int, now: int) -> Events:
        """The entries as DESTROY records: at their timeout where it expired between the looks."""
        left = -rows["overdue_ms"].astype(np.int64) * 1_000_000
        ran_out = (rows["overdue_ms"] <= 0) & (before + left <= now)
        end = np.where(ran_out, before + left, (before + now) // 2)
        closed = self._since_close(rows)
        known = (closed >= 0) & ~np.isin(rows["ct"], self.guessed)
        idle = np.where(known, (end - before) // 1_000_000 + closed * 1000, -1)
        whole = np.where(closed >= 0, self.timeouts.closed[rows["state"]], 0)
        mark = rows["mark"].copy()
        rows["ts"] = np.maximum(end, before + 1)
        rows["kind"], rows["reason"] = Kind.DESTROY, Reason.GONE
        rows["idle_ms"] = np.minimum(idle, (1 << 31) - 1)
        rows["overdue_ms"], rows["timeout_ms"], rows["mark"] = 0, whole * 1000, mark
        return rows

    # -- events -----------------------------------------------------------------------

    def events(self, dump: Dump, untimed: int) -> Iterator[Events]:
        """Output of ``conntrack -E``; ``untimed`` is the time of events without one."""
        latest = 0
        for first, part in self.spool.parts(dump.start, dump.stop, PART // 4):
            out: list[Events] = []
            timed = part["ts"] != 0
            times = np.where(timed, part["ts"].astype(np.int64) - self.offset, untimed)
            times = np.maximum.accumulate(np.maximum(times, max(latest, 1)))
            latest = int(times[-1])
            part["netns"] = self.netns
            kinds, cts = part["kind"].tolist(), part["ct"].tolist()
            for i, (kind, ct, at) in enumerate(zip(kinds, cts, times.tolist())):
                out += self._event(part[i : i + 1], first + i, kind, ct, at)
            yield join(out)

    def _event(self, row: Events, number: int, kind: int, ct: int, at: int) -> list[Events]:
        known = self.seen.get(ct)
        if kind == Kind.DESTROY:
            out = [] if known else [_as(row, at, Kind.EXISTING, Reason.NONE)]
            self.seen.pop(ct, None)
            out.append(self._destroyed(row, at, known))
            return out
        if len(self.seen) > (1 << 22):
            self.seen.pop(next(iter(self.seen)))
        self.seen[ct] = number, at
        if kind == Kind.INSERT:
            by_user = Reason.USER if int(row["reason"][0]) else Reason.NEW
            out = [_as(row, at, Kind.INSERT, by_user)]
            if known:  # its end was lost
                out.insert(0, _as(row, at, Kind.DESTROY, Reason.GONE))
            return out
        return [] if known else [_as(row, at, Kind.EXISTING, Reason.NONE)]

    def _destroyed(self, row: Events, at: int, known: Optional[tuple[int, int]]) -> Events:
        reason = Reason.DELETED if int(row["reason"][0]) else Reason.GONE
        out = _as(row, at, Kind.DESTROY, reason)
        if known is None:
            return out
        last = self.spool.read(known[0], known[0] + 1)
        if int(out["state"][0]) == NO_STATE:
            out["state"] = last["state"]
        left = int(last["overdue_ms"][0])
        if int(last["state"][0]) in CLOSED and int(row["proto"][0]) == TCP and left != NOT_TOLD:
            idle = round((at - known[1]) / 1_000_000)
            out["idle_ms"] = min(idle, (1 << 31) - 1)
            out["timeout_ms"] = -left
            out["overdue_ms"] = max(0, min(idle + left, (1 << 31) - 1))
        return out


_ROW: Final = np.dtype((np.void, RECORD.itemsize))


def _as(row: Events, at: int, kind: Kind, reason: Reason) -> Events:
    out: Events = empty(1)
    out.view(_ROW)[:] = row.view(_ROW)
    mark = int(row["mark"][0])
    out["ts"], out["kind"], out["reason"], out["owner"], out["cgroup"] = at, kind, reason, 0, 0
    if kind == Kind.DESTROY:
        out["idle_ms"], out["mark"] = -1, mark
    return out


def _inserted(rows: Events, when: U64) -> Events:
    rows["ts"], rows["kind"], rows["reason"] = when, Kind.INSERT, Reason.NEW
    rows["owner"], rows["cgroup"] = 0, 0
    return rows
