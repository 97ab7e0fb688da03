"""The netfilter family leaves nothing behind, and two at once see the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from kit import traffic
from kit.running.tracing import Trace, both_tuples, spaces

from ctrace.lab import Lab, Node

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


# -- leaving nothing behind --------------------------------------------------------------
def _programs(pid: int) -> set[int]:
    """Ids of the BPF programs that a process holds."""
    found = set()
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        found |= {int(one) for one in re.findall(r"^prog_id:\s*(\d+)", info.read_text(), re.M)}
    return found


def _loaded(ids: set[int]) -> set[int]:
    """Those of these that are loaded."""
    told = subprocess.run(["bpftool", "-j", "prog"], capture_output=True, text=True, check=True)
    return ids & {program["id"] for program in json.loads(told.stdout)}


def test_kill_9_leaves_nothing(pair: tuple[Node, Node]) -> None:
    a, _ = pair
    code = (
        "import time\n"
        "from ctrace.capture.hooks.netfilter import NetfilterCapture\n"
        "from ctrace.filters import Filter\n"
        "from ctrace.host.netns import Namespace\n"
        "c = NetfilterCapture(Filter())\n"
        f"c.follow([Namespace({a.inum}, 'a', {a.path!r})])\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    with os.scandir(f"/proc/{child.pid}/fd") as descriptors:
        kinds = Counter(os.readlink(entry.path) for entry in descriptors)
    assert kinds["anon_inode:bpf_link"] >= 4
    ours = _programs(child.pid)
    assert _loaded(ours) == ours
    assert len(ours) >= 4
    child.kill()
    child.wait()
    child.stdout.close()
    deadline = time.monotonic() + 60
    while _loaded(ours) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _loaded(ours)


def test_a_deleted_namespace_is_let_go(lab: Lab) -> None:
    """Links keep a namespace alive; its veth peer disappears once we let go."""
    a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
    lab.link(a, b)
    trace = Trace(a, b)
    try:
        b.close()
        lab.nodes.remove(b)
        time.sleep(0.3)
        assert "to-b" in a.run(["ip", "link"])
        trace.capture.follow(spaces(a))
        deadline = time.monotonic() + 60
        while "to-b" in a.run(["ip", "link"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "to-b" not in a.run(["ip", "link"])
    finally:
        trace.capture.close()


def test_two_tracers_at_once_see_the_same(pair: tuple[Node, Node]) -> None:
    a, b = pair
    first, second = Trace(a, b), Trace(a, b)
    try:
        traffic.udp_flows(a, (b.addresses["a"][0], 9), 50)
        one, two = first.take(), second.take()
        assert both_tuples(one) == both_tuples(two)
        assert len(one) == len(two) == 100
    finally:
        first.capture.close()
        second.capture.close()
