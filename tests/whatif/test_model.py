"""The what-if model against a table simulated entry by entry, and against real ones."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.shapes import ASSURED, SEEN_REPLY, Trace, steady
from kit.traffic import tcp_connections, tcp_server, udp_flows, udp_server
from kit.whatifs import NETNS, SECOND, Kernel

from ctrace.batch import Batch
from ctrace.capture import open_live
from ctrace.errors import CtraceError, UsageError
from ctrace.filters import Filter
from ctrace.lab import Lab, Node
from ctrace.plan.plan import CtTimeout, Plan
from ctrace.ruleset.notrack_nft import script
from ctrace.view.report.whatif_text import whatif_text
from ctrace.whatif.flows import Recorded
from ctrace.whatif.gather import gather
from ctrace.whatif.run import of_recording
from ctrace.whatif.settings import TIMEOUTS, Levers, parse_levers, parse_service, parse_timeout
from ctrace.whatif.table import next_interval, refusal

BUSY = Kernel(rate=100, time_wait=40, seconds=240, udp_rate=10)
FULL = Kernel(rate=100, time_wait=30, seconds=120, udp_rate=20, limit=3000, buckets=8192)


@pytest.fixture(scope="module")
def busy() -> Recorded:
    return gather(replace(BUSY, counts=[]).run())


@pytest.fixture(scope="module")
def full() -> tuple[Recorded, Kernel]:
    kernel = replace(FULL, counts=[])
    return gather(kernel.run()), kernel


def test_the_recording_as_it_was(busy: Recorded) -> None:
    (place,) = of_recording(busy, Levers()).places
    assert place.netns == NETNS
    assert place.replay_error is not None
    assert place.replay_error < 0.01
    assert place.trusted
    assert place.modelled.drops == place.recorded.drops == 0


@pytest.mark.slow
def test_a_reading_counts_for_its_own_time_and_not_for_its_batchs_end() -> None:
    late = np.random.default_rng(1)
    batches = [
        replace(
            batch,
            until=batch.until + int(late.uniform(0, 2 * SECOND)),
            tables=tuple(replace(table, at=batch.until) for table in batch.tables),
        )
        for batch in replace(BUSY, counts=[]).run()
    ]
    (place,) = of_recording(gather(batches), Levers()).places
    assert place.replay_error is not None
    assert place.replay_error < 0.001
    untold = [
        replace(batch, tables=tuple(replace(table, at=0) for table in batch.tables))
        for batch in batches
    ]
    (place,) = of_recording(gather(untold), Levers()).places
    assert place.replay_error is not None
    assert place.replay_error > 0.01


def test_a_full_table_as_it_was(full: tuple[Recorded, Kernel]) -> None:
    recorded, kernel = full
    (place,) = of_recording(recorded, Levers()).places
    assert place.recorded.drops == kernel.drops > 1000
    assert place.modelled.drops == pytest.approx(kernel.drops, rel=0.1)
    assert place.trusted


@pytest.mark.parametrize(
    ("levers", "changes"),
    [
        (parse_levers(timeout=["tcp/8063:time_wait=20"]), {"time_wait": 20}),
        (parse_levers(notrack=["udp/53"]), {"udp_rate": 0}),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                (parse_levers(timeout=["tcp_time_wait=10"]), {"time_wait": 10}),
                (parse_levers(timeout=["udp=90"]), {"udp_timeout": 90}),
                (parse_levers(notrack=["tcp/8063"]), {"rate": 0}),
            )
        ),
    ],
    ids=str,
)
def test_predictions(busy: Recorded, levers: Levers, changes: dict[str, float]) -> None:
    """The mean of the table that really had the setting lies in the predicted range."""
    truth = replace(BUSY, counts=[], seed=7, **changes)  # type: ignore[arg-type]
    truth.run()
    mean = float(np.mean(truth.counts))
    (place,) = of_recording(busy, levers).places
    low, high = place.changed.mean_range
    assert low <= mean <= high
    assert place.changed.mean == pytest.approx(mean, rel=0.15)


@pytest.mark.slow
def test_room_ends_the_refusals(full: tuple[Recorded, Kernel]) -> None:
    """A larger maximum, or the culprit untracked: nobody is refused; a smaller one: more are."""
    recorded, kernel = full
    for levers in (parse_levers(limit=20000), parse_levers(notrack=["tcp/8063"])):
        (place,) = of_recording(recorded, levers).places
        assert place.changed.drops == 0
    (place,) = of_recording(recorded, parse_levers(limit=1500)).places
    for value, (low, high) in (
        (place.changed.mean, place.changed.mean_range),
        (place.changed.peak, place.changed.peak_range),
    ):
        assert low <= value <= high
    assert (place.changed.drops or 0) > kernel.drops
    roomy = replace(FULL, counts=[], limit=20000)
    roomy.run()
    (place,) = of_recording(recorded, parse_levers(limit=20000)).places
    assert place.changed.mean == pytest.approx(float(np.mean(roomy.counts)), rel=0.1)


@pytest.mark.parametrize(("limit", "later"), [(2000, (60.0, 10_000)), (10_000, (110.0, 2000))])
def test_a_limit_that_was_changed_counts_from_then_on(limit: int, later: tuple[float, int]) -> None:
    load = Kernel(rate=40, time_wait=40, seconds=180, udp_rate=60, udp_timeout=30, looks=40,
                  limit=limit, later=later, buckets=2048)  # fmt: skip
    recorded = gather(load.run())
    changed = replace(load, udp_timeout=10, looks=0, counts=[])
    changed.run()
    answer = of_recording(recorded, parse_levers(timeout=["udp=10"]))
    (place,) = answer.places
    assert place.replay_error is not None
    assert place.replay_error < 0.1, "with one limit for all of it, a third"
    assert place.changed.mean_range[0] <= np.mean(changed.counts) <= place.changed.mean_range[1]
    assert place.modelled.drops == pytest.approx(load.drops, rel=0.2)
    assert (place.limit, place.new_limit) == (later[1], later[1])
    assert any("nf_conntrack_max was between 2,000 and 10,000" in note for note in answer.notes)


def test_a_model_that_is_off_says_so(busy: Recorded) -> None:
    """Readings that the events can't explain: not to be trusted, in words."""
    rows = busy.readings
    noise = (np.arange(len(rows.ts)) % 2 * 4000).astype(np.int64)
    answer = of_recording(replace(busy, readings=replace(rows, count=rows.count + noise)), Levers())
    assert not answer.places[0].trusted
    assert "do not trust it" in whatif_text(answer)


def test_lost_events_are_told() -> None:
    batches = Kernel(rate=20, time_wait=10, seconds=30).run()
    batches[3] = replace(batches[3], lost=17)
    answer = of_recording(gather(batches), Levers())
    assert any("17 events were lost" in note for note in answer.notes)


@pytest.mark.parametrize(("late", "told"), [(0, False), (15, True)])
def test_a_time_without_readings_is_told(late: int, told: bool) -> None:
    """The recorder got no processor for the first seconds: what came meanwhile is there, its
    count is not."""
    batches = Kernel(rate=20, time_wait=10, seconds=60).run()
    batches[:late] = [replace(one, tables=()) for one in batches[:late]]
    answer = of_recording(gather(batches), Levers())
    said = [note for note in answer.notes if "nobody counted" in note]
    assert bool(said) == told
    assert all("from 0 to 15 s of 59" in note for note in said), said


def test_nothing_recorded() -> None:
    with pytest.raises(CtraceError, match="nothing to model"):
        of_recording(gather([Batch.idle(5)]), Levers())


def test_json_is_plain(busy: Recorded) -> None:
    answer = of_recording(busy, parse_levers(timeout=["tcp_time_wait=5"], limit=500))
    document = json.loads(json.dumps(answer.to_json(), allow_nan=False))
    (place,) = document["namespaces"]
    assert place["new_limit"] == 500
    assert place["trusted"] is True
    assert len(place["series_changed"]["ts"]) <= 600


@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_the_pause_between_collections_is_the_kernels(left: list[float]) -> None:
    """The running mean, as gc_worker computes it entry by entry."""
    mean, count = 60.0, 100
    for seconds in left:
        count += 1
        mean += (min(max(seconds, 1.0), 300.0) - mean) / count
    assert next_interval(np.array(left)) == pytest.approx(min(max(mean, 1.0), 60.0))


@given(st.integers(1, 10**6), st.floats(0, 1), st.integers(1, 1 << 20))
def test_refusal_is_a_chance(count: int, loose: float, buckets: int) -> None:
    chance, each = refusal(count, loose * count, buckets)
    assert 0 <= chance <= 1
    assert each >= 0
    # The more that can be evicted, the fewer are refused.
    assert refusal(count, count, buckets)[0] <= chance + 1e-12


@pytest.mark.parametrize("stream", [True, False])
def test_tunnels_have_two_timeouts_of_their_own(stream: bool) -> None:
    """Ten GRE calls a second, each held for 60 s; the other timeout changes nothing of them."""
    trace = Trace(seed=3)
    status = SEEN_REPLY | ASSURED if stream else 0
    at = steady(10, 120, trace.rng)
    ends = trace.flows(at, 0.0, 60.0, proto=47, dport=0, status=status, state=255)
    ends["timeout_ms"] = 60_000
    recorded = gather(trace.batches(120.0))
    own, other = ("gre_timeout_stream", "gre_timeout")[:: 1 if stream else -1]
    means = {}
    for name in (own, other):
        (place,) = of_recording(recorded, parse_levers(timeout=[f"{name}=20"])).places
        means[name] = place.changed.mean
        low, high = place.changed.mean_range
        assert low <= place.changed.mean <= high
    (as_was,) = of_recording(recorded, Levers()).places
    assert means[other] == pytest.approx(as_was.changed.mean, rel=0.05)
    assert means[own] == pytest.approx(10 * 20 * (1 - 10 / 120), rel=0.1)


@given(st.text(max_size=30))
def test_any_word_is_parsed_or_refused_in_one_line(text: str) -> None:
    for parse in (parse_service, parse_timeout):
        try:
            parse(text)
        except UsageError as refusal:
            assert len(str(refusal).splitlines()) <= 1  # noqa: PT017


@given(st.sampled_from(TIMEOUTS), st.integers(1, 10**6))
def test_sysctl_names_are_understood(name: str, seconds: int) -> None:
    words = name.split("_", 1)
    sysctl = f"nf_conntrack_{words[0]}_timeout" + (f"_{words[1]}" if len(words) > 1 else "")
    assert parse_timeout(f"{sysctl}={seconds}") == parse_timeout(f"{name}={seconds}s")


class Sampled:
    """A namespace under steady load, its table sampled."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.samples: list[int] = []


def load(places: Iterable[Sampled], until: float) -> None:
    """TCP and one-way UDP over loopback, about 60 flows of each a second; in turn, so that a busy
    machine is late for all of them alike."""
    port = 20000
    while time.monotonic() < until:
        due = time.monotonic() + 0.05
        for place in places:
            tcp_connections(place.node, ("127.0.0.1", 8063), 3)
            udp_flows(place.node, ("127.0.0.1", 53), 3, first_port=port)
        port += 3
        time.sleep(max(0.0, due - time.monotonic()))


def plan_of(lever: CtTimeout) -> Plan:
    return Plan(0, "lab", 0, "lab", "0" * 64, "nft", (lever,))


@pytest.mark.kernel
@pytest.mark.slow
def test_predictions_of_real_tables() -> None:
    """Namespaces under the same load: one is recorded, the others really have the change."""
    seconds = 30
    with Lab() as lab:
        places = {name: Sampled(lab.namespace(name, track=True)) for name in "abcd"}
        for place in places.values():
            place.node.sysctl("net.netfilter.nf_conntrack_tcp_timeout_time_wait", 9)
            place.node.sysctl("net.netfilter.nf_conntrack_udp_timeout", 6)
        places["b"].node.sysctl("net.netfilter.nf_conntrack_tcp_timeout_time_wait", 3)
        places["c"].node.run(
            ["nft", "-f", "-"],
            stdin="table inet n { chain o { type filter hook output priority raw - 10;\n"
            " tcp dport 8063 notrack; tcp sport 8063 notrack;\n }\n}\n",
        )
        policy = CtTimeout("tcp", 8063, ("loopback",), (("time_wait", 3),))
        places["d"].node.run(["nft", "-f", "-"], stdin=script(plan_of(policy), None))
        source = open_live(Filter(netns=places["a"].node.inum))
        batches: list[Batch] = []
        until = time.monotonic() + seconds
        loading = threading.Thread(target=load, args=(places.values(), until))
        servers = [tcp_server(p.node, 8063) for p in places.values()]
        servers += [udp_server(p.node, 53, reply=False) for p in places.values()]
        for server in servers:
            server.__enter__()
        try:
            loading.start()
            for batch in source.batches(0.5):
                batches.append(batch)
                for place in places.values():
                    place.samples.append(place.node.count())
                if time.monotonic() > until:
                    break
        finally:
            source.close()
            loading.join()
            for server in servers:
                server.__exit__(None, None, None)
    recorded = gather(batches)
    for name, levers in (
        ("b", parse_levers(timeout=["tcp_time_wait=3"])),
        ("c", parse_levers(notrack=["tcp/8063"])),
        ("d", parse_levers(timeout=["tcp/8063:time_wait=3"])),
    ):
        (said,) = of_recording(recorded, levers).places
        assert said.replay_error is not None
        assert said.replay_error < 0.05
        assert said.error is not None
        low, high = said.changed.mean_range
        # The loads are alike, not the same: each place has its turn a moment after the others.
        assert low * 0.85 <= np.mean(places[name].samples) <= high * 1.15, name
