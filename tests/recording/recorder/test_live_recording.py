"""Recordings of real traffic, held against the kernel's own counters and the live screen."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kit.command import said
from kit.running.recorder import fill_up, kinds, pair, report, rules_in, running, table
from kit.traffic import tcp_connections, tcp_server, udp_flows, udp_server

import ctrace
from ctrace.advice.again import facts_of
from ctrace.capture import open_live
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.lab import Lab, Node
from ctrace.live.adviser import FeedAdviser, recorded_facts
from ctrace.live.replay import ReplayFeed
from ctrace.model.model import Model
from ctrace.model.snapshot import GROUPS, Snapshot
from ctrace.record import Kind, Reason, join
from ctrace.recording.recorder import host_facts
from ctrace.recording.writer import Writer

pytestmark = pytest.mark.kernel
CTRACE = [sys.executable, "-m", "ctrace"]
ROOM = 400
"""Places that the tests leave free in a table."""


def by_key(data: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    names = ("inserts", "destroys", "held", "drops")
    return {one["key"]: tuple(one[name] for name in names) for one in data["culprits"]}


def refusals(data: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {one["key"]: (one["drops"], one["evicted"]) for one in data["victims"]}


def incident(here: Node, there: Node, target: str) -> tuple[int, int]:
    """Connections, look-ups, deletions, then one-way flows until the table refuses them; how many
    were refused, and deleted."""
    with tcp_server(there, 8063), udp_server(there, 53):
        tcp_connections(here, (target, 8063), 60)
        udp_flows(here, (target, 53), 80, first_port=30000)
        # it ends at one that expired meanwhile
        gone = here.run(["conntrack", "-D", "-p", "udp", "--dport", "53"], check=False)
        refused = udp_flows(here, (target, 8125), 800, first_port=40000).refused
        return len(refused), len(gone.splitlines())


@pytest.mark.machine
@pytest.mark.usefixtures("few_places")
@pytest.mark.parametrize("hooks", [[], ["--hooks", "netlink"]], ids=["best", "netlink"])
def test_a_recording_beside_the_screen_says_what_the_kernel_and_the_screen_say(
    lab: Lab, tmp_path: Path, hooks: list[str]
) -> None:
    """A table that fills up and refuses, recorded and watched at the same time."""
    here, there, target = pair(lab)
    fill_up(here, ROOM)
    path, only = tmp_path / "a.data", ["--netns", str(here.inum), *hooks]
    with (
        running("record", "-o", path, *only) as record,
        running("top", "0.5", "-o", "json", "--limit", "1000", *only) as top,
    ):
        record.until(b"recording to")
        top.frame()
        before, held = here.stats(), here.count()
        refused, deleted = incident(here, there, target)
        after, kept = here.stats(), here.count()
        live = top.frame()  # refusals are read from counters, entries that came have to be heard
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            seen = table(live, here)["totals"]
            if seen["drop"] >= refused and seen["insert"] - seen["destroy"] == kept - held:
                break
            live = top.frame()
        live = top.frame()
        assert top.end(signal.SIGTERM) == 143
        assert record.end() == 0
        assert b"stopped by a signal" in record.said
    again = report(path)
    assert refused > 100
    assert after["drop"] - before["drop"] == refused
    with ctrace.open(str(path)) as recording:
        reasons = [one.events["reason"] == Reason.GC_PRESSURE for one in recording.batches()]
    given_up = sum(int(one.sum()) for one in reasons)
    for data in (live, again):
        told = table(data, here)
        totals = told["totals"]
        assert data["lost"] == 0
        assert totals["drop"] == refused
        # the kernel does not count what its collector gives up
        assert totals["early_drop"] == after["early_drop"] - before["early_drop"] + given_up
        assert totals["insert"] - totals["destroy"] == kept - held
        assert totals["deleted"] == deleted
        assert told["count"] == kept
    assert table(again, here)["totals"] == table(live, here)["totals"]
    assert by_key(again) == by_key(live)
    assert refusals(again) == refusals(live)
    assert sum(drops for drops, _ in refusals(live).values()) == (0 if hooks else refused)
    found = kinds(path)
    assert found[Kind.INSERT] == table(live, here)["totals"]["insert"]
    assert found[Kind.DESTROY] == table(live, here)["totals"]["destroy"]
    assert found[Kind.DROP] == (0 if hooks else refused)


@pytest.mark.machine
@pytest.mark.usefixtures("few_places")
def test_a_replay_shows_what_the_screen_showed_at_every_moment(lab: Lab, tmp_path: Path) -> None:
    """Field by field: one source through a model and into a file, and the file replayed."""
    here, there, target = pair(lab)
    fill_up(here, ROOM)
    path = str(tmp_path / "a.data")
    source = open_live(Filter(netns=here.inum), sample=True)
    live: list[tuple[int, list[Snapshot]]] = []
    try:
        head = host_facts.header(source)
        model = Model(head.hooks, head.clock, head.started, host=head.host)
        traffic = threading.Thread(target=incident, args=(here, there, target))
        with Writer(path, head) as writer:
            traffic.start()
            for batch in source.batches(0.25):
                writer.write(batch)
                model.update(batch)
                live.append((batch.until, [model.snapshot(group=group) for group in GROUPS]))
                if not traffic.is_alive() and len(live) > 20:
                    break
        traffic.join()
    finally:
        source.close()
    assert sum(victim.drops for victim in live[-1][1][0].victims) > 100
    with ctrace.open(path) as recording:
        again = Model(head.hooks, head.clock, head.started, host=head.host)
        for (until, shown), batch in zip(live, recording, strict=True):
            again.update(batch)
            assert batch.until == until
            assert [again.snapshot(group=group) for group in GROUPS] == shown
    with ctrace.open(path) as recording:
        feed = ReplayFeed(recording, paused=True)
        pair_at = GROUPS.index("pair")
        for until, shown in (live[-1], live[3], live[len(live) // 2]):
            feed.seek(head.clock.utc(until) / 1e9)
            assert feed.settle()
            latest = feed.latest()
            assert latest is not None
            assert replace(latest, culprits=latest.culprits[:5]) == replace(
                shown[pair_at], culprits=shown[pair_at].culprits[:5]
            )
        feed.close()
        assert feed.error is None


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_however_it_ends_the_file_is_readable_and_nothing_is_left(
    lab: Lab, tmp_path: Path, how: str
) -> None:
    here, _, target = pair(lab)
    path = tmp_path / "a.data"
    with running("record", "-o", path, "--netns", here.inum) as record:
        record.until(b"recording to")
        sent = len(udp_flows(here, (target, 8125), 500).flows)
        deadline = time.monotonic() + 60
        seen = 0
        while seen < sent:  # also while it is being written
            assert time.monotonic() < deadline
            time.sleep(0.2)
            with ctrace.open(str(path)) as recording:
                assert recording.writing
                seen = sum(int((b.events["kind"] == Kind.INSERT).sum()) for b in recording)
        udp_flows(here, (target, 8125), 50, first_port=50000)
        status = record.end(signal.Signals[how])
    assert status == (-signal.SIGKILL if how == "SIGKILL" else 0)
    assert b"Traceback" not in record.said
    with ctrace.open(str(path)) as recording:
        assert not recording.writing
        found = join([batch.events for batch in recording])
        assert recording.ended == (None if how == "SIGKILL" else "stopped by a signal")
        assert recording.missing.truncated == (how == "SIGKILL")
        assert not recording.missing.events
    inserted = int((found["kind"] == Kind.INSERT).sum())
    assert inserted >= sent if how == "SIGKILL" else inserted == sent + 50, (inserted, sent)
    assert [one.name for one in tmp_path.iterdir()] == ["a.data"]
    assert "udp/8125" in said("report", path)


def test_a_recording_is_advised_on_by_the_rules_that_were_there(lab: Lab, tmp_path: Path) -> None:
    """As the replay's page does: a chain that accepts by state alone needs an accept rule."""
    here, there, target = pair(lab)
    here.run(
        ["nft", "-f", "-"],
        stdin="table inet guard { chain in { type filter hook input priority 0; policy drop; "
        "ct state established,related accept; icmpv6 type 133-137 accept; }; }",
    )
    path = tmp_path / "a.data"
    with running("record", "-o", path, "--netns", here.inum) as record:
        record.until(b"recording to")
        with tcp_server(there, 8063):
            assert len(tcp_connections(here, (target, 8063), 300).flows) == 300
        until = time.monotonic() + 120
        while here.inum not in rules_in(path) and time.monotonic() < until:
            time.sleep(0.2)
        assert record.end() == 0
    then = facts_of(here.inum)
    here.run(["nft", "delete", "table", "inet", "guard"])
    with ctrace.open(str(path)) as recording:
        rules = rules_in(path)
        feed = ReplayFeed(recording, paused=True)
        feed.seek(feed.position.end)
        assert feed.settle()
        snapshot = feed.latest()
        assert snapshot is not None
        adviser = FeedAdviser(feed, recorded_facts(rules))
        advice = adviser.advise(snapshot)
        remedy = adviser.about(advice, "tcp", 8063, here.inum)
        live = FeedAdviser(feed, {here.inum: then}.get)
        other = live.about(live.advise(snapshot), "tcp", 8063, here.inum)
        assert other is not None
        assert remedy is not None
        # The table itself is there only live: how many flows were tried is told in the reasons.
        assert replace(other, reasons=()) == replace(remedy, reasons=())
        assert other.reasons[0] == remedy.reasons[0]
        feed.close()
    assert remedy is not None
    assert remedy.text.startswith("NOTRACK tcp/8063: ")
    assert "unsafe" not in remedy.text
    assert "notrack" in remedy.rules
    assert "guard" in remedy.rules
    assert adviser.about(advice, "tcp", 8063, 1) is None
    with pytest.raises(CtraceError, match="nothing can be applied over a recording"):
        adviser.offer(advice)


def grown_or_over(file: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until more is written: what is sent faster than that may be lost before it."""
    size, until = written(file), time.monotonic() + 120
    while process.poll() is None and written(file) == size:
        assert time.monotonic() < until
        time.sleep(0.02)


def written(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it is over
        return 0


def test_a_full_disk_ends_it_with_one_line(lab: Lab, tmp_path: Path) -> None:
    """A file system of its own, in a mount namespace of its own."""
    here, _, target = pair(lab)
    where, kept = tmp_path / "disk", tmp_path / "kept.data"
    where.mkdir()
    command = " ".join([*CTRACE, "record", "-o", f"{where}/a.data", "--netns", str(here.inum)])
    script = (
        f"mount -t tmpfs -o size=96k none {where} && {command}; status=$?; "
        f"cp {where}/a.data {kept}; exit $status"
    )
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        said = [process.stderr.readline().decode()]  # once the hooks are there
        turn = 0
        file = Path(f"/proc/{process.pid}/root{where}/a.data")
        while process.poll() is None and turn < 1000:
            udp_flows(here, (target, 8125 + turn), 300)  # all new: none is reopened
            turn += 1
            grown_or_over(file, process)
        said += process.communicate(timeout=60)[1].decode().splitlines()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 1, said
    line = said[-1]
    assert "No space left on device; the recording ends here and keeps its" in line
    assert not any("Traceback" in one for one in said)
    found = kinds(kept)
    assert f"keeps its {sum(found.values()):,} events" in line.replace("\u202f", ",")
    assert found[Kind.INSERT] > 0
    assert list(where.iterdir()) == []


UNIT = Path(ctrace.__file__).parent / "share" / "systemd" / "ctrace-recorder.service"
SANDBOX = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
for kept in /proc/sys /sys/fs/cgroup /sys / ; do
    mountpoint -q $kept || mount --bind $kept $kept
    mount -o remount,bind,ro $kept
done
umask 077
shift
exec "$@"
"""
"""ProtectSystem=strict, ProtectKernelTunables, ProtectControlGroups and UMask, as systemd makes
them: everything is read-only but the unit's own directory."""


def test_the_recorders_unit_records_within_its_limits(lab: Lab, tmp_path: Path) -> None:
    """Its own command, with its capabilities only, on a read-only system; and its end."""
    here, _, target = pair(lab)
    unit = UNIT.read_text()
    command = re.search(
        r"^ExecStart=/usr/bin/env ctrace (.*) -o /var/lib/ctrace/recorder$", unit, re.M
    )
    capabilities = re.search(r"^CapabilityBoundingSet=(.*)$", unit, re.M)
    ending = re.search(r"^KillSignal=(.*)$", unit, re.M)
    assert command
    assert capabilities
    assert ending
    names = ",".join("+" + n.removeprefix("CAP_").lower() for n in capabilities[1].split())
    where = tmp_path / "state" / "recorder"
    where.parent.mkdir(mode=0o700)
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", SANDBOX, "sh", str(where.parent),
         "setpriv", "--bounding-set", f"-all,{names}", "--no-new-privs",
         *CTRACE, *command[1].split(), "-o", str(where)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(where.glob("*.ctrace")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        sent, seen, deadline = 0, 0, deadline + 120
        while seen < 100 or here.inum not in rules_in(where):  # of one namespace after another
            assert time.monotonic() < deadline
            sent += len(udp_flows(here, (target, 8125), 50, first_port=20000 + sent).flows)
            time.sleep(1.0)  # all of it is read again
            with ctrace.open(str(where)) as recording:
                parts = [b.events[b.events["netns"] == here.inum] for b in recording]
            seen = sum(int((part["kind"] == Kind.INSERT).sum()) for part in parts)
        process.send_signal(signal.Signals[ending[1]])
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert said == b""
    with ctrace.open(str(where)) as recording:
        assert recording.ended == "stopped by a signal"
        assert recording.hooks.family != "netlink"
        names_of = {i: n.name for batch in recording for i, n in batch.names.netns.items()}
        assert here.inum in dict(recording.rulesets())
    assert here.inum in names_of
    (file,) = where.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert where.stat().st_mode & 0o777 == 0o700
