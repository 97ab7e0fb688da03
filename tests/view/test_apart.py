"""Advice in a process of its own: it can be ended, is nice, and tells what goes wrong there."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kit import samples

from ctrace.errors import CtraceError
from ctrace.live import apart


def children() -> set[int]:
    """Processes that this one has started."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def test_it_ends_when_it_is_not_wanted_any_more() -> None:
    before, stop = children(), threading.Event()
    told: list[str] = []

    def make() -> None:
        with pytest.raises(CtraceError) as raised:
            # instead of reading the facts of namespace 3600 it sleeps for an hour
            apart.advise(samples.calm(), samples.calm(), [3600], time.sleep, stop)
        told.append(str(raised.value))

    making = threading.Thread(target=make)
    making.start()
    until = time.monotonic() + 60
    nice: set[int] = set()
    while os.nice(0) + apart.NICE not in nice:
        assert time.monotonic() < until
        for pid in children() - before:
            nice.add(os.getpriority(os.PRIO_PROCESS, pid))
        time.sleep(0.01)
    stop.set()
    making.join(60)
    assert told == ["given up: press a to ask again"]
    assert children() == before


def test_what_goes_wrong_there_is_told() -> None:
    wrong: Any = len  # a number has no length
    with pytest.raises(CtraceError, match="TypeError"):
        apart.advise(samples.calm(), samples.calm(), [7], wrong, threading.Event())


def test_the_advice_comes_back() -> None:
    calm = samples.calm()
    facts: dict[int, Any] = {1: "more than a pipe takes at once" * 100_000}
    advice = apart.advise(calm, calm, [], facts.get, threading.Event())
    assert advice.host == calm.host
