"""Each figure is within the error that stands beside it, or absent: made loads, in which few
entries are looked at, collections are rare, and entries change after they were looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
from kit.loads import packets
from kit.loads.entries import ANY, ASSURED, CLOSE, CLOSE_WAIT, REPLIED, TIME_WAIT, Packet, Table

from ctrace.batch import Clock, HookInfo
from ctrace.model import Model, remedies
from ctrace.model.snapshot import Composition, Culprit

MOMENTS = (3, 6, 10, 16, 23, 30, 36, 60, 88)
Load = Callable[[packets.Random], Iterable[Packet]]


def seen(load: Load, looks: int, first_pass: float) -> Iterator[tuple[int, Culprit, Table]]:
    """The one service, at some moments."""
    table = Table(
        packets.SETTINGS, packets.SECONDS, looks=looks, first_pass=first_pass,
        moments=frozenset(MOMENTS), walks=True,
    )  # fmt: skip
    batches = table.run(load(np.random.default_rng(3)))
    model = Model(HookInfo("fentry"), Clock(0), 0)
    for second, batch in enumerate(batches):
        model.update(batch)
        if second in MOMENTS:
            (row,) = model.snapshot("service").culprits
            yield second, row, table


def some_streams(random: packets.Random) -> Iterator[Packet]:
    """Ever more flows: nobody answers half of them, the others are streams that go on."""
    for n, at in enumerate(np.sort(random.uniform(0, 90, 1400)).tolist()):
        yield Packet(at, 17, 1024 + n, 53, ANY, 0, "udp")
        for later in np.arange(1.0, 91.0 - at, 3) if n % 2 else ():
            stream = later > 2
            yield Packet(at + later, 17, 1024 + n, 53, ANY, ASSURED if stream else REPLIED,
                         "udp_stream" if stream else "udp")  # fmt: skip


def become_streams(random: packets.Random) -> Iterator[Packet]:
    """Forty flows that all become streams after two seconds, and no other comes."""
    for n in range(40):
        for later in (0.0, 0.5, 1.0, 1.5, 2.5, *range(5, 90, 5)):
            told = "udp_stream" if later > 2 else "udp"
            at = n / 10 + later + float(random.uniform(0, 0.01))
            yield Packet(at, 17, 1024 + n, 53, ANY, ASSURED if later > 2 else REPLIED, told)


def half_closed(random: packets.Random) -> Iterator[Packet]:
    """Connections that one side closes after a second or so, and SYNs that nobody answers."""
    for n, at in enumerate(np.sort(random.uniform(0, 90, 1400)).tolist()):
        answered = packets.call(at, n, 0.0)[: 2 if n % 3 else 1]
        yield from answered
        if len(answered) > 1:
            closed = at + float(random.exponential(1.0))
            yield Packet(closed, 6, 1024 + n, 8063, CLOSE_WAIT, ASSURED, "tcp_close_wait")


LOADS = (some_streams, become_streams, half_closed, packets.closes_and_resets)


@pytest.mark.slow
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("looks", [6, 40])
def test_shares_of_what_is_held(load: Load, looks: int) -> None:
    wrong, told = [], 0
    for second, row, table in seen(load, looks, 26.0):
        listed = table.listed[second]
        for name, true in (
            ("assured", [one.status & ASSURED == ASSURED for one in listed]),
            ("unreplied", [one.status & REPLIED == 0 for one in listed]),
            ("closed", [one.state in (TIME_WAIT, CLOSE) for one in listed]),
        ):
            shown, error = getattr(row, name), getattr(row.composition, f"{name}_error")
            if shown is not None and row.composition.n:
                told += 1
                away = abs(shown - float(np.mean(true)))
                wrong += [(second, name, shown, error)] if away > error else []
    assert told >= 8
    assert len(wrong) <= 1, wrong


@pytest.mark.slow
@pytest.mark.parametrize("first_pass", [17.0, 31.0, 55.0])
@pytest.mark.parametrize("load", [packets.one_way, packets.closes_and_resets, packets.talks])
def test_stays_where_few_collections_came(load: Load, first_pass: float) -> None:
    """Held against how long each entry that was made by then stayed in the end."""
    for second, row, table in seen(load, 40, first_pass):
        stays = row.residence
        if second > packets.SECONDS / 2:
            continue  # some of those never end
        true = float(np.median([stay for made, stay in table.stayed.values() if made <= second]))
        assert (stays.at_least or 0.0) <= 1.125 * true, second
        if stays.p50 is not None:
            assert stays.p50 == pytest.approx(true, abs=stays.error), second


def test_a_half_closed_connection_lives_until_its_last_packet() -> None:
    """It waits for 30 s then, and is not in use for that."""

    def load(random: packets.Random) -> Iterator[Packet]:
        return (one for one in half_closed(random) if one.sport % 3 != 1)  # the answered ones

    told = [row.life.p50 for _, row, _ in seen(load, 40, 15.0) if row.life.n >= 100]
    assert told == [pytest.approx(np.log(2), rel=0.2)] * len(told)
    assert len(told) >= 2


def test_what_is_freed_is_of_those_that_it_frees() -> None:
    """A keep-alive spares closed entries, not those that are open; of a sample, with its error."""
    made_of = Composition(n=100, closed=0.6, closed_error=0.1)
    one = Culprit("tcp/80", proto="tcp", port=80, held=1000, closed=0.6, composition=made_of)
    low, high = remedies.keep_alive(one).frees or (0, 0)
    assert 0 < low <= 0.8 * 500
    assert high == 700
    deleted = remedies.delete(one, 600, state="CLOSE_WAIT")
    assert deleted is not None
    assert deleted.frees is not None
    assert deleted.frees[0] < 520
    assert 680 < deleted.frees[1] <= 1000
