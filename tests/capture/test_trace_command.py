"""``ctrace trace``: its lines, columns and end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pytest
from kit import traffic
from kit.command import command, ctrace
from kit.running.tracing import linked

from ctrace.batch import Clock, Names, Netns, Owner
from ctrace.lab import Lab
from ctrace.record import Events, Kind, Reason, Status, address_bytes, empty
from ctrace.view.export.events import HEADER, EventLines

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# -- lines ---------------------------------------------------------------------------------
def sample() -> Events:
    events = empty(3)
    events["ts"] = [1_000_000_001, 2_000_000_002, 3_000_000_003]
    events["kind"] = [Kind.INSERT, Kind.DESTROY, Kind.DROP]
    events["reason"] = [Reason.NEW, Reason.EXPIRED, Reason.TABLE_FULL]
    events["proto"] = [6, 17, 58]
    events["family"] = [2, 2, 10]
    for i, (src, dst) in enumerate([("10.0.0.1", "10.0.0.2")] * 2 + [("fd00::1", "fd00::2")]):
        for name, text in (("src", src), ("dst", dst), ("reply_src", dst), ("reply_dst", src)):
            events[name][i] = np.frombuffer(address_bytes(text), np.uint8)
    events["sport"], events["dport"] = [40000, 53, 7], [80, 53, 0x8000]
    events["reply_sport"], events["reply_dport"] = [80, 53, 7], [40000, 53, 0x8100]
    events["netns"] = 4026531840
    events["status"] = [Status.CONFIRMED, Status.SEEN_REPLY | Status.ASSURED, 0]
    events["state"] = [1, 255, 255]
    events["direction"] = [2, 0, 1]
    events["owner"][0] = 123 << 32 | 5
    events["cgroup"][0] = 42
    events["idle_ms"][1], events["overdue_ms"][1], events["timeout_ms"][1] = -1, -500, 0
    return events


def lines() -> EventLines:
    made = EventLines(Clock(offset=1_700_000_000_000_000_000))
    made.learn(
        Names(
            netns={4026531840: Netns(4026531840, "init")},
            owners={123 << 32 | 5: Owner(123 << 32 | 5, 'we"ird', 42, "nginx.service")},
        )
    )
    return made


def test_json_lines() -> None:
    insert, destroy, drop = (json.loads(line) for line in lines().json(sample()))
    assert insert["ts"] == "2023-11-14T22:13:21.000000001Z"
    assert (insert["kind"], insert["reason"], insert["proto"]) == ("insert", "new", "tcp")
    assert (insert["src"], insert["sport"]) == ("10.0.0.1", 40000)
    assert (insert["dst"], insert["dport"]) == ("10.0.0.2", 80)
    assert insert["reply"] == {
        "src": "10.0.0.2", "dst": "10.0.0.1", "sport": 80, "dport": 40000,
    }  # fmt: skip
    assert (insert["netns"], insert["netns_name"]) == (4026531840, "init")
    assert insert["status"] == ["CONFIRMED"]
    assert (insert["state"], insert["direction"]) == ("SYN_SENT", "out")
    assert insert["owner"] == {"pid": 123, "comm": 'we"ird', "unit": "nginx.service"}
    assert insert["cgroup"] == 42
    assert (destroy["kind"], destroy["reason"]) == ("destroy", "expired")
    assert (destroy["idle_ms"], destroy["overdue_ms"], destroy["timeout_ms"]) == (None, -500, None)
    assert destroy["status"] == ["SEEN_REPLY", "ASSURED"]
    assert destroy["state"] is None
    assert "owner" not in destroy
    assert (drop["family"], drop["proto"], drop["src"]) == ("ipv6", "icmpv6", "fd00::1")
    assert (drop["owner"], drop["cgroup"], drop["direction"]) == (None, None, "in")


def test_columns() -> None:
    insert, destroy, drop = lines().columns(sample())
    assert insert.split() == [
        "22:13:21.000000", "insert", "new", "tcp", "10.0.0.1:40000", "10.0.0.2:80", "out",
        "init", "SYN_SENT", 'we"ird[123]',
    ]  # fmt: skip
    assert destroy.split()[1:3] == ["destroy", "expired"]
    assert "[fd00::1]:7" in drop
    assert insert.index("tcp") == HEADER.index("PROTO")
    assert lines().columns(empty()) == lines().json(empty()) == []


# -- the command -----------------------------------------------------------------------------
def start(*args: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        **command("trace", *args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    said = child.stderr.readline()
    assert said.startswith("ctrace: listening with "), said
    return child


@root
@pytest.mark.kernel
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_trace_prints_what_happens_until_it_is_stopped(lab: Lab, end: signal.Signals) -> None:
    a, b = linked(lab)
    child = start("-o", "json", "-p", "udp", "--hooks", "netfilter", "--netns", str(a.inum))
    began = datetime.now(timezone.utc)
    sent = traffic.udp_flows(a, (b.addresses["a"][0], 9), 12).flows
    a.run(["conntrack", "-F"])
    assert child.stdout is not None
    events: list[dict[str, Any]] = []
    while len(events) < 24:  # the suite's own time limit ends it otherwise
        events.append(json.loads(child.stdout.readline()))
    child.send_signal(end)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith(" 0 lost")
    for kind in ("insert", "destroy"):
        told = [(e["src"], e["sport"], e["dst"], e["dport"]) for e in events if e["kind"] == kind]
        assert sorted(told) == sorted((f.src, f.sport, f.dst, f.dport) for f in sent)
    for event in events:
        when = datetime.fromisoformat(event["ts"][:26] + "+00:00")
        assert -1 < (when - began).total_seconds() < 60


@root
@pytest.mark.kernel
def test_count_duration_kinds_and_a_closed_pipe(lab: Lab) -> None:
    a, b = linked(lab)
    child = start("--count", "3", "-p", "udp", "--hooks", "netfilter")
    traffic.udp_flows(a, (b.addresses["a"][0], 9), 12)
    out, err = child.communicate(timeout=60)
    assert len(out.splitlines()) == 4
    assert out.splitlines()[0] == HEADER
    assert "3 events" in err
    assert child.returncode == 0

    words = ("--duration", "0.5", "-e", "destroy", "--hooks", "netfilter", "-p", "udp")
    child = start(*words, "--netns", str(a.inum))
    traffic.udp_flows(a, (b.addresses["a"][0], 9), 5, first_port=30000)
    assert child.communicate(timeout=60)[0].splitlines() == [HEADER]
    assert child.returncode == 0

    child = start("--hooks", "netfilter")
    assert child.stdout is not None
    child.stdout.close()
    assert child.wait(timeout=60) == 1
    assert child.stderr is not None
    assert "Traceback" not in child.stderr.read()


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (("-e", "insert,nonsense"), 2, "unknown kind"),
        (("--hooks", "magic"), 2, "'magic' is not one of"),
        (("-4", "-6"), 2, "both IPv4 and IPv6"),
        (("--netns", "no-such-namespace"), 2, "no network namespace"),
    ],
)
def test_bad_arguments_get_one_line(args: tuple[str, ...], status: int, text: str) -> None:
    done = ctrace("trace", *args)
    assert done.returncode == status
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1


@root
@pytest.mark.kernel
@pytest.mark.parametrize("more", [(), ("-p", "udp", "--dport", "53")], ids=["all", "some flows"])
def test_totals_are_of_the_namespace_and_the_flows_asked_for(
    lab: Lab, more: tuple[str, ...]
) -> None:
    a, b = linked(lab)
    there, back = b.addresses["a"][0], a.addresses["b"][0]
    wanted = 530 if more else 600
    with subprocess.Popen(
        **command("top", "0.5", "-o", "json", "--netns", a.inum, *more),
        stdout=subprocess.PIPE, text=True,
    ) as top:  # fmt: skip
        assert top.stdout is not None
        seen = json.loads(top.stdout.readline())
        traffic.udp_flows(a, (there, 53), 30)
        traffic.udp_flows(a, (there, 9), 70, first_port=30000)
        traffic.udp_flows(b, (back, 53), 500, first_port=40000)
        while seen["totals"]["insert"] < wanted:  # the suite's own time limit ends it otherwise
            seen = json.loads(top.stdout.readline())
        seen = json.loads(top.stdout.readline())
        top.terminate()
        top.stdout.read()
    assert [table["netns"] for table in seen["tables"]] == [a.inum]
    # what b sends arrives, and is tracked, at a, too
    assert seen["totals"]["insert"] == wanted
    assert sum(culprit["inserts"] for culprit in seen["culprits"]) == seen["totals"]["insert"]
