"""What connection tracking costs: the arithmetic, and real packets against known counts."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.command import said

from ctrace.cost import result as model
from ctrace.cost.objects import Objects
from ctrace.cost.result import BINS, POINTS, PROTOCOLS, RELATIVE_ERROR, Stack, Times
from ctrace.cost.sampling import Sampler, stacks
from ctrace.errors import CtraceError
from ctrace.kernel import symbols
from ctrace.lab import Lab
from ctrace.view.report.cost_change import load


def bin_of(ns: int) -> int:
    """The kernel side's arithmetic (bpf/perf.c), in Python."""
    exponent = ns.bit_length() - 1 if ns else 0
    if exponent >= 32:
        return BINS - 1
    return exponent * 4 if exponent < 2 else exponent * 4 + (ns >> (exponent - 2) & 3)


@given(st.lists(st.integers(4, 1 << 31), min_size=1, max_size=300), st.floats(0.01, 1))
def test_a_quantile_is_within_its_stated_error(values: list[int], q: float) -> None:
    counts = np.bincount([bin_of(v) for v in values], minlength=BINS).astype(np.uint64)
    exact = sorted(values)[max(0, int(np.ceil(q * len(values))) - 1)]
    assert abs(model.quantile(counts, q) - exact) <= RELATIVE_ERROR * exact + 1


@given(st.lists(st.integers(4, 1 << 31), min_size=1, max_size=300))
def test_the_mean_is_within_a_bins_half_width(values: list[int]) -> None:
    counts = np.bincount([bin_of(v) for v in values], minlength=BINS).astype(np.uint64)
    assert abs(model.mean(counts) - np.mean(values)) <= RELATIVE_ERROR * np.mean(values) + 1


def test_shares_count_each_sample_once() -> None:
    names = {1: "nf_conntrack_in", 2: "nf_hook_slow", 3: "default_idle", 4: "early_drop"}
    seen = [Stack((1, 2), 10), Stack((4, 1, 2), 5), Stack((2,), 25), Stack((3,), 50), Stack((), 10)]
    total, share, busy, hot = model.cpu(seen, names.__getitem__, lambda at: at in (1, 4))
    assert (total, share, busy) == (100, 0.15, 0.5)
    assert [(row.function, row.share) for row in hot] == [
        ("nf_conntrack_in", 0.1),
        ("early_drop", 0.05),
    ]
    assert model.folded(seen, names.__getitem__)[-1] == "nf_hook_slow;nf_conntrack_in;early_drop 5"


def test_spinning_counts_for_whose_lock_it_is() -> None:
    names = {1: "native_queued_spin_lock_slowpath", 2: "_raw_spin_lock_bh", 3: "nf_conntrack_lock",
             4: "__dev_queue_xmit"}  # fmt: skip
    seen = [Stack((1, 2, 3), 30), Stack((1, 2, 4, 3), 40), Stack((2, 3), 20), Stack((1,), 10)]
    assert model.waiting_share(seen, names.__getitem__, lambda at: at == 3) == 0.3
    assert model.who_waits((1, 2, 4, 3), names.__getitem__) == (4, 3)


def test_even_hashing_gives_poisson_chains() -> None:
    rng = np.random.default_rng(1)
    lengths = np.bincount(rng.integers(0, 1000, 4000), minlength=1000)
    row = model.hash_table("x", 2000, 1000, {})
    assert row.load == 4.0
    assert abs(row.chain_p99 - np.quantile(lengths, 0.99)) <= 1


def test_nothing_measured_is_no_number() -> None:
    empty = Times(
        np.zeros((len(POINTS), len(PROTOCOLS), BINS), np.uint64),
        np.zeros(0, np.uint32),
        np.zeros((0, 2), np.uint64),
    )
    assert model.latencies(empty) == (None, ())
    assert model.cpu([], str, bool) == (0, None, None, ())


@pytest.mark.kernel
def test_cpu_share_agrees_with_perf(tmp_path: Path) -> None:
    # The two do not sample the same instants: on a busy machine one round may differ.
    for _ in range(3):
        ours, theirs = shares(tmp_path)
        # The load must have made conntrack visible beside whatever else the machine does.
        if theirs > 0.01 and ours == pytest.approx(theirs, rel=0.10):
            return
    pytest.fail(f"ctrace says {ours:.3f}, perf {theirs:.3f}")


def shares(tmp_path: Path) -> tuple[float, float]:
    """Conntrack's share of CPU under load: by our sampler, and by perf at the same time."""
    perf = next(iter(sorted(Path("/usr/bin").glob("perf_*"))), None) or shutil.which("perf")
    assert perf, "install Debian's linux-perf"
    names = symbols.kernel()
    with Lab() as lab:
        a, b = lab.namespace("a", track=True), lab.namespace("b", track=True)
        lab.link(a, b)
        code = (
            "import socket,sys\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
            "s.connect((sys.argv[1],9))\n"
            "while True:\n try:\n  s.send(b'x')\n except OSError: pass\n"
        )
        sink = b.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sink.bind(("", 9))
        load = [a.start([sys.executable, "-c", code, b.addresses["a"][0]]) for _ in range(2)]
        objects = Objects()
        data = tmp_path / "perf.data"
        try:
            time.sleep(0.5)
            ready = tmp_path / "ready"  # perf starts its command when it samples
            ready.unlink(missing_ok=True)
            recording = subprocess.Popen(
                [perf, "record", "-q", "-e", "cpu-clock", "-F", "1999", "-a", "-g",
                 "-k", "CLOCK_MONOTONIC", "-o", data, "sh", "-c", f"touch {ready}; exec sleep 600"]
            )  # fmt: skip
            while not ready.exists():
                assert recording.poll() is None
                time.sleep(0.1)
            with Sampler(objects, 1999):
                began = time.monotonic()
                time.sleep(5)
                ended = time.monotonic()
            recording.send_signal(signal.SIGINT)
            recording.wait()
            ours = model.cpu(stacks(objects)[0], names.name, names.is_conntrack)
        finally:
            for process in load:
                process.kill()
                process.wait()
            objects.close()
            sink.close()
    script = subprocess.run(
        [perf, "script", "-i", data, "-F", "time,ip,sym"], check=True, capture_output=True,
        text=True,
    ).stdout  # fmt: skip
    samples = [chunk.strip("\n").split("\n") for chunk in script.split("\n\n") if chunk.strip()]
    samples = [lines for lines in samples if began <= float(lines[0].strip(" :")) <= ended]
    inside = sum(
        any(symbols.CONNTRACK.match(line.split()[1]) for line in lines[1:] if len(line.split()) > 1)
        for lines in samples
    )
    assert ours[1] is not None
    return ours[1], inside / len(samples)


@pytest.mark.kernel
def test_the_command_prints_one_object_and_flame_graph_lines(tmp_path: Path) -> None:
    folded = tmp_path / "stacks"
    answer = json.loads(said("perf", "--duration", "1", "-o", "json", "--folded", folded))
    assert answer["samples"] > 50
    assert answer["family"] in ("fentry", "netfilter")
    lines = folded.read_text().splitlines()
    assert lines
    assert all(re.fullmatch(r"\S.* \d+", line) for line in lines)


@pytest.mark.kernel
def test_a_change_is_told_against_an_earlier_answer(tmp_path: Path) -> None:
    earlier = tmp_path / "before.json"
    perf = ("perf", "--duration", "1")
    earlier.write_text(said(*perf, "-o", "json"))
    answer = json.loads(said(*perf, "-o", "json", "--against", earlier))
    before = json.loads(earlier.read_text())
    share = answer["changes"][0]
    assert share["what"] == "conntrack's share of CPU time"
    assert share["before"] == pytest.approx(100 * before["cpu_share"])
    assert share["after"] == pytest.approx(100 * answer["cpu_share"])
    assert "Before and after" in said(*perf, "--against", earlier)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"latencies": [1]}', '{"latencies": []}', "[" * 9999]
)
def test_what_is_no_earlier_answer_is_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(CtraceError, match="is not a measurement"):
        load(str(path))
    with pytest.raises(CtraceError, match="cannot read"):
        load(str(tmp_path / "none"))


@pytest.mark.kernel
def test_without_type_information_the_tables_are_told_and_the_rest_is_named() -> None:
    command = shlex.join([sys.executable, "-m", "ctrace", "perf", "--duration", "1", "-o", "json"])
    with Lab() as lab:
        a = lab.namespace("a", track=True)
        with a.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", ("127.0.0.1", 9))
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-ec",
             f"mount -t tmpfs none /sys/kernel/btf; exec {command}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        name = f"netns:{a.inum}"
    answer = json.loads(done.stdout)
    assert any("no BTF" in sentence for sentence in answer["blind"])
    assert (answer["family"], answer["cpu_share"], answer["latencies"]) == ("", None, [])
    assert [row["count"] for row in answer["tables"] if row["netns"] == name] == [1]
