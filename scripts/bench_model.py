"""Batch to updated model, against a dictionary per event and group-bys of pandas and polars.

All cases run in turn within one run; numbers are medians over its rounds. Batches hold
131,072 records, an eighth of what a second brings: half inserts and half destroys of a table
of 200,000 entries, whose addresses are used again; sources are uniform, as in a flood with
forged addresses. Measured is what comes after the first second. A batch is copied right
before it is handed over, as a source would just have written it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ctrace.batch import Batch, Clock, HookInfo
from ctrace.model.model import EVERYTHING, Model
from ctrace.model.who.ask import Asked
from ctrace.model.who.names import Names
from ctrace.record import RECORD, ROW, Events, Kind, Reason, join

BATCH = 131_072
LIVE = 200_000
WARM_UP = 8
ROUNDS = 24
SOURCES = (100, 10_000, 1_000_000)
START = 5000 * 10**9


def stream(
    sources: int, owned: float = 0.0, batches: int = WARM_UP + ROUNDS, seed: int = 3
) -> tuple[Events, list[Events]]:
    """Inserts that fill the table, then batches in a steady state: 1 M events per second.

    A share ``owned`` of the entries is opened by one of fifty local processes.
    """
    rng = np.random.default_rng(seed)
    n = batches * BATCH // 2 + LIVE
    born = np.zeros(n, RECORD)
    who = rng.integers(0, sources, n).astype(np.uint32) + np.uint32(0x0B000000)
    for column, addresses in (
        ("src", who),
        ("dst", rng.integers(0, 8, n).astype(np.uint32) + np.uint32(0x0A000001)),
    ):
        born[column][:, 10:12] = 0xFF
        born[column][:, 12:] = addresses.astype(">u4").view(np.uint8).reshape(-1, 4)
    born["ct"] = np.uint64(0xFFFF888000000000) + np.uint64(320) * (
        np.arange(n, dtype=np.uint64) % np.uint64(LIVE * 11 // 10)
    )
    born["sport"] = rng.integers(1024, 65535, n)
    born["dport"] = rng.choice([80, 443, 6379, 8063], n)
    born["netns"], born["family"], born["proto"], born["direction"] = 4026531840, 2, 6, 1
    born["ts"] = START + np.arange(n) * 2000
    gone = born.copy()
    born["kind"], born["reason"] = int(Kind.INSERT), int(Reason.NEW)
    mine = np.flatnonzero(rng.random(n) < owned)
    born["owner"][mine] = rng.integers(1, 50, len(mine)).astype(np.uint64) << np.uint64(32)
    born["direction"][mine] = 2
    gone["kind"] = int(Kind.DESTROY)
    gone["reason"] = np.where(rng.random(n) < 0.98, int(Reason.EXPIRED), int(Reason.DELETED))
    gone["status"], gone["state"] = np.where(rng.random(n) < 0.9, 6, 0), 7
    gone["idle_ms"] = rng.integers(0, 100, n)
    gone["ts"] = born["ts"] + 2000 * LIVE + 1 + rng.integers(0, 1000, n)
    rows = join([born, gone])
    rows = rows[np.argsort(rows["ts"], kind="stable")]
    return rows[:LIVE], [rows[at : at + BATCH] for at in range(LIVE, LIVE + batches * BATCH, BATCH)]


def time_ns(call: Callable[[], Any]) -> int:
    """CPU time of one call, in nanoseconds."""
    before = time.process_time_ns()
    call()
    return time.process_time_ns() - before


class PlainDict:
    """What one writes first: a dictionary per key, updated event by event."""

    def __init__(self) -> None:
        self.held: dict[tuple[bytes, int], int] = {}

    def update(self, events: Events) -> None:
        """Count what is held by (source, port)."""
        held = self.held
        columns = (events["src"], events["dport"], events["kind"])
        for src, port, kind in zip(*(column.tolist() for column in columns), strict=True):
            key = (bytes(src), port)
            held[key] = held.get(key, 0) + (1 if kind == 1 else -1)


def pandas_groupby(events: Events) -> Any:
    """Held by (source, port) in one batch."""
    import pandas

    frame = pandas.DataFrame({
        "src": events["src"][:, 12:].copy().view(np.uint32).ravel(),
        "port": events["dport"],
        "held": np.where(events["kind"] == 1, 1, -1),
    })  # fmt: skip
    return frame.groupby(["src", "port"], sort=False)["held"].sum()


def polars_groupby(events: Events) -> Any:
    """The same with polars, which may use every CPU: its CPU time is counted."""
    import polars

    frame = polars.DataFrame({
        "src": events["src"][:, 12:].copy().view(np.uint32).ravel(),
        "port": events["dport"].copy(),
        "held": np.where(events["kind"] == 1, 1, -1),
    })  # fmt: skip
    return frame.group_by(["src", "port"]).agg(polars.col("held").sum())


def measure(sources: int, owned: float = 0.0) -> dict[str, Any]:
    """One row: nanoseconds of CPU per event and the ratios."""
    warm, batches = stream(sources, owned)
    model, plain = Model(HookInfo("bench"), Clock(0), START), PlainDict()
    for at in range(0, len(warm), BATCH):
        part = warm[at : at + BATCH]
        model.update(Batch(part, int(part["ts"][-1])))
    for part in batches[:WARM_UP]:
        model.update(Batch(part, int(part["ts"][-1])))
    spent: dict[str, list[int]] = {"model": [], "dict": [], "pandas": [], "polars": []}
    room = np.empty(BATCH, ROW)  # as from the rings: just written, in memory used before
    events = room.view(RECORD)
    for number, batch in enumerate(batches[WARM_UP:]):
        room[:] = batch.view(ROW)
        fresh = Batch(events, int(events["ts"][-1]))
        spent["model"].append(time_ns(lambda: model.update(fresh)))  # noqa: B023
        if number % 6 == 0:  # the slow ones need fewer rounds
            spent["dict"].append(time_ns(lambda: plain.update(events)))
            spent["pandas"].append(time_ns(lambda: pandas_groupby(events)))
            spent["polars"].append(time_ns(lambda: polars_groupby(events)))
    ns = {name: statistics.median(values) / BATCH for name, values in spent.items()}
    snapshots = [time_ns(lambda: model.snapshot("pair")) for _ in range(3)]
    names = model._who_names(EVERYTHING)  # all other groups are there: causes need them, too
    who = [time_ns(lambda: _who(model, names)) for _ in range(5)]
    memory = model.snapshot("pair").memory
    return {
        "name": f"{sources:,} sources" + (f", {owned:.0%} opened here" if owned else ""),
        "ns_per_event": round(ns["model"], 1),
        "M_events_per_s": round(1e3 / ns["model"], 2),
        "core_at_1M_per_s": f"{ns['model'] / 10:.0f} %",
        "times_dict": round(ns["dict"] / ns["model"], 2),
        "times_pandas": round(ns["pandas"] / ns["model"], 2),
        "times_polars": round(ns["polars"] / ns["model"], 2),
        "memory_MiB": round(memory.used / 2**20, 1),
        "snapshot_ms": round(statistics.median(snapshots) / 1e6, 1),
        "who_ms": round(statistics.median(who) / 1e6, 1),
    }


def _who(model: Model, names: Names) -> None:
    """Who holds most, as rows, and who was refused most: found anew."""
    asked = Asked(model._group)
    asked.rows("held", EVERYTHING, 1, names)
    asked.answer("drops", EVERYTHING, 1, names)


def run() -> list[dict[str, Any]]:
    """Every case, and how much a million sources cost over a hundred."""
    rows = [measure(sources) for sources in SOURCES]
    growth = rows[-1]["ns_per_event"] / rows[0]["ns_per_event"]
    rows.append(measure(SOURCES[-1], 0.1))
    rows.append({"name": "growth, 100 to 1,000,000", "times": round(growth, 2)})
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
