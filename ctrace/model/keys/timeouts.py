"""Which entries do not have the timeout that the kernel's settings give them now.

How long an entry was idle is derived from the timeout in force when it is looked at, or ends. The
entry had another one where the setting was changed meanwhile, or a ``ct timeout`` policy chose it.
After a shorter setting, or under a policy, looks at living entries show it: they have more time
left than the timeout in force. After a longer one they seem to have been idle for longer than they
were: renewed at a time at which others still had the old timeout.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.model.composition import UNACKNOWLEDGED
from ctrace.model.keys.columns import I64, SERVICE_MASK, TICK_MS, U64, Window
from ctrace.model.keys.scatter import Rows

LATER_MS: Final = 90_000
"""ms by which expired entries may be collected late (gc_worker, nf_conntrack_core.c)."""
SOME: Final = 64
"""Ends of a window whose timeouts are noted."""
MOST: Final = 256
"""Services, and kinds of entries, that are remembered, at most."""
_KIND: Final = SERVICE_MASK & ~np.uint64(0xFFFF)
_REPLIED_OR_ASSURED: Final = np.uint64(6)


class Timeouts:
    """Entries whose lives are not derived from the timeouts in force."""

    def __init__(self) -> None:
        self._until: dict[int, int] = {}
        """By service: until when none of its ends tells (ns)."""
        self._before: dict[int, tuple[int, int]] = {}
        """By service: until when looks at entries made before a time do not tell (ns; that time,
        until)."""
        self._seen: dict[int, dict[int, tuple[int, int]]] = {}
        """By kind of entry, what looks showed: each timeout (ms), and when first and last (ns)."""
        self._changed: dict[int, tuple[int, int, int]] = {}
        """By kind: the timeout that took another one's place, since when, and, of a shorter one,
        until when entries with the other one may be there (ns); else 0."""

    def learn(self, w: Window, at: Rows) -> None:
        """Take looks at living entries."""
        self._learn_settings(w, at)
        over = w.events["overdue_ms"][at]
        more = (w.idle_ms(at) < 0) & (w.events["timeout_ms"][at] == 0) & (over < 0)
        often = _often(w.meta.take(at) & SERVICE_MASK, more)
        at = at[more]
        left = -w.events["overdue_ms"][at].astype(np.int64)
        until = w.ts.take(at).astype(np.int64) + (left + LATER_MS) * 1_000_000
        services = (w.meta.take(at) & SERVICE_MASK).tolist()
        for service, end in zip(services, until.tolist()):
            self._until[service] = max(end, self._until.get(service, 0))
        now = int(w.ts[0])
        for service in often:
            since, end = self._before.get(service, (now, 0))
            self._before[service] = (since if end >= now else now, self._until[service])
        self._forget()

    def _learn_settings(self, w: Window, at: Rows) -> None:
        timeout = w.events["timeout_ms"][at]
        told = np.flatnonzero((timeout > 0) & (timeout != UNACKNOWLEDGED * 1000))
        at, timeout = at[told], timeout[told]
        kinds = _kinds(w, at).tolist()
        for kind, ms, now in zip(kinds, timeout.tolist(), w.ts.take(at).tolist()):
            seen = self._seen.setdefault(kind, {})
            seen[ms] = (seen[ms][0] if ms in seen else now, now)
        for kind in set(kinds):
            self._changed.pop(kind, None)
            seen = self._seen[kind]
            ms = max(seen, key=lambda one: seen[one][1])
            since = seen[ms][0]
            before = [one for one, (_, last) in seen.items() if last < since]
            if before:
                until = since + (max(before) + LATER_MS) * 1_000_000
                self._changed[kind] = (ms, since, 0 if min(before) < ms else until)
        while len(self._seen) > MOST:
            gone = next(iter(self._seen))
            del self._seen[gone]
            self._changed.pop(gone, None)

    def older(self, w: Window, at: Rows, age: I64) -> npt.NDArray[np.bool_]:
        """Which of these ends or looks are at entries that may have been renewed before the timeout
        was set that they seem to have; ``age`` in ns, negative: unknown.

        A longer one makes it seem so itself; under a shorter one all that were there may have been.
        """
        found = np.zeros(at.size, bool)
        if not self._changed or not at.size:
            return found
        kinds, timeout = _kinds(w, at), w.events["timeout_ms"][at]
        now = w.ts.take(at).astype(np.int64)
        renewed = now - w.idle_ms(at).astype(np.int64) * 1_000_000
        born = np.where(age < 0, 0, now - age)
        for kind, (ms, since, until) in self._changed.items():
            before = (born < since) & (now < until) if until else renewed < since
            found |= (kinds == np.uint64(kind)) & (timeout == ms) & before
        return found

    def vague(self, w: Window, at: Rows, age: I64) -> npt.NDArray[np.bool_]:
        """Which of these looks do not tell how long an entry was idle.

        Where many entries of its service had more time left than the timeout in force, all that are
        older than the first such look may have another one: nobody need have looked before it was
        changed.
        """
        found = self.older(w, at, age)
        born = np.where(age < 0, 0, w.ts.take(at).astype(np.int64) - age)
        services, now = w.meta.take(at) & SERVICE_MASK, int(w.ts[0])
        for service, (since, until) in self._before.items():
            if until >= now:
                found |= (services == np.uint64(service)) & (born < since)
        return found

    def doubtful(self, w: Window, at: Rows, age: I64) -> npt.NDArray[np.bool_]:
        """Which of these ends do not tell how long they were idle; ``age`` in ns.

        Ends show a changed setting, too: where nobody looked for long, they alone do.
        """
        if at.size:
            self._learn_settings(w, at[:: max(1, at.size // SOME)])
        found = self.older(w, at, age)
        if not at.size:
            return found
        now = int(w.ts[0])
        # longer idle than it existed is impossible: that was not the timeout that it had
        wrong = w.idle_ms(at) > age / 1e6 + TICK_MS
        found |= wrong
        if wrong.any():
            self._distrust(w.meta.take(at) & SERVICE_MASK, wrong, now + LATER_MS * 1_000_000)
        if not self._until:
            return found
        services = np.array([one for one, end in self._until.items() if end >= now], np.uint64)
        found |= np.isin(w.meta.take(at) & SERVICE_MASK, services)
        return found

    def _distrust(self, services: U64, wrong: npt.NDArray[np.bool_], until: int) -> None:
        """Services most of whose ends had another timeout: where events were lost, the others may
        have the age of an earlier entry at the same address."""
        names, part = _parts(services, wrong)
        for service in names[part > 0.5].tolist():
            self._until[service] = max(until, self._until.get(service, 0))
        self._forget()

    def _forget(self) -> None:
        for known in (self._until, self._before):
            while len(known) > MOST:
                known.pop(next(iter(known)))


def _often(services: U64, some: npt.NDArray[np.bool_]) -> list[int]:
    """The services at least a quarter of whose looks are among ``some``."""
    if not some.any():
        return []
    names, part = _parts(services, some)
    found: list[int] = names[part >= 0.25].tolist()
    return found


def _parts(services: U64, some: npt.NDArray[np.bool_]) -> tuple[U64, npt.NDArray[np.float64]]:
    """Each service once, and the share of its rows that are among ``some``."""
    names, which, many = np.unique(services, return_inverse=True, return_counts=True)
    return names, np.bincount(which, some) / many


def _kinds(w: Window, at: Rows) -> U64:
    """What the settings tell entries apart by: namespace, protocol, state, replied and assured."""
    some = w.meta.take(at) & _KIND
    some |= w.states(at).astype(np.uint64)
    some |= (w.status.take(at).astype(np.uint64) & _REPLIED_OR_ASSURED) << np.uint64(8)
    return some
