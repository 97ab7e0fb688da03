"""``ctrace top`` and the demo in real terminals, pipes and under real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kit.running.terminal import CTRACE, environment, terminal
from kit.traffic import udp_flows

from ctrace.lab import Lab

pytestmark = pytest.mark.kernel
HERE = ("--netns", "/proc/self/ns/net")
"""Other tests' tables may be large and full meanwhile."""
HASTY = [
    sys.executable,
    "-c",
    "import ctrace.demo.director as it; it.PACE = 0.4; from ctrace.cli import main; main()",
]
"""ctrace, with a demo that leaves nobody the time to read it."""
LIMIT = "/proc/sys/net/netfilter/nf_conntrack_max"


@pytest.mark.parametrize("how", ["q", "ctrl-c", "SIGTERM"])
def test_however_it_ends_the_terminal_is_sane(how: str) -> None:
    with terminal("top", *HERE) as one:
        one.until(b"CULPRITS")
        if how == "q":
            os.write(one.master, b"q")
        elif how == "ctrl-c":
            os.write(one.master, b"\x03")
        else:
            one.process.send_signal(getattr(signal, how))
        assert one.end() in (0, 143)
        assert one.settings() == one.before
        assert b"\x1b[?1049h" in one.said
        assert one.said.rindex(b"\x1b[?1049l") > one.said.rindex(b"\x1b[?1049h")
        assert b"Traceback" not in one.said


ENDED_BY_A_SIGNAL = """
import sys
from ctrace.live.protocol import Phase
from ctrace.view.screen.app import TopApp

class Feed:
    phase, looks = Phase(), 0
    def set_view(self, *view): pass
    def set_rows(self, rows): pass
    def latest(self):
        self.looks += 1
        if self.looks == 3:
            sys.exit(129)  # as the handler of a signal does

TopApp(Feed()).run()
"""


def test_a_signal_that_ends_the_loop_ends_the_process() -> None:
    """The library's input thread kept the process, and read a terminal that was gone, for ever."""
    with terminal(program=[sys.executable, "-c", ENDED_BY_A_SIGNAL]) as one:
        assert one.end() == 129
        assert one.settings() == one.before


WRITES_TO_NO_TERMINAL = """
import os
from ctrace.live.protocol import Phase
from ctrace.view.screen.app import TopApp

class Feed:
    phase, looks = Phase(), 0
    def set_view(self, *view): pass
    def set_rows(self, rows): pass
    def latest(self):
        self.looks += 1
        if self.looks == 3:
            os.dup2(os.open("/dev/full", os.O_WRONLY), 2)  # refuses, as a terminal that is gone
        if self.looks > 3:
            for _ in range(40):  # more than the library's queue takes
                app._driver.write("x")

app = TopApp(Feed())
app.run()
"""


def test_a_terminal_that_went_holds_nothing_up() -> None:
    """The library's thread of output ended, and the screen waited for it for ever. No signal comes
    where the terminal is not the one that controls the process: the refused write tells."""
    with terminal(program=[sys.executable, "-c", WRITES_TO_NO_TERMINAL]) as one:
        assert one.end() == 0


def test_a_screen_of_a_terminal_without_colours_or_unicode() -> None:
    with terminal("top", *HERE, LANG="C", LC_ALL="C", NO_COLOR="1") as one:
        one.until(b"CULPRITS")
        one.read(1.0)
        os.write(one.master, b"q")
        one.end()
        shown = one.said.decode("ascii")
        colours = re.findall(r"\x1b\[[0-9;]*m", shown)
        assert colours
        numbers = {part for code in colours for part in code[2:-1].split(";") if part}
        # Bold, dim, underline, reverse and the terminal's own (39, 49): no colour at all.
        assert not {n for n in numbers if 30 <= int(n) <= 38 or 40 <= int(n) <= 48 or int(n) >= 90}


def test_a_dumb_terminal_gets_plain_frames() -> None:
    with terminal("top", "0.3", "2", *HERE, TERM="dumb") as one:
        assert one.end(60) == 0
        assert one.said.count(b"CULPRITS") == 2
        assert b"\x1b" not in one.said


def test_one_answer_as_json() -> None:
    with Lab() as lab:
        here, there = lab.namespace("here", track=True), lab.namespace("there")
        _, target = lab.link(here, there)
        top = subprocess.Popen(
            [*CTRACE, "top", "6", "--group", "service", "--once", "-o", "json", "-p", "udp",
             "--netns", str(here.inum)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        while top.poll() is None:
            udp_flows(here, (target, 8125), 60, first_port=20_000 + int(time.time() * 60) % 30_000)
            time.sleep(0.2)
        out, error = top.communicate()
        assert top.returncode == 0, error
        shown = json.loads(out)
    assert shown["hooks"]["family"]
    assert shown["interval_s"] > 5.5  # longer on a host that is busy
    (table,) = shown["tables"]
    assert table["seconds_to_full"] is None  # its entries stay for 30 s: it never fills
    if shown["hooks"]["family"] != "netlink":
        assert (table["pinned"], table["pinned_error"] > 0) == (0, True)
    assert shown["filter"] == f"proto=udp netns={here.inum}"
    busy = [one for one in shown["culprits"] if one["key"] == "udp/8125"]
    assert busy
    assert busy[0]["inserts"] >= 20
    assert {one["proto"] for one in shown["culprits"]} == {"udp"}


def test_a_reader_that_stalls_costs_frames_not_events() -> None:
    with Lab() as lab:
        here, there = lab.namespace("here", track=True), lab.namespace("there")
        _, target = lab.link(here, there)
        top = subprocess.Popen(
            [*CTRACE, "top", "0.1", "-o", "json", "-p", "udp", "--netns", str(here.inum)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        assert top.stdout is not None
        first = json.loads(top.stdout.readline())
        for turn in range(20):  # nobody reads: the pipe is full long before the end
            udp_flows(here, (target, 8125), 500, first_port=10_000 + turn * 500)
            time.sleep(0.3)
        frames, shown = 0, first
        while shown["totals"]["insert"] < 10_000 and frames < 200:
            shown = json.loads(top.stdout.readline())
            frames += 1
        top.terminate()
        top.communicate()
    assert shown["lost"] == 0
    assert sum(one["inserts"] for one in shown["culprits"]) >= 10_000
    assert frames < (shown["uptime_s"] - first["uptime_s"]) / 0.1


def test_a_closed_pipe_ends_it_quietly() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{' '.join(CTRACE)} top 0.2 {' '.join(HERE)} | head -1"],
        capture_output=True, env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert b"ctrace top" in done.stdout
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        (["top", "--group", "nonsense"], b"nonsense", 2),
        (["top", "-p", "nonsense"], b"unknown protocol", 2),
        (["top", "-4", "-6"], b"no flow can match both", 2),
        (["top", "--netns", "nowhere-at-all"], b"nowhere-at-all", 2),
        (["top", "--memory", "lots"], b"is not a size", 2),
        (["top", "--hooks", "magic"], b"'magic' is not one of", 2),
        (["top", "0"], b"0", 2),
        (["demo", "--lower-max", "1"], b"at least 512", 2),
        (["demo", "--lower-max", "99999999"], b"not below", 2),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], said: bytes, status: int) -> None:
    done = subprocess.run(
        [*CTRACE, *arguments], capture_output=True, env=environment(), timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert b"Traceback" not in done.stderr


def test_without_root_one_line_says_so() -> None:
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--clear-groups", "--inh-caps=-all",
         *CTRACE, "top", "--once"],
        capture_output=True, env=environment(HOME="/"), timeout=60, check=False,
    )  # fmt: skip
    if b"No module named" in done.stderr or b"Permission denied" in done.stderr:
        pytest.skip("another user cannot read this checkout")
    assert done.returncode == 1
    assert b"root" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_lowered_limit_is_put_back_also_after_sigkill(tmp_path: Path) -> None:
    """On a file in the limit's place: the host's own stays as it is."""
    file = tmp_path / "max"
    file.write_text("262144\n")
    lower = (
        "import os, signal, sys, ctrace.demo.limit as limit\n"
        "limit.FILE, limit.find = sys.argv[1], list\n"
        "kept = limit.LoweredLimit(8192)\n"
        "print(open(sys.argv[1]).read(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", lower, str(file)], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.strip() == b"8192"
    deadline = time.monotonic() + 60
    while file.read_text().strip() != "262144":
        assert time.monotonic() < deadline, "the limit was not put back"
        time.sleep(0.05)


@contextmanager
def nothing_left() -> Iterator[None]:
    """The host's limit and rules are afterwards what they were before."""

    def state() -> tuple[str, str]:
        with open(LIMIT) as file:
            limit = file.read()
        rules = subprocess.run(
            ["nft", "-s", "list", "ruleset"], capture_output=True, text=True, check=True
        )
        return limit, rules.stdout

    before = state()
    yield
    deadline = time.monotonic() + 60
    while (after := state()) != before:
        assert time.monotonic() < deadline, (before, after)
        time.sleep(0.2)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_demo_that_is_broken_off_leaves_nothing(how: str) -> None:
    """Its namespaces, processes and rules vanish by themselves, also after SIGKILL."""
    with nothing_left():
        demo = subprocess.Popen(
            [*HASTY, "demo", "--auto", "--plain"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        assert demo.stdout is not None
        told = b""
        while b"Traffic is switched over" not in told:
            line = demo.stdout.readline()
            assert line, told
            told += line
        children = descendants(demo.pid)
        assert len(children) >= 6
        demo.send_signal(signal.Signals[how])
        said = demo.communicate(timeout=60)[1]
        assert demo.returncode == {"SIGKILL": -signal.SIGKILL, "SIGINT": 130, "SIGTERM": 143}[how]
        assert b"Traceback" not in said
        deadline = time.monotonic() + 60
        while any(alive(pid) for pid in children):
            assert time.monotonic() < deadline, "processes of the demo are left"
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.machine
@pytest.mark.timeout(900)  # it takes its own time, and the longer the busier the host
@pytest.mark.usefixtures("few_places")
def test_two_demos_play_themselves_through(tmp_path: Path) -> None:
    """The table fills, ctrace names who, its advice is applied, the fill falls, all recover: in
    plain text and, beside it, page for page on the screen."""
    said = tmp_path / "said"
    with nothing_left(), said.open("w") as out:
        plain = subprocess.Popen(
            [*HASTY, "demo", "--auto", "--plain", "--ascii"],
            stdout=out, stderr=subprocess.STDOUT, env=environment(),
        )  # fmt: skip
        try:
            _demo_on_the_screen()
            status = plain.wait(timeout=600)
        finally:
            if plain.poll() is None:
                plain.terminate()
                plain.wait(timeout=60)
        assert status == 0, said.read_text()
    _check_what_a_demo_told(said.read_text())


def _demo_on_the_screen() -> None:
    with terminal("demo", "--auto", program=HASTY, size=(120, 40)) as one:
        one.until(b"Traffic is switched over", 300)
        one.until(b"FULL", 300)
        one.until(b"VERDICT", 300)
        one.until(b"Applied in the demo", 300)
        one.until(b"refusals last second", 300)
        assert one.end(300) == 0
        assert one.settings() == one.before
        assert b"Traceback" not in one.said
        assert b"\\x1b" not in one.said  # an escape sequence shown as letters
        left = one.said[one.said.rindex(b"\x1b[?1049l") :]  # what is read when the screen has gone
        for told in (b"The table is full", b"Applied in the demo", b"Fill ", b"Everything of"):
            assert told in left


def _check_what_a_demo_told(text: str) -> None:
    turns = [part.split("\n", 1) for part in text.split("\n== ")[1:]]
    told = [turn[0] for turn in turns]
    order = [
        "A new host", "Traffic is switched over", "The table is full", "What helps?",
        "Applied in the demo's namespace", "Fill ", "Everything of this demo is gone",
    ]  # fmt: skip
    at = [next(i for i, text in enumerate(told) if text.startswith(begin)) for begin in order]
    assert at == sorted(at)
    refused = re.search(r"(\d+)x 'sendto: operation not permitted'", text)
    assert refused
    assert int(refused[1]) > 0
    full = next(turn[1] for turn in turns if turn[0].startswith("The table is full") and turn[1])
    assert "FULL" in full
    assert "tcp/8063" in full.split("CULPRITS")[1].splitlines()[1]
    assert "tcp/8063" in full.split("WHY")[1].splitlines()[0]
    recovered = re.search(r"Fill (\S+) %, (\d+) refusals last second, (\d+) conn", told[at[5]])
    assert recovered, told[at[5]]
    assert float(recovered[1]) < 50
    assert int(recovered[2]) == 0
    assert int(recovered[3]) > 50


def test_what_is_typed_at_once_goes_where_it_was_meant(tmp_path: Path) -> None:
    """A pasted filter is a filter: not one letter of it is a command."""
    with terminal("top", *HERE, "--hooks", "netlink", "--group", "service", size=(120, 40)) as one:
        one.until(b"CULPRITS")
        before = os.listdir()
        os.write(one.master, b"/dport=53130\r")
        one.until(b"ns/net dport=53130")
        os.write(one.master, b"/quarrel")
        one.read(1.0)
        os.write(one.master, b"\x03")
        assert one.end() == 0
        assert "recording" not in one.said.decode()
        assert os.listdir() == before


def test_what_is_awaited_and_what_is_missing_stands_on_the_screen() -> None:
    with terminal("top", *HERE, "--hooks", "netlink", size=(120, 40)) as one:
        one.until(b"UNSEEN")
        assert one.said.index(b"\x1b[?1049h") < one.said.index(b"UNSEEN")
        os.write(one.master, b"q")
        assert one.end() == 0


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            with open(f"/proc/{pid}/task/{task}/children") as file:
                children = [int(word) for word in file.read().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
