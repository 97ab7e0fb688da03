"""A snapshot of some flows against the same events counted by hand."""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address, ip_network

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples
from kit.shapes import START, Trace

from ctrace.batch import Clock, HookInfo
from ctrace.errors import UsageError
from ctrace.live.filtering import View, check, view
from ctrace.model.model import Model
from ctrace.record import Events, Kind, address_text

FIRST, SECOND_NET = 4026531900, 4026532000
SECONDS = 40.0


@st.composite
def loads(draw: st.DrawFn) -> tuple[Trace, Events]:
    """Flows of two namespaces, from and to a few addresses; some end."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    trace = Trace(seed=int(rng.integers(1 << 30)))
    for netns in (FIRST, SECOND_NET):
        n = draw(st.integers(1, 120))
        trace.flows(
            np.sort(rng.uniform(0, SECONDS, n)),
            rng.choice([0.5, 5.0], n),
            rng.choice([1.0, 20.0, 300.0], n),
            src=0x0A000000 + rng.choice([1, 2, 0x0101, 0x0202], n),
            dst=0x0A640000 + rng.choice([1, 2, 0x0101], n),
            proto=int(rng.choice([6, 17])),
            dport=rng.choice([53, 80, 443], n),
            netns=netns,
        )
    return trace, trace.events(SECONDS)


def model_of(trace: Trace) -> Model:
    model = Model(HookInfo("fentry"), Clock(0), START, memory=8 << 20)
    for batch in trace.batches(SECONDS):
        model.update(batch)
    return model


def key_of(event: np.void, group: str) -> str:
    service = f"{'tcp' if event['proto'] == 6 else 'udp'}/{event['dport']}"
    src, dst = address_text(event["src"]), address_text(event["dst"])
    return {"service": service, "src": src, "dst": dst, "pair": f"{src} -> {service}"}[group]


def held(events: Events, group: str, wanted: dict[str, str]) -> Counter[tuple[int, str]]:
    """Entries held at the end by key, of the flows that pass."""
    found: Counter[tuple[int, str]] = Counter()
    for event in events:
        sides = {name: address_text(event[name]) for name in ("src", "dst")}
        passes = all(
            ip_address(sides[name]) in ip_network(value)
            if name in sides
            else int(value) == int(event[name])
            for name, value in wanted.items()
        )
        if passes:
            step = 1 if event["kind"] == Kind.INSERT else -1
            found[int(event["netns"]), key_of(event, group)] += step
    return found


FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "src": st.sampled_from(["10.0.0.0/24", "10.0.1.0/24", "10.0.0.1/32"]),
        "dport": st.sampled_from(["53", "80"]),
        "netns": st.sampled_from([str(FIRST), str(SECOND_NET)]),
    },
)


@pytest.mark.slow
@examples(40)
@given(loads(), FILTERS, st.sampled_from(["service", "src", "pair"]))
def test_flows_are_chosen_whatever_rows_are_grouped_by(
    load: tuple[Trace, Events], wanted: dict[str, str], group: str
) -> None:
    trace, events = load
    text = " ".join(f"{name}={value}" for name, value in wanted.items())
    shown = view(model_of(trace), View(group, "held", text, 1000))
    expected = held(events, group, wanted)
    assert {(c.netns, c.key): c.held for c in shown.culprits} == dict(expected)


@examples(25)
@given(loads(), st.sampled_from(["10.100.0.0/24", "10.100.1.0/24"]))
def test_destinations_too(load: tuple[Trace, Events], network: str) -> None:
    trace, events = load
    shown = view(model_of(trace), View("service", "held", f"dst={network} dport=53", 1000))
    expected = held(events, "service", {"dst": network, "dport": "53"})
    assert {(c.netns, c.key): c.held for c in shown.culprits} == dict(expected)


@pytest.mark.slow
@examples(25)
@given(loads())
def test_everything_shown_is_of_the_namespace(load: tuple[Trace, Events]) -> None:
    trace, events = load
    model = model_of(trace)
    asked = {n: View("service", "held", f"netns={n}", 1000) for n in (FIRST, SECOND_NET)}
    parts = {netns: view(model, one) for netns, one in asked.items()}
    for netns, shown in parts.items():
        mine = events[events["netns"] == netns]
        made = int(np.count_nonzero(mine["kind"] == Kind.INSERT))
        gone = int(np.count_nonzero(mine["kind"] == Kind.DESTROY))
        (table,) = shown.tables
        assert (table.netns, table.count) == (netns, made - gone)
        assert (shown.totals.insert, shown.totals.destroy) == (made, gone)
        assert shown.held_total == made - gone
        assert shown.history.count[-1] == made - gone
        assert {cause.netns for cause in shown.why} <= {netns, 0}
        assert sum(c.share for c in shown.culprits) == pytest.approx(1.0 if made > gone else 0.0)
    whole = view(model, View("service", "held", "", 1000))
    assert whole.held_total == sum(part.held_total for part in parts.values())
    assert len(whole.tables) == 2


@pytest.mark.parametrize(
    ("group", "text", "told"),
    [
        ("process", "src=10.0.0.1", "press g"),
        ("container", "udp/53", "press g"),
        ("dst", "src=10.0.0.1", "group by source"),
        ("src", "dst=10.0.0.1", "group by destination"),
        ("service", "src=10.0.0.1 dst=10.0.0.2", "start ctrace with"),
        ("service", "dport=53 dport=80", "give one"),
    ],
)
def test_what_no_sum_can_tell_is_refused(group: str, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        check(group, text)
