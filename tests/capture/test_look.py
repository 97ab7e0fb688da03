"""Looks at young entries: what a closed connection's life was, before its entry ends."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from kit.traffic import tcp_connections, tcp_server

from ctrace.capture import open_live
from ctrace.capture.table.young import CLOSED, SAMPLE, Sampler
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.lab import Lab
from ctrace.record import Events, Kind, empty, join, words


def inserts(n: int, ts: int, first: int = 1) -> Events:
    events = empty(n)
    events["kind"] = Kind.INSERT
    events["ts"] = ts
    events["ct"] = np.arange(first, first + n)
    events["sport"] = np.arange(n) % 60000
    return events


class Asked:
    def __init__(self) -> None:
        self.entries: list[int] = []

    def look(self, entries: list[int]) -> None:
        self.entries += entries


def test_a_look_is_bounded_and_due_at_its_ages() -> None:
    capture = Asked()
    sampler = Sampler(capture)
    second = 1_000_000_000
    sampler.take(inserts(10_000, second))
    sampler.look(second)
    assert capture.entries == []
    sampler.look(2 * second)
    assert len(set(capture.entries)) == SAMPLE
    sampler.look(5 * second)
    assert len(capture.entries) == 2 * SAMPLE


def test_a_stranger_at_the_same_address_is_dropped_and_a_closed_one_is_asked_once() -> None:
    capture = Asked()
    sampler = Sampler(capture)
    second = 1_000_000_000
    born = inserts(2, second)
    sampler.take(born)
    sampler.look(3 * second)
    answer = born.copy()
    answer["kind"] = Kind.SAMPLED
    answer["state"] = CLOSED[0]
    answer["sport"][1] += 1  # another connection got the second one's memory
    unasked = answer[:1].copy()
    unasked["ct"] = 99
    kept = sampler.take(join([answer, unasked]))
    assert kept["ct"].tolist() == [1]
    sampler.look(60 * second)
    assert sorted(capture.entries) == [1, 2, 2]


def test_a_kernel_that_refuses_costs_nothing_else() -> None:
    class Refuses:
        def look(self, entries: list[int]) -> None:
            raise CtraceError(f"no {len(entries)}")

    sampler = Sampler(Refuses())
    events = inserts(5, 1)
    assert len(sampler.take(events)) == 5
    sampler.look(1 << 60)
    assert len(sampler.take(events)) == 5


@pytest.mark.kernel
def test_lives_of_closed_connections_are_known_in_seconds() -> None:
    with Lab() as lab:
        server, client = lab.namespace("server"), lab.namespace("client", track=True)
        lab.link(client, server)
        target = (server.addresses["client"][0], 8063)
        source = open_live(Filter(netns=client.inum), sample=True, seed=False)
        parts: list[Events] = []
        traffic = threading.Thread(target=tcp_connections, args=(client, target, 60))
        try:
            with tcp_server(server, 8063):
                traffic.start()
                deadline = time.monotonic() + 60
                # One long interval: looking must not wait for the reader.
                for batch in source.batches(3.0):
                    parts.append(batch.events)
                    found = join(parts)
                    closed = found[
                        (found["kind"] == Kind.SAMPLED) & np.isin(found["state"], CLOSED)
                    ]
                    if len(closed) >= 50 or time.monotonic() > deadline:
                        break
                traffic.join()
        finally:
            source.close()
        born = {int(row["ct"]): row for row in found[found["kind"] == Kind.INSERT]}
        assert 50 <= len(closed) <= 60
        assert not (found["kind"] == Kind.DESTROY).any()
        for row in closed:
            birth = born[int(row["ct"])]
            assert (words(row.reshape(1))[0, 2:11] == words(birth.reshape(1))[0, 2:11]).all()
            life = (int(row["ts"]) - int(birth["ts"])) / 1e9 - int(row["idle_ms"]) / 1e3
            assert -0.02 <= life < 30  # a busy machine's; the entries stay for two minutes
