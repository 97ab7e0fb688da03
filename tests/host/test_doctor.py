"""``ctrace doctor``: what it says is so, and its self-test proves what it claims."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
from kit.command import Done, command, ctrace

from ctrace.batch import Counts
from ctrace.capture.netlink.listener import NetlinkCapture
from ctrace.filters import Filter
from ctrace.host import kernel
from ctrace.record import Events, Kind
from ctrace.selftest import run
from ctrace.selftest.report import FAILED
from ctrace.selftest.traffic import PORT

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


def doctor(*args: str) -> Done:
    return ctrace("doctor", *args)


def test_the_report_is_the_hosts_own_numbers() -> None:
    done = doctor("-o", "json")
    report: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode == 0) is report["can_trace"] is True
    assert report["kernel"]["release"] == os.uname().release
    families = {one["family"]: one["holds"] for one in report["families"]}
    assert list(families) == ["fentry", "kprobe", "netfilter", "netlink"]
    assert report["hooks"] == next(name for name, holds in families.items() if holds)
    assert all(one["why"] for one in report["families"])
    with open("/proc/sys/net/netfilter/nf_conntrack_max") as file:
        assert report["conntrack"]["max"] == int(file.read())
    names = [one["name"] for one in report["namespaces"]]
    assert "init" in names


def test_it_reads_well_and_into_a_closed_pipe() -> None:
    done = doctor()
    assert os.uname().release in done.stdout
    for family in ("fentry", "kprobe", "netfilter", "netlink"):
        assert family in done.stdout
    with subprocess.Popen(
        **command("doctor"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout
        assert child.stderr
        child.stdout.close()
        assert child.stderr.read() == b""


def test_why_names_the_rules() -> None:
    done = doctor("--why", "-o", "json")
    assert done.returncode == 0
    assert "namespaces" in json.loads(done.stdout)


def test_wrong_arguments() -> None:
    for args in (("--hooks", "netlink"), ("--hooks", "magic", "--self-test"), ("extra",)):
        done = doctor(*args)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", ["in use", "netlink"])
def test_the_self_test_passes(family: str) -> None:
    args = [] if family == "in use" else ["--hooks", family]
    done = doctor("--self-test", "-o", "json", *args)
    report = json.loads(done.stdout)
    wrong = [check for check in report["checks"] if check["result"] == "FAILED"]
    assert not wrong
    assert done.returncode == 0
    assert report["passed"]
    names = "\n".join(check["name"] for check in report["checks"])
    for part in (
        "insert  tcp 10.",
        "insert  udp",
        "[fd77",
        "delete  tcp",
        "expire  udp",
        "table-full",
    ):
        assert part in names


class Wrong(NetlinkCapture):
    """A capture that decodes one field of each kind wrongly."""

    def poll(self) -> tuple[Events, int]:
        events, lost = super().poll()
        made = events["kind"] == Kind.INSERT
        events["zone"][made] += 1
        events["reply_dport"][made & (events["proto"] == 6)] ^= 1
        events["mark"][events["kind"] == Kind.DESTROY] += 1
        return events, lost

    def counts(self) -> dict[int, Counts]:
        return {netns: counts + 1 for netns, counts in super().counts().items()}


@pytest.mark.slow
def test_the_self_test_sees_a_wrong_field() -> None:
    if (kernel.limits()[0] or 0) > run.FILL_LIMIT:
        pytest.skip("the table is too large to fill")
    capture = Wrong()
    try:
        report = run.prove(capture, Filter(dport=PORT))
    finally:
        capture.close()
    assert not report.passed
    inserts = [check for check in report.checks if check.name.startswith("insert ")]
    ends = [check for check in report.checks if check.name.startswith("delete ")]
    full = [check for check in report.checks if check.name.endswith("exact count")]
    assert len(inserts) > 10
    assert len(ends) > 10
    assert all(check.result == FAILED for check in inserts + ends + full)
    assert all("zone:" in check.text for check in inserts)
    assert all(("reply_dport:" in check.text) == (" tcp " in check.name) for check in inserts)
    assert all(check.text.startswith("mark:") for check in ends)
