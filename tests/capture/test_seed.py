"""A table that changes while it is dumped, against a dict."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ctrace.capture.seed import seed
from ctrace.record import Events, Kind, Reason, empty, join

AT = 1_000


def record(kind: Kind, flow: int, ct: int, ts: int) -> Events:
    """One record; flows differ in exactly one part of what identifies an entry."""
    row = empty(1)
    row["kind"], row["ct"], row["ts"] = kind, ct, ts
    row["proto"], row["family"], row["netns"], row["sport"] = 6, 2, 7, 40
    part = ("netns", "zone", "proto", "sport", "dport", "reply_sport", "reply_dport")[flow % 10 % 7]
    if flow % 10 < 7:
        row[part] += 1 + flow // 10
    else:
        row[("src", "dst", "reply_dst")[flow % 10 - 7]][0, 15] = 1 + flow // 10
    if kind is Kind.DESTROY:
        row["reason"], row["idle_ms"], row["mark"] = Reason.EXPIRED, 17, 3
    return row


steps = st.lists(
    st.one_of(
        st.tuples(st.just("toggle"), st.integers(0, 29)),
        st.tuples(st.just("dump"), st.integers(0, 29)),
        st.tuples(st.just("noise"), st.integers(0, 29)),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(st.sets(st.integers(0, 29)), steps)
def test_existing_plus_events_is_the_table(before: set[int], steps: list[tuple[str, int]]) -> None:
    # Flow -> identity of the entry that now has that tuple.
    table = {flow: 100 + flow for flow in before}
    at_start = dict(table)
    events: list[Events] = []
    dump: list[Events] = []
    walked: set[int] = set()
    next_ct = 1000
    for step, flow in steps:
        if step == "dump":  # the walk reaches this flow's bucket now, once
            if flow not in walked and flow in table:
                dump.append(record(Kind.EXISTING, flow, table[flow], AT))
            walked.add(flow)
        elif step == "noise":
            events.append(record(Kind.DROP, flow, 0, AT + len(events)))
            events.append(record(Kind.INSERT_FAILED, flow, 5, AT + len(events)))
        elif flow in table:
            events.append(record(Kind.DESTROY, flow, table.pop(flow), AT + len(events)))
        else:
            table[flow] = next_ct
            events.append(record(Kind.INSERT, flow, next_ct, AT + len(events)))
            next_ct += 1
    for flow in range(30):  # the rest of the walk
        if flow not in walked and flow in table:
            dump.append(record(Kind.EXISTING, flow, table[flow], AT))

    found = seed(join(dump), join(events), AT, same_ids=True)
    assert sorted(found["ct"].tolist()) == sorted(at_start.values())
    by_ct = {int(row["ct"]): row for row in found}
    for flow, ct in at_start.items():
        wanted = record(Kind.EXISTING, flow, ct, AT)[0]
        assert by_ct[ct] == wanted

    told = join(events)
    unknown = seed(join(dump), join(events), AT)
    seen_ending = set(told["ct"][told["kind"] == Kind.DESTROY].tolist())
    assert sorted(unknown["ct"].tolist()) == sorted(
        ct if ct in seen_ending else 0 for ct in at_start.values()
    )


def test_an_entry_dumped_twice_counts_once() -> None:
    row = record(Kind.EXISTING, 3, 9, AT)
    assert len(seed(join([row, row]), empty(), AT)) == 1


def test_inputs_are_left_alone() -> None:
    dump, events = record(Kind.EXISTING, 3, 9, 5), record(Kind.DESTROY, 4, 8, 6)
    copies = dump.copy(), events.copy()
    seed(dump, events, AT)
    assert (dump == copies[0]).all()
    assert (events == copies[1]).all()
