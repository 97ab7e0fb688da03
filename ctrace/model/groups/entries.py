"""Properties of the entries of each key: how long they stay and live, and their states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.model import histogram, stays
from ctrace.model.composition import Looks, closed, compose
from ctrace.model.forecast import Staying
from ctrace.model.groups.sums import Details, Sums
from ctrace.model.keys.rich import LOOKS, TREND, distinct
from ctrace.model.keys.scatter import Rows
from ctrace.model.snapshot import OVER_TIME, Composition, Percentiles, Residence
from ctrace.record import TCP_STATES

ENOUGH: Final = 20
"""Entries. A share of fewer means nothing."""
CANDIDATES: Final = 512
"""How many of the heaviest keys are considered when sorting by a percentile."""
_SPREAD: Final = 64
"""Ages that stand for those of all living entries of a key, at most."""
_EVENLY: Final[npt.NDArray[np.float64]] = np.linspace(0, 1, _SPREAD)


class Entries(Sums):
    """The sums, and what is inferred about the entries behind them."""

    def order(self, sort: str, limit: int) -> Rows:
        """The first ``limit`` keys by a sort of :data:`~ctrace.model.snapshot.SORTS`.

        Or by table-seconds. With a leading ``-``, the last ones, last first.
        """
        turned, sort = sort.startswith("-"), sort.removeprefix("-")
        weight: tuple[npt.NDArray[Any], ...] = (self.held, self.table_seconds, self.rate)
        if sort == "new":
            weight = (self.rate, self.sums["inserts"], self.held)
        elif sort == "drops":
            weight = (self.sums["drops"], self.drop_rate, self.held)
        elif sort == OVER_TIME:
            weight = (self.table_seconds, self.held, self.sums["inserts"])
        ranked = np.lexsort(tuple(-part for part in reversed(weight)))
        ranked = ranked[self._told[ranked]]
        if sort in ("life", "residence"):
            some = ranked[:CANDIDATES]
            part = 0 if sort == "life" else 1
            median = [self._median(int(at), part) for at in some]
            if sort == "life":  # the shortest-lived first
                value = np.array([np.inf if m is None else m for m in median])
            else:
                value = np.array([np.inf if m is None else -m for m in median])
            ranked = some[np.argsort(value, kind="stable")]
        return ranked[::-1][:limit] if turned else ranked[:limit]

    def _median(self, at: int, part: int) -> Optional[float]:
        """Median of a key's lives (0) or residences (1); a lower bound where it is not known."""
        one = self.percentiles(at)[part]
        if one.p50 is not None or not isinstance(one, Residence):
            return one.p50
        return max(one.at_least or 0, one.by_load or 0) or None

    def _detail(self, at: int) -> Details:
        """Histograms: lives of the ended, lives of closed ones looked at, and residences."""
        if at in self._details:
            return self._details[at]
        life = np.zeros(histogram.BINS, np.int64)
        looked, residence = life.copy(), life.copy()
        for level, slots in self._rich(at):
            life += level.rich.life[slots].sum(axis=0, dtype=np.int64)
            looked += level.rich.looked_life[slots].sum(axis=0, dtype=np.int64)
            residence += level.rich.residence[slots].sum(axis=0, dtype=np.int64)
        return self._details.setdefault(at, (life, looked, residence))

    def looks_at(self, at: int) -> Looks:
        """The latest looks at living entries of a key, newest first."""
        if self._looks is None:
            key = self._key_of(self._context.looks)
            order = np.argsort(key, kind="stable")
            self._looks = order, np.searchsorted(key[order], np.arange(self.n + 1)), {}
        order, bounds, found = self._looks
        if at not in found:
            found[at] = self._still(at, order[bounds[at] : bounds[at + 1]])
        return found[at]

    def _still(self, at: int, rows: Rows) -> Looks:
        """Those of entries that are not known to have ended since."""
        looks = self._context.looks
        gone = looks["gone"][rows]
        if gone.any():  # by columns first: a look is a wide row
            then = self._held_then(at, looks["ts"][rows], gone)
            self._went[at] = float(gone.mean()) * then
            rows = rows[~gone]
        return looks[rows]

    def _held_then(self, at: int, ts: npt.NDArray[np.uint64], gone: npt.NDArray[np.bool_]) -> float:
        """How much a key held when it was looked at (ns), on average; which of it has gone."""
        context, held = self._context, int(self.held[at])
        if not self._trend(at):
            late = (context.until - float(ts.mean())) / 1e9
            came = late * float(self.rate[at])
            return max(held - came, 1.0) / max(1 - float(gone.mean()), 0.1)
        return float(np.interp(ts.astype(np.float64), *self._curve(at)).mean())

    def _curve(self, at: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Times (ns) and how much a key with a trend held then."""
        if at not in self._curves:
            trend, context = self._trend(at), self._context
            ended = context.ticked - np.arange(len(trend))[::-1] * context.interval * 1e9
            times = np.append(ended, context.until)
            self._curves[at] = times, np.array((*trend, self.held[at]), np.float64)
        return self._curves[at]

    def _unlike(self, at: int, looks: Looks) -> float:
        """The part of what a key holds that looks do not stand for.

        It came since; or as much went, and it is not known what; or it was looked at while it was
        young, and no other took its place.
        """
        ts, went = looks["ts"], self._went.get(at, 0.0)
        held, then = int(self.held[at]), self._held_then(at, ts, looks["gone"])
        since = (self._context.until - ts) / 1e9
        young = float(np.mean(looks["age"] < since))
        came = (held - then + went) / held
        return min(1.0, abs(came) + max(0.0, young - max(0.0, came)))

    def _key_of(self, looks: Looks) -> Rows:
        """The key of each look; -1 where it has no row."""
        key = np.full(len(looks), -1)
        for number, part in enumerate(self._parts):
            if not part.counted:
                continue
            mine = self._level_of == number
            key_of_row = np.full(part.level.table.used + 1, -1)
            key_of_row[self._row_of[mine]] = self._inverse[mine]
            if part.hash == "opener":
                rows = looks["opener"].astype(np.intp)
            else:
                rows = part.level.table.find_rows(looks[part.hash])
            key = np.where(key < 0, key_of_row[np.minimum(rows, len(key_of_row) - 1)], key)
        return key

    def composition(self, at: int) -> Composition:
        """What the entries that a key holds now are like."""
        if at not in self._made_of:
            older, until = int(self.sums["older"][at]), self._context.until
            self._made_of[at] = compose(
                self.looks_at(at), int(self.held[at]), older, until, partial(self._unlike, at)
            )
        return self._made_of[at]

    def stays(self, at: int) -> stays.Survival:
        """How long a key's entries stay, including those still living."""
        held, older = int(self.held[at]), int(self.sums["older"][at])
        older = min(max(older, 0), held)
        born = held - older
        looks = self.looks_at(at)
        looks = looks[~np.isnan(looks["now"])]
        ages, young, late = looks["now"].astype(float), 0.0, 0.0
        if len(looks):
            late = (self._context.until - float(looks["ts"].mean())) / 1e9
            young = min(late * float(self.rate[at]), born / 2)
        elif born > 0:  # without them those that ended would tell of all
            ages = self._even_ages(at, born)
        residence = self._detail(at)[2]
        # at most as many as were seen to end: after losses it isn't sure whose births were seen
        ended = min(int(self.sums["inserts"][at]) - born, int(self.sums["destroys"][at]))
        living = stays.Living(ages, born - young, young, late / 2)
        return stays.survival(residence, ended, living)

    def staying(self, at: int) -> Optional[Staying]:
        """The data for a forecast of a key's entries; None if too few."""
        if self.held[at] < ENOUGH:
            return None
        curve, looks = self.stays(at), self.looks_at(at)
        ages = looks["now"][~np.isnan(looks["now"])].astype(float)
        ages = np.quantile(ages, np.linspace(0, 1, _SPREAD)) if ages.size else [curve.until]
        left = looks["left"][~np.isnan(looks["left"])]
        waiting = len(looks) > 0 and closed(looks).mean() > 0.95
        return Staying(
            curve,
            np.array(ages),
            float(np.quantile(left, 0.05)) if left.size else 0.0,
            bool(waiting),
        )

    def percentiles(self, at: int) -> tuple[Percentiles, Residence]:
        """Life and residence of a key."""
        return self.lives(at), self.residence(at)

    def lives(self, at: int) -> Percentiles:
        """How long a key's entries live, as every view reports it."""
        ended, looked, _ = self._detail(at)
        held = int(self.held[at])
        born = held - min(max(int(self.sums["older"][at]), 0), held)
        over = stays.Over(ended, max(int(self.sums["inserts"][at]) - born, 0), looked)
        looks, young = self.looks_at(at), self.looks(at)
        return stays.lives(over, born, looks, young, lambda: self._even_ages(at, max(born, 1)))

    def residence(self, at: int) -> Residence:
        """How long a key's entries stay, as every view reports it."""
        held, rate = int(self.held[at]), float(self.rate[at])
        deleted = float(self.sums["deleted"][at])
        early = (deleted - 2 * deleted**0.5) / (max(held, 1) * max(self._context.uptime, 0.1))
        going = stays.Going(
            self._apart(at), self._context.passes.pause(), self._closed_soon(at), max(0.0, early)
        )
        came, points = float(self.sums["inserts"][at]), len(self._trend(at))
        seconds = self._context.uptime
        if points < TREND:  # it came since, or its trend is not known
            seconds = points * self._context.interval or seconds
        even = stays.pace(rate, came, seconds, self._context.interval)[1]
        return stays.told(self.stays(at), self.looks_at(at), held, rate if even else 0.0, going)

    def _apart(self, at: int) -> int:
        """How many of a key's ends say something of their own: those at one moment say it
        together, be they expired or deleted."""
        chosen = self._members[self._bounds[at] : self._bounds[at + 1]]
        first = min(
            int(part.level.table.first[rows].min())
            for number, part in enumerate(self._parts)
            if (rows := self._row_of[chosen[self._level_of[chosen] == number]]).size
        )
        alone = int(self.sums["destroys"][at] - self.sums["expired"][at])
        held = np.array((*self._trend(at), self.held[at]))
        fell = held[:-1] - held[1:]
        flushed = fell[fell > held[:-1] / 2]  # by hand, as by conntrack -F
        each = (
            int(self.sums["inserts"][at]) * self._context.interval / max(self._context.uptime, 1.0)
        )
        together = math.ceil(float((flushed + each).sum()))  # with those that came in the interval
        return max(0, alone - together) + len(flushed) + self._context.passes.since(first)

    def states(self, at: int) -> tuple[tuple[str, int], ...]:
        """TCP states at the end, most frequent first."""
        counts = np.zeros(16, np.int64)
        for level, slots in self._rich(at):
            counts += level.rich.states[slots].sum(axis=0, dtype=np.int64)
        named = [(TCP_STATES[s], int(counts[s])) for s in range(len(TCP_STATES)) if counts[s]]
        return tuple(sorted(named, key=lambda item: -item[1]))

    def looks(self, at: int) -> dict[str, int]:
        """Looks at living entries, as in LOOKS."""
        counts = np.zeros(len(LOOKS), np.int64)
        for level, slots in self._rich(at):
            counts += level.rich.looks[slots].sum(axis=0, dtype=np.int64)
        return dict(zip(LOOKS, counts.tolist()))

    def closed_for(self, at: int) -> tuple[Optional[float], Optional[float]]:
        """Seconds that looks found an entry to stay in TIME_WAIT, and in CLOSE; None: none was."""
        most = np.zeros(2, np.int64)
        for level, slots in self._rich(at):
            most = np.maximum(most, level.rich.timeout[slots].max(axis=0))
        wait, reset = (ms / 1000 or None for ms in most.tolist())
        return wait, reset

    def _closed_soon(self, at: int) -> Optional[float]:
        """The timeout of nearly all entries, where they are closed while they are young."""
        looks = self.looks(at)
        reset, most = looks["reset"], max(ENOUGH, stays.MOSTLY * looks["young"])
        for number, seconds in zip((looks["closed"] - reset, reset), self.closed_for(at)):
            if looks["young"] >= ENOUGH and number >= most:
                return seconds
        return None

    def sources(self, at: int) -> Optional[int]:
        """Estimated distinct sources; None where they aren't counted."""
        if self.name in ("src", "pair"):
            return 1
        registers = None
        for level, slots in self._rich(at):
            if level.rich.sources is not None:
                part = level.rich.sources[slots].max(axis=0)
                registers = part if registers is None else np.maximum(registers, part)
        if registers is None or not registers.any():
            return None
        return distinct(registers)

    def _trend(self, at: int) -> tuple[float, ...]:
        """``held`` per interval; empty if most of it is in rows without detail."""
        if at not in self._trends:
            self._trends[at] = self._trend_of(at)
        return self._trends[at]

    def _trend_of(self, at: int) -> tuple[float, ...]:
        total = np.zeros(TREND)
        seen = np.zeros(TREND, bool)
        now = 0
        for level, rows in self._rich_rows(at, counted=True):
            trend = level.rich.trend[level.table.rich[rows].astype(np.intp)]
            seen |= ~np.isnan(trend).all(axis=0)
            total += np.nansum(trend, axis=0)
            now += int(level.table.held(rows).sum())
        if not seen.any() or now < 0.9 * self.held[at]:
            return ()
        order = (np.arange(TREND) + self._context.ticks + 1) % TREND
        values, known = total[order], seen[order]
        return tuple(float(v) for v in values[int(np.argmax(known)) :])

    def _missed(self, netns: int) -> tuple[int, bool]:
        """Lost events that may have been a key's, and whether its held count may be off."""
        missed, stale = self._context.missed, self._context.stale
        lost = missed.get(netns, 0) if netns else sum(missed.values())
        if self.name in ("process", "container", "unit"):
            return lost, lost > 0
        return lost, netns in stale

    def _shares(self, at: int, made_of: Composition) -> tuple[Optional[float], ...]:
        """Shares of ASSURED, unreplied and closed entries among those that a key holds.

        Where the table cannot be read, they are shares of the ended entries, provided that most
        entries have ended.
        """
        if made_of.n or not self._context.looks["older"].all():
            return made_of.assured, made_of.unreplied, made_of.closed
        s = {name: int(column[at]) for name, column in self.sums.items()}
        ended = s["destroys"]
        looks = self.looks(at)
        known = ended if ended >= int(self.held[at]) else 0
        return (
            share(s["assured"], known, looks, "assured"),
            share(s["unreplied"], known, looks, "unreplied"),
            share(s["closed"], known, looks, "closed"),
        )

    def _even_ages(self, at: int, born: int) -> npt.NDArray[np.float64]:
        """Ages of living entries when only their sum is known: spread as evenly as possible."""
        residence = self._detail(at)[2]
        n, uptime = int(residence.sum()), self._context.uptime
        middle = (histogram.EDGES[:-1] + histogram.EDGES[1:]) / 2
        gone = float((residence * middle).sum()) / n if n else 0.0
        ended = int(self.sums["inserts"][at]) - born
        seconds = float(self.table_seconds[at]) - ended * gone
        seconds -= max(int(self.sums["older"][at]), 0) * uptime
        mean = min(max(seconds / born, 0.0), uptime)
        low, high = max(0.0, 2 * mean - uptime), min(2 * mean, uptime)
        return low + (high - low) * _EVENLY


def share(part: int, ended: int, looks: Mapping[str, int], name: str) -> Optional[float]:
    """A share of the ended entries; of young ones looked at, while hardly any has ended."""
    young = looks["young"]
    if young >= ENOUGH > ended:
        return min(1.0, looks[name] / young)
    return part / ended if ended else None
