"""The events in order: the few moments of a recording that matter in a postmortem."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from typing import Optional

from ctrace.batch import DUMP
from ctrace.model.causes.room import HIGH
from ctrace.model.causes.words import when, where
from ctrace.model.snapshot import Snapshot
from ctrace.recording.review import Review, Shares
from ctrace.view import format as fmt
from ctrace.view.verdict import Verdict, as_read, failed, fullest, only_read, verdict

RISE = 0.05
"""Share of all that was held then, which a key must gain to be reported: less is normal
fluctuation."""
LOSING = 0.01
"""Share of all new entries. A recording in which more could not be inserted is not called
HEALTHY; a single clash is normal."""
FEW = 16
"""Entries. A key that gains fewer is not reported."""


@dataclass(frozen=True)
class Moment:
    """One line of the story."""

    ts: float
    """UTC seconds; of what has no date, some time before all that has."""
    letter: str
    """The letter that marks it in the charts."""
    text: str
    time: str
    """Its time, as far as it is known."""

    def __str__(self) -> str:
        return f"{self.letter}  {self.time}  {self.text}"


def period(review: Review) -> str:
    """``2024-07-29 11:02:03 to 11:12:03 UTC``, or the moment of which texts tell."""
    start, end = _date(review.start), _date(review.end)
    first, last = fmt.clock(review.start), fmt.clock(review.end)
    if start == end and first == last and not review.final.hooks.changes:
        return f"{start} {first} UTC"
    return f"{start} {first} to {'' if start == end else f'{end} '}{last} UTC"


def at(review: Review, ts: float) -> str:
    """A time of day, with its month and day where the recording begins on one day and ends on
    another: ``07-29 11:02:03``."""
    if _date(review.start) == _date(review.end):
        return fmt.clock(ts)
    return f"{_date(ts):%m-%d} {fmt.clock(ts)}"


def _date(ts: float) -> date:
    return datetime.fromtimestamp(ts, timezone.utc).date()


def headline(review: Review) -> Verdict:
    """The verdict on the whole recording."""
    final = review.final
    table = fullest(final)
    if not final.hooks.changes or (table is not None and only_read(final, table)):
        return verdict(final, table)
    dropped, evicted = final.totals.drop, final.totals.early_drop
    fill = f"fullest at {fmt.share(review.peak_fill)}"
    if not final.hooks.refusals and table is not None:
        return as_read(final, fill)
    if dropped:
        word = "FULL" if review.peak_fill > 0.99 else "REFUSED"
        when = ""
        last = last_refusal(review)
        if review.first_drop is not None and last is not None:
            when = f" from {at(review, review.first_drop)} to {at(review, last)}"
        return Verdict(word, f"{fmt.plural(dropped, 'packet')} refused{when}; {fill}", "bad")
    held = sum(one.count for one in final.tables)
    if held and not evicted and not any(one.max_known for one in final.tables):
        return as_read(final, f"{fmt.plural(held, 'entry', 'entries')}, the limit was not read")
    nothing = "nothing refused" + failed(final.totals)
    if evicted:
        text = f"{fmt.count(evicted)} entries evicted early{failed(final.totals)}; {fill}"
        return Verdict("EVICTED", text, "warn")
    word, level = "HEALTHY", "plain" if final.totals.insert_failed else "good"
    if losing(final):
        word, level = "LOSING", "bad"
    elif review.peak_fill >= HIGH:
        word, level = "HIGH", "warn"
    return Verdict(word, f"{fill}, {nothing}", level)


def losing(snapshot: Snapshot) -> bool:
    """Whether more inserts failed than single clashes explain."""
    failed_, inserted = snapshot.totals.insert_failed, snapshot.totals.insert
    return failed_ > LOSING * (inserted + failed_)


def last_refusal(review: Review) -> Optional[float]:
    """The end of the last period in which something was refused."""
    line = review.timeline
    return next((ts for ts, n in zip(reversed(line.ts), reversed(line.drop)) if n), None)


def grouping(review: Review) -> tuple[str, Shares]:
    """The grouping in which holders are reported over time: the one asked for, unless that leaves
    most unnamed, or has a single key (such as one container with everything in it) where another
    grouping has several."""
    asked = review.final.group
    rest = {name: _unnamed(shares) for name, shares in review.groupings.items()}
    best = asked if rest.get(asked, 1.0) <= 0.5 else min(rest, key=lambda name: rest[name])
    if _one_key(review.groupings[best]):
        told = [name for name in rest if rest[name] <= 0.1 and not _one_key(review.groupings[name])]
        best = next(iter(told), best)
    return best, review.groupings[best]


def _one_key(shares: Shares) -> bool:
    """Whether one key has nearly everything."""
    whole = sum(shares.total)
    return any(
        sum(series) > 0.95 * whole for key, series in shares.stacked().items() if key != "others"
    )


def story(review: Review) -> list[Moment]:
    """When holders rose, when the table was fullest, who was refused first, and the end; in time
    order."""
    told = sorted(_moments(review), key=lambda one: one[0])
    found = _undated(review) + [(ts, text, True) for ts, text in told]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return [
        Moment(ts, letters[i], text, at(review, ts) if dated else "undated")
        for i, (ts, text, dated) in enumerate(found)
    ]


def _undated(review: Review) -> list[tuple[float, str, bool]]:
    """A full table by a log that does not tell its date."""
    log = review.final.logged
    if log is None or log.first.utc is not None:
        return []
    return [(0.0, f"the kernel logs that the table is full{where(log)}, {when(log)}", False)]


def _moments(review: Review) -> Iterator[tuple[float, str]]:
    if review.final.hooks.changes:
        yield from _rise(review)
    yield from _fullest(review)
    if review.first_drop is not None:
        bursts = len(review.drops)
        more = f", the first of {bursts} bursts" if bursts > 1 else ""
        yield review.first_drop, f"first refusal{more}"
    if review.first_failed is not None:
        totals = review.final.totals
        yield review.first_failed, f"first insert that failed, of {fmt.count(totals.insert_failed)}"
    yield from _complaint(review)
    last = last_refusal(review)
    if last is not None and last > (review.first_drop or 0):
        yield last, f"last refusal; {fmt.plural(review.final.totals.drop, 'packet')} in all"
    fills = [table.fill for table in review.final.tables if table.max]
    if not review.final.hooks.changes:
        return  # one moment, and it is told
    ended = "the texts end" if review.final.hooks.family == DUMP else "the recording ends"
    yield review.end, ended + (f", the fullest table at {fmt.share(max(fills))}" if fills else "")


def _rise(review: Review) -> Iterator[tuple[float, str]]:
    """The key that gained most until the table was fullest: its entries before and then."""
    _, shares = grouping(review)
    # What was there already is known from the first reading of a table, or dump, on.
    line = review.timeline
    fills = [zip(line.ts, values) for values in line.fill.values()]
    known = min((ts for one in fills for ts, fill in one if fill is not None), default=0.0)
    first = next((i for i, ts in enumerate(shares.ts) if ts >= known), 0)
    if review.final.hooks.family == DUMP:
        first = next((i for i, held in enumerate(shares.total) if held), 0)
    best: Optional[tuple[int, str, int, int]] = None
    for key, series in shares.stacked().items():
        if key == "others" or not series:
            continue
        most = max(series[first:])
        high = next(i for i in range(first, len(series)) if series[i] >= 0.98 * most)
        low = min(series[first : high + 1])
        gain = series[high] - low
        begin = max(i for i in range(first, high + 1) if series[i] <= low + gain / 10)
        if gain > max(FEW, RISE * shares.total[high]) and (best is None or gain > best[0]):
            best = gain, key, begin, high
    if best is None:
        return
    _, key, begin, high = best
    series = shares.stacked()[key]
    text = (
        f"{fmt.arrowed(key)} rises from {fmt.count(series[begin])} to "
        f"{fmt.count(series[high])} entries, reached at {at(review, shares.ts[high])}"
    )
    yield shares.ts[begin], text + _rate(review, shares.ts[begin], shares.ts[high])


def _rate(review: Review, begin: float, high: float) -> str:
    """New entries a second before and while it rose, where they tell a rise."""
    line = review.timeline
    before = [n for ts, n in zip(line.ts, line.insert) if ts <= begin]
    while_ = [n for ts, n in zip(line.ts, line.insert) if begin < ts <= high]
    if not before or not while_:
        return ""
    one, other = _mean(before), _mean(while_)
    if other < 1.5 * one:
        return ""
    return f"; new entries from {fmt.per_second(one)} to {fmt.per_second(other)}"


def _fullest(review: Review) -> Iterator[tuple[float, str]]:
    line = review.timeline
    names = {str(table.netns): table for table in review.final.tables}
    peaks = [
        (value, ts, name)
        for name, values in line.fill.items()
        for ts, value in zip(line.ts, values)
        if value is not None
    ]
    if not peaks:
        return
    value, ts, name = max(peaks, key=lambda one: (one[0], -one[1]))
    table = names.get(name)
    if value <= 0:
        return
    where = f" {fmt.clean(table.name)}" if table is not None and len(names) > 1 else ""
    of = f" of {fmt.count(table.max)}" if table is not None and table.max else ""
    what = "fullest" if review.final.hooks.changes else "the table is read"
    yield ts, f"{what}:{where} {fmt.share(value)}{of}"


def _complaint(review: Review) -> Iterator[tuple[float, str]]:
    """The first program, or line of a log, that a refusal explains."""
    if review.complaint is not None:
        ts, process, flow = review.complaint
        yield ts, f"{fmt.clean(process)} gets EPERM for {fmt.clean(flow)}: its first complaint"
    log = review.final.logged
    if log is None or log.first.utc is None:
        return
    what = f"the kernel logs that the table is full{where(log)}"
    last = log.last.utc if log.full > 1 else None
    yield (
        log.first.utc,
        what + (", for the first time" if last else "") + _day(review, log.first.utc),
    )
    if last is not None:
        yield last, f"{what}, for the last time" + _day(review, last)


def _day(review: Review, ts: float) -> str:
    """The date of a moment on another day than the recording, where times are told without."""
    day = _date(ts)
    return f" ({day})" if _date(review.start) == _date(review.end) != day else ""


def _unnamed(shares: Shares) -> float:
    """The part of all that was held over time that no key of the chart names."""
    whole = sum(shares.total)
    return sum(shares.stacked().get("others", ())) / whole if whole else 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
