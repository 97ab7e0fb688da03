"""What conntrack cost, kept in a recording: it comes back whole, and damage costs only itself."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.command import command, said
from kit.traffic import udp_flows

from ctrace.batch import Batch, Clock, HookInfo
from ctrace.cost.result import Chains, HashTable, Hot, Latency, Perf, ServiceCost, Wait
from ctrace.lab import Lab
from ctrace.recording.derived import copy
from ctrace.recording.format import cost_block
from ctrace.recording.format.layout import BlockHead, BlockKind, Column, Damaged
from ctrace.recording.format.meta import Header, dumps
from ctrace.recording.merge import open_several
from ctrace.recording.reader import Recording
from ctrace.recording.redact import Redacted
from ctrace.recording.writer import Writer

PERF = Perf(
    duration_s=12.5,
    family="fentry",
    cost_ns=41.0,
    latencies=(Latency("in new", "udp", 7, 812.5, (700.0, 800.0, 900.0, 950.0, 990.0)),),
    services=(ServiceCost("udp", 53, 100.0, 400.0, 0.00004),),
    cpu_share=0.031,
    samples=1000,
    busy_share=0.5,
    hot=(Hot("nf_conntrack_in", 0.02),),
    tables=(HashTable("shop", 10, 1024, 0.02, 1, 0, 1, 2),),
    gc_lag=(0.1, 0.5, 2.0),
    expired=44,
    chains=Chains(1024, 1024, 0, (1004, 20), 0.0195, 1, 1, 1),
    waits=(Wait("table lock", 3, 9000, 5000, "do_syscall_64;nf_conntrack_lock"),),
    stacks_of="drop",
    stacks=(("a;b", 4),),
    sampled_stacks=(("do_syscall_64;nf_conntrack_in", 12),),
    gc_share=0.01,
    waiting_share=0.02,
    lost_samples=1,
    blind=("nothing",),
)


def header(host: str) -> Header:
    return Header(HookInfo("fentry"), Clock(0), 1, host=host)


def recording(path: Path, host: str, *perfs: Perf) -> str:
    with Writer(str(path), header(host)) as writer:
        for at, perf in enumerate(perfs, 1):
            writer.write(Batch.idle(at * 10**9))
            writer.measurement(host, perf)
    return str(path)


def test_every_field_comes_back(tmp_path: Path) -> None:
    assert all(getattr(PERF, one.name) not in ((), None, "") for one in fields(Perf))
    later = replace(PERF, duration_s=25.0, cpu_share=None, waits=None, chains=None)
    with Recording(recording(tmp_path / "a", "one", PERF, later)) as read:
        assert list(read.measurements()) == [("one", PERF), ("one", later)]
        assert not read.missing


def test_several_hosts_keep_their_own_and_names_can_be_replaced(tmp_path: Path) -> None:
    paths = [
        recording(tmp_path / host, host, replace(PERF, expired=n))
        for n, host in enumerate(("one", "two"))
    ]
    with contextlib.closing(open_several(paths)) as merged:
        copy(merged, str(tmp_path / "both"))
    with Recording(str(tmp_path / "both")) as read:
        assert [(host, perf.expired) for host, perf in read.measurements()] == [
            ("one", 0),
            ("two", 1),
        ]
    with Redacted(Recording(paths[0])) as redacted:
        ((host, perf),) = redacted.measurements()
        assert host != "one"
        assert perf.tables[0].netns != "shop"
        assert perf.latencies == PERF.latencies


def test_what_another_version_left_out_or_added_does_no_harm() -> None:
    data = json.loads(json.dumps(cost_block.to_json(PERF)))
    del data["chains"], data["blind"]
    data["later"] = {"x": 1}
    assert cost_block.from_json(data) == replace(PERF, chains=None, blind=())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([one.name for one in fields(Perf)]), JSON)
def test_a_strangers_values_are_checked(name: str, value: Any) -> None:
    data = json.loads(json.dumps(cost_block.to_json(PERF))) | {name: value}
    try:
        found = cost_block.from_json(data)
    except Damaged:
        return
    # What passes is of the field's kind: JSON of it is the same again.
    again = json.loads(json.dumps(cost_block.to_json(found)))
    assert cost_block.from_json(again) == found


def test_a_damaged_measurement_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with Writer(str(path), header("one")) as writer:
        writer.write(Batch.idle(10**9))
        writer.measurement("one", PERF)
        for text in ({"host": 3, "perf": {"samples": "many"}}, [1]):
            writer._block(BlockHead(BlockKind.PERF, until=10**9), Column.JSON, dumps(text))
    with Recording(str(path)) as read:
        assert list(read.measurements()) == [("one", PERF)]
        assert len(read.missing.damage) == 2
        assert len(list(read.batches())) == 1


@pytest.mark.kernel
@pytest.mark.parametrize("ring", [False, True], ids=["file", "flight recorder"])
def test_recording_with_perf_tells_it_in_every_report(tmp_path: Path, ring: bool) -> None:
    path, page = tmp_path / "r", tmp_path / "page.html"
    with Lab() as lab:
        a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
        lab.link(a, b)
        recorder = subprocess.Popen(
            **command("record", "--perf", "--duration", "3", "-o", path,
                      *(["--keep", "1h"] if ring else [])),
        )  # fmt: skip
        port, to = 20_000, 9
        while recorder.poll() is None:
            udp_flows(a, (b.addresses["a"][0], to), 20, first_port=port)
            port += 20
            if port == 60_000:  # a busy machine starts the recorder late: the flows stay new
                port, to = 20_000, to + 1
            time.sleep(0.1)
        assert recorder.returncode == 0
    told = json.loads(said("report", path, "-o", "json"))["perf"]
    (perf,) = told.values()
    new = [row for row in perf["latencies"] if (row["point"], row["proto"]) == ("in new", "udp")]
    assert new[0]["packets"] >= 40
    assert perf["samples"] > 0
    assert perf["chains"]["measured"] > 0
    if ring:
        return  # read like a file from here on
    assert "new, udp" in said("report", path)
    said("report", path, "--html", page)
    text = page.read_text()
    assert "What conntrack cost on " in text
    assert "new, udp" in text


@pytest.mark.kernel
def test_a_recording_without_perf_says_nothing_of_it(tmp_path: Path) -> None:
    here = ("--netns", "/proc/self/ns/net")  # other tests' tables may be large
    said("record", "-q", "--duration", "1", "-o", tmp_path / "r", *here)
    assert json.loads(said("report", tmp_path / "r", "-o", "json"))["perf"] == {}
    assert "What conntrack cost" not in said("report", tmp_path / "r")
