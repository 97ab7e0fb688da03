"""Namespaces that come, go and get a number that another had: real ones, and made-up numbers."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.shapes import START

from ctrace.batch import LOWEST_INODE, Batch, TableReading, inode_of, life
from ctrace.capture import poller
from ctrace.capture.live import open_live
from ctrace.capture.lives import Lives
from ctrace.capture.namebook import NameBook
from ctrace.capture.netlink.ends import OlderEntries
from ctrace.capture.netlink.listener import NetlinkCapture
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.host import ctnetlink, netns
from ctrace.host.netns import Namespace
from ctrace.model.model import Model
from ctrace.model.snapshot import Snapshot
from ctrace.record import N_REASONS, Events, Kind, Reason, empty
from ctrace.view.export.json import snapshot_json
from ctrace.view.unseen import blind

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
TRACKS = (
    "table inet t { chain o { type filter hook output priority 0; ct state invalid counter; }\n}\n"
)


@contextmanager
def mounted(name: str) -> Iterator[Namespace]:
    """A tracked namespace with a name, as ``ip netns add`` makes it."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    path = f"/run/netns/{name}"
    try:
        with netns.enter(path):
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            subprocess.run(["nft", "-f", "-"], input=TRACKS.encode(), check=True)
        yield Namespace(os.stat(path).st_ino, name, path)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def send(space: Namespace, n: int, first: int = 20_000) -> None:
    with netns.enter(space.path):
        sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(n)]
    for at, one in enumerate(sockets):
        with one:
            one.bind(("127.0.0.1", first + at))
            one.sendto(b"x", ("127.0.0.1", 9))


def counted(space: Namespace) -> int:
    """Entries as the kernel counts them."""
    with netns.enter(space.path), open("/proc/sys/net/netfilter/nf_conntrack_count") as file:
        return int(file.read())


@root
@pytest.mark.kernel
def test_a_named_namespace_is_watched_once_it_is_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only at the next look: there is none here."""
    monkeypatch.setattr(poller, "LOOK", 1e9)
    source = open_live(ring_bytes=1 << 25)  # others may lose a whole table meanwhile
    seen: Counter[int] = Counter()
    try:
        stream = source.batches(0.2)
        next(stream)
        with mounted(f"ct-young-{os.getpid()}") as space:
            send(space, 60)
            until = time.monotonic() + 60
            while sum(seen.values()) < 60:
                assert time.monotonic() < until, seen
                events = next(stream).events
                mine = (inodes(events) == space.inum) & (events["dport"] == 9)
                seen.update(events["kind"][mine].tolist())
            assert counted(space) >= sum(seen.values()) == 60
    finally:
        source.close()
    assert seen.keys() <= {int(Kind.INSERT), int(Kind.EXISTING)}


@root
def test_a_mount_is_told() -> None:
    mounts = netns.Mounts()
    try:
        with mounted(f"ct-mount-{os.getpid()}"):
            assert mounts.changed()
    finally:
        mounts.close()


def held(snapshot: Snapshot) -> int:
    """By flows that were sent: the kernel sends some of its own."""
    return sum(one.held for one in snapshot.culprits if one.key == "udp/9")


def inodes(events: Events) -> npt.NDArray[np.int64]:
    return np.array([inode_of(int(one)) for one in events["netns"]], np.int64)


@root
@pytest.mark.kernel
def test_one_that_has_gone_leaves_the_table_and_is_told_as_gone() -> None:
    with mounted(f"ct-gone-{os.getpid()}") as space:
        source = open_live(Filter(netns=space.inum))
        model = Model(source.hooks, source.clock, source.started)
        try:
            stream = source.batches(0.2)
            send(space, 120)
            until = time.monotonic() + 60
            shown = model.snapshot("service")
            while not (shown.tables and held(shown) == 120):
                assert time.monotonic() < until, (shown.tables, shown.held_total)
                model.update(next(stream))
                shown = model.snapshot("service")
            assert [table.count >= 120 for table in shown.tables] == [True]
            subprocess.run(["ip", "netns", "del", space.name], check=True)
            while shown.tables or shown.held_total:
                assert time.monotonic() < until, (shown.tables, shown.held_total)
                model.update(next(stream))
                shown = model.snapshot("service")
        finally:
            source.close()
    assert shown.totals.insert >= 120
    assert "gone" in shown.why[0].text
    assert "%" not in shown.why[0].text
    # the kernel may have given its number to another namespace meanwhile
    gone = f"{space.name} (gone)"
    (row,) = (one for one in shown.culprits if (one.key, one.netns_name) == ("udp/9", gone))
    assert (row.held, row.share) == (0, 0.0)


@root
@pytest.mark.kernel
def test_no_two_namespaces_have_one_cookie() -> None:
    name = f"ct-cookie-{os.getpid()}"
    with mounted(name) as one, mounted(f"{name}-2") as other:
        found = {netns.cookie(one), netns.cookie(other)}
        assert len(found) == 2 or found == {0}
        assert netns.cookie(one) in found
        # a path that leads to another namespace is not that of this number
        assert netns.cookie(Namespace(other.inum, "x", one.path)) == 0


def made(inum: int, times: list[int]) -> Events:
    events = empty(len(times))
    events["ts"], events["netns"], events["kind"] = times, inum, int(Kind.INSERT)
    return events


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.booleans())
def test_each_life_keeps_its_events_and_counters(sizes: list[int], cookies_known: bool) -> None:
    inum, lives = 0xF0000000 + 500, Lives()
    space = Namespace(inum, "pod", "/nowhere")
    total = np.zeros(N_REASONS, np.uint64)
    told: dict[int, int] = {}
    now = START
    for number, size in enumerate(sizes):
        with pytest.MonkeyPatch.context() as patch:
            cookie = 100 + number if cookies_known else 0
            patch.setattr(netns, "cookie", lambda _, cookie=cookie: cookie)
            lives.came([space], {inum: total})
        events = made(inum, list(range(now + 10, now + 10 + size)))
        mine = life(inum, number)
        assert lives.id_of(inum) == mine
        assert set(lives.events(events)["netns"].tolist()) == {mine}
        total = total.copy()
        total[Reason.NEW] += np.uint64(size)
        told[mine] = told.get(mine, 0) + size  # of many lives some go by one name
        now += 1000
        assert lives.left([inum], now) == [mine]
    counts = lives.counts({inum: total})
    assert {one: int(c[Reason.NEW]) for one, c in counts.items()} == told
    assert len(counts) <= 14


def test_one_that_comes_back_is_the_same_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "cookie", lambda _: 77)
    inum, lives = 0xF0000000 + 9, Lives()
    lives.came([Namespace(inum, "a", "/a")], {})
    lives.left([inum], START)
    lives.came([Namespace(inum, "b", "/b")], {})
    assert lives.id_of(inum) == inum


def test_one_that_takes_over_a_number_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks one went and another came: told by the name that is its own."""
    monkeypatch.setattr(netns, "local_addresses", lambda _path: ("192.0.2.1",))
    book = NameBook(NetlinkCapture.__new__(NetlinkCapture))
    monkeypatch.setattr(book, "_new_owners", lambda _events: {})
    inum = 0xF0000000 + 9

    def told(space: Namespace) -> list[str]:
        names = book.learn(empty(), [], [space], True)
        return [one.name for one in names.netns.values()]

    pod = Namespace(inum, "pod", "/a")
    book.came([pod])
    assert told(pod) == ["pod"]
    assert told(pod) == []
    book.came([pod])
    assert told(pod) == ["pod"], "of the same name, but another one"
    unnamed = Namespace(inum, f"netns:{inum}", "/b")
    book.came([unnamed])
    assert told(unnamed) == [unnamed.name], "not by the name of the one before"


def test_older_entries_are_read_only_of_their_own_namespace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process by which a namespace was found moves to another, or ends."""
    here, elsewhere = Namespace(7, "n", "/proc/1/ns/net"), Namespace(7, "n", "/proc/2/ns/net")
    zeros: Any = np.zeros(0)
    rows = made(7, [START] * 3)
    rows["ct"] = [1, 2, 3]
    tables = {here.path: ctnetlink.Table(rows, zeros, zeros, zeros, 7)}
    monkeypatch.setattr(ctnetlink, "read_table", lambda path: tables[path])
    older = OlderEntries(here)
    tables[here.path] = ctnetlink.Table(empty(), zeros, zeros, zeros, 8)
    assert not len(older.look(here)), "another namespace's table tells nothing"
    assert not older.due, "and is not read at once again"
    tables[elsewhere.path] = ctnetlink.Table(rows[:2], zeros, zeros, zeros, 7)
    assert older.look(elsewhere)["ct"].tolist() == [3]


@given(st.integers(0xF0000000, (1 << 32) - 1), st.integers(0, 13))
def test_a_life_tells_its_inode(inode: int, number: int) -> None:
    assert inode_of(life(inode, number)) == inode
    assert (life(inode, number) < LOWEST_INODE) == (number > 0)


def test_what_events_missed_is_not_held_by_one_that_has_gone() -> None:
    """Its entries went with it, also when no event told of each."""
    from ctrace.batch import Clock, HookInfo

    model = Model(HookInfo("netlink"), Clock(0), START)
    events = made(7, [START + 1] * 50)
    events["ct"] = np.arange(1, 51)
    events["proto"], events["dport"] = 17, 53
    second = 1_000_000_000
    reading = TableReading(7, 50, 1000, 1024)
    model.update(Batch(events, START + second, tables=(reading,)))
    before = model.snapshot("service")
    assert (before.held_total, len(before.tables)) == (50, 1)
    gone = TableReading(7, 0, 0, 0, at=START + 2 * second, gone=True)
    model.update(Batch(empty(), START + 3 * second, tables=(gone,)))
    model.update(Batch.idle(START + 60 * second))
    after = model.snapshot("service")
    assert (after.held_total, after.tables, after.culprits[0].held) == (0, (), 0)
    assert after.culprits[0].table_seconds == pytest.approx(50 * 2, rel=0.05)
    back = TableReading(7, 3, 1000, 1024)
    model.update(Batch(empty(), START + 61 * second, tables=(back,)))
    assert model.snapshot("service").tables[0].count == 3


@root
@pytest.mark.kernel
@pytest.mark.parametrize("seed", [False, True])
def test_entries_that_a_new_namespace_had_when_it_was_found_are_counted(seed: bool) -> None:
    """Who lists them, too, tells that nobody saw them made."""
    try:
        source = open_live(hooks="netfilter", seed=seed)
    except CtraceError as error:
        pytest.skip(str(error))
    model, listed = Model(source.hooks, source.clock, source.started), 0
    try:
        stream = source.batches(0.2)
        model.update(next(stream))
        with ExitStack() as stack:
            with source._poller.lock:  # no look meanwhile
                space = stack.enter_context(mounted(f"ct-late-{os.getpid()}"))
                send(space, 40)
            until = time.monotonic() + 60
            while source.unseen < 40 or (seed and listed < 40):  # others' may come first
                batch = next(stream)
                model.update(batch)
                old = batch.events["kind"] == int(Kind.EXISTING)
                old &= (batch.events["reason"] == int(Reason.NEW)) & (batch.events["dport"] == 9)
                listed += int((old & (inodes(batch.events) == space.inum)).sum())
                assert time.monotonic() < until
            assert counted(space) == 40
    finally:
        source.close()
    shown = model.snapshot("service")
    assert listed == (40 if seed else 0)
    assert listed <= shown.unseen <= (source.unseen if seed else 0)
    if seed:
        assert snapshot_json(shown)["exact"] is False
        assert "of new namespaces" in blind(shown.hooks, shown.unseen)[0]
