"""What is kept of the living comes back as it was, and takes little room."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples

from ctrace.batch import Batch
from ctrace.record import OF_THEN, Events, Kind, Reason, empty, join
from ctrace.recording.recorder import living
from ctrace.recording.recorder.living import Living

NOW = 77


def row(kind: Kind, ct: int, netns: int, shape: int) -> Events:
    """One event of an entry; ``shape``: IPv4, IPv6, with NAT or without."""
    made = empty(1)
    made["kind"], made["ct"], made["netns"], made["ts"] = kind, ct, netns, 5
    made["reason"], made["proto"], made["family"] = Reason.NEW, 6, 10 if shape & 1 else 2
    made["status"], made["state"], made["zone"] = shape << 3, shape, shape & 2
    made["src"][0, 12:] = [10, 0, ct % 250, netns % 250]
    made["dst"][0, 15] = 7
    if shape & 1:
        made["src"][0, 0] = made["dst"][0, 3] = 0x20 + ct % 5
    made["reply_src"], made["reply_dst"] = made["dst"], made["src"]
    made["sport"], made["dport"] = 1000 + ct, 443
    made["reply_sport"], made["reply_dport"] = 443, 1000 + ct
    if shape & 2:
        made["reply_dst"][0, 15] = 99
        made["reply_dport"] = ct
    made["owner"], made["cgroup"] = 3 << 32, 9
    return made


steps = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 2), st.integers(0, 3), st.booleans()))


@examples(100)
@given(steps)
def test_entries_come_back_as_they_were(steps: list[tuple[int, int, int, bool]]) -> None:
    kept, wanted = Living(), {}
    for ct, netns, shape, look in steps:
        event = row(Kind.INSERT, ct, netns, shape)
        kept.take(Batch(event.copy(), NOW))
        event["kind"], event["reason"], event["ts"] = Kind.EXISTING, Reason.NONE, NOW
        event["owner"] = event["cgroup"] = 0
        event["status"] |= OF_THEN
        wanted[event.tobytes()] = event
        if look:
            list(kept.rows(NOW - 1))
    whole = join(list(kept.rows(NOW)))
    assert sorted(whole[i : i + 1].tobytes() for i in range(len(whole))) == sorted(wanted)


def test_what_is_kept_is_small_and_comes_in_parts() -> None:
    kept, first = Living(), 0
    tracemalloc.start()  # what an empty part of an array keeps alive counts, too
    for n in (200_000, *[16_000] * 6):
        events, i = empty(n), np.arange(first, first + n)
        events["kind"], events["proto"], events["netns"] = Kind.INSERT, 17, 4026531840
        events["ct"] = i.astype(np.uint64) * np.uint64(0x140) + np.uint64(0xFFFF8881_00000000)
        events["src"][:, 10:12] = events["dst"][:, 10:12] = 0xFF
        events["src"][:, 13], events["src"][:, 14] = np.divmod(i % 65_536, 256)
        events["sport"], events["dport"] = i % 60_000, 53
        events["reply_src"], events["reply_dst"] = events["dst"], events["src"]
        events["reply_sport"], events["reply_dport"] = events["dport"], events["sport"]
        before = events.copy()
        kept.take(Batch(events, NOW))
        assert (events == before).all()  # they are others' too
        first += n
    parts = [len(rows) for rows in kept.rows(NOW)]
    assert sum(parts) == len(kept) == first
    assert max(parts) <= living.CHUNK
    del events, before, i
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < first * 29
