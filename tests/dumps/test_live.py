"""A living table, imported from what the kernel and conntrack(8) print of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ctrace.dumps.opened import open_any
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink
from ctrace.lab import Lab, Node
from ctrace.record import RECORD, Events, Kind, Status, join
from ctrace.recording.format.evidence import parse

pytestmark = pytest.mark.kernel
SAME = ("src", "dst", "reply_src", "reply_dst", "sport", "dport", "reply_sport", "reply_dport",
        "proto", "family", "zone", "state")  # fmt: skip
STATUS = int(Status.SEEN_REPLY | Status.ASSURED | Status.SRC_NAT | Status.DST_NAT)
STATES = ("SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK",
          "TIME_WAIT", "CLOSE")  # fmt: skip
FORMS = {
    "list": ["conntrack", "-L"],
    "extended": ["conntrack", "-L", "-o", "extended,id,timestamp"],
    "every word": ["conntrack", "-L", "-o", "extended,id,timestamp,ktimestamp,labels,userspace"],
    "labels": ["conntrack", "-L", "-o", "labels"],
    "proc": ["cat", "/proc/thread-self/net/nf_conntrack"],
    "xml": ["conntrack", "-L", "-o", "xml"],
}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Lab() as lab:
        one = lab.namespace("dumped", track=True)
        make(one)
        yield one


def make(node: Node) -> None:
    """Entries of every kind that conntrack(8) can make."""

    def entry(*argv: object) -> None:
        words = [word for one in argv for word in str(one).split()]
        node.run(["conntrack", "-I", *words, "-t", "900"])

    for i, state in enumerate(STATES):
        status = "SEEN_REPLY,ASSURED" if i > 1 else "SEEN_REPLY"
        for source, target in (("198.51.100.7", "192.0.2.1"), ("2001:db8::7", "2001:db8::1")):
            entry("-s", source, "-d", target, "-p", "tcp", "--sport", 1000 + i, "--dport", 8063,
                  "--state", state, "-u", status, "-m", i * 7)  # fmt: skip
    four, six = "-s 198.51.100.8 -d 192.0.2.1", "-s 2001:db8::8 -d 2001:db8::1"
    seen = "-u SEEN_REPLY,ASSURED"
    entry(four, "-p udp --sport 5 --dport 53")
    entry(four, "-p udp --sport 5 --dport 53 -w 9")
    entry(six, "-p udp --sport 5 --dport 53", seen)
    entry(four, "-p icmp --icmp-type 8 --icmp-code 0 --icmp-id 77")
    entry(four, "-p sctp --orig-port-src 5 --orig-port-dst 6 --state ESTABLISHED",
          "--orig-vtag 1 --reply-vtag 2")  # fmt: skip
    entry(four, "-p gre --orig-key-src 5 --orig-key-dst 300")
    entry(four, "-p dccp --sport 5 --dport 6 --state OPEN --role client")
    entry(four, "-p 89")
    entry("-s 10.0.0.9 -d 192.0.2.1 -p tcp --sport 77 --dport 80 --state ESTABLISHED", seen,
          "--reply-src 192.0.2.1 --reply-dst 203.0.113.5 --reply-port-src 80",
          "--reply-port-dst 4077")  # fmt: skip
    entry("-s 198.51.100.9 -d 203.0.113.5 -p tcp --sport 78 --dport 80 --state ESTABLISHED", seen,
          "--reply-src 10.0.0.2 --reply-dst 198.51.100.9 --reply-port-src 8080",
          "--reply-port-dst 78")  # fmt: skip


def ordered(events: Events, icmp: bool = True) -> Events:
    """What is compared, in one order; without what XML does not tell."""
    out: Events = np.zeros(len(events), [(n, RECORD[n]) for n in SAME] + [("status", "<u4")])
    for name in SAME:
        out[name] = events[name]
    out["status"] = events["status"] & STATUS
    if not icmp:
        for name in SAME[4:8]:
            out[name][events["proto"] == 1] = 0
    return np.sort(out, order=[n for n in SAME if RECORD[n].subdtype is None])


@pytest.mark.parametrize("form", FORMS)
def test_each_form_tells_what_the_kernel_does(node: Node, tmp_path: Path, form: str) -> None:
    path = tmp_path / "dump.txt"
    path.write_text(node.run(FORMS[form]))
    table = ctnetlink.read_table(node.path)
    kernel = table.events
    both = kernel["status"] & STATUS
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        events = join([batch.events for batch in recording.batches()])
        said = parse(recording.header.facts)
    existing = events[events["kind"] == Kind.EXISTING]
    assert said is not None
    assert said["not_understood"] == 0
    assert len(existing) == len(kernel) == said["entries"]
    # conntrack -I sets no NAT bits where nothing was translated by a rule; tuples tell.
    mine, its = ordered(existing, form != "xml"), ordered(kernel, form != "xml")
    for name in SAME:
        assert np.array_equal(mine[name], its[name]), name
    seen = int(Status.SEEN_REPLY | Status.ASSURED)
    assert sorted(mine["status"] & seen) == sorted(both & seen)
    assert said["src_nat"] == said["dst_nat"] == 1


@pytest.mark.parametrize("words", ["timestamp", "extended,id,timestamp,ktimestamp,labels"])
def test_events_tell_each_birth_and_end(tmp_path: Path, words: str) -> None:
    path = tmp_path / "events.txt"

    def seen(word: str) -> int:
        return path.read_text().count(word)

    with Lab() as lab, path.open("w") as file:
        one = lab.namespace("told", track=True)
        listening = one.start(["stdbuf", "-oL", "conntrack", "-E", "-o", words], stdout=file)
        until = time.monotonic() + 60
        common = ["-s", "192.0.2.9", "-d", "192.0.2.1", "-p", "udp", "--sport", "9"]
        while not seen("dport=9 ") and time.monotonic() < until:  # until it listens
            one.run(["conntrack", "-I", *common, "--dport", "9", "-t", "90"], check=False)
            one.run(["conntrack", "-D", *common, "--dport", "9"], check=False)
        for port in range(5000, 5010):
            one.run(["conntrack", "-I", *common, "--dport", str(port), "-t", "90"])
        one.run(["conntrack", "-D", "-p", "udp", "--sport", "9"])
        while seen(" dport=50") < 20 and time.monotonic() < until:  # births and ends
            time.sleep(0.01)
        listening.terminate()
        listening.wait()
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        events = join([batch.events for batch in recording.batches()])
        said = parse(recording.header.facts)
    assert said is not None
    assert said["not_understood"] == 0
    mine = events[(events["dport"] >= 5000) & (events["proto"] == 17)]
    for kind in (Kind.INSERT, Kind.DESTROY):
        ports = mine["dport"][mine["kind"] == kind]
        assert sorted(ports.tolist()) == list(range(5000, 5010)), kind


HELPED = """
import socket, subprocess, sys
server = socket.create_server(("127.0.0.1", 21))
client = socket.create_connection(("127.0.0.1", 21))
control, _ = server.accept()
control.send(b"220 here\\r\\n"), client.recv(99)
client.send(b"PASV\\r\\n"), control.recv(99)
control.send(b"227 Entering Passive Mode (127,0,0,1,31,144)\\r\\n"), client.recv(99)
if "data" in sys.argv:
    data = socket.create_server(("127.0.0.1", 31 * 256 + 144))
    other = socket.create_connection(("127.0.0.1", 31 * 256 + 144))
for command in ("conntrack -L -o extended", "conntrack -L -o xml", "conntrack -L expect",
                "conntrack -L expect -o xml", "cat /proc/net/nf_conntrack_expect"):
    print("root@ftp:~# " + command)
    print(subprocess.run(command.split(), stdout=subprocess.PIPE, text=True, check=True).stdout)
"""
"""An FTP client that is told to connect for data, and what tools print then."""


def test_helpers_and_what_they_expect(tmp_path: Path) -> None:
    with Lab() as lab:
        one = lab.namespace("helped", track=True)
        rules = (
            'table ip h { ct helper f { type "ftp" protocol tcp; }; chain o { type filter hook '
            'output priority 0; tcp dport 21 ct helper set "f"; }; }'
        )
        try:
            one.run(["nft", rules])
        except CtraceError:
            pytest.skip("this kernel has no FTP helper")
        path = tmp_path / "helped.txt"
        path.write_text(one.run([sys.executable, "-c", HELPED]))
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        said = parse(recording.header.facts)
    assert said is not None
    assert said["not_understood"] == 0
    assert said["expectations"] == 3  # one, as three listings show it
    assert said["helped"] == 1


def test_rates_and_stays_come_from_two_dumps(tmp_path: Path) -> None:
    """The time between two dumps is what their timeouts went down by."""
    with Lab() as lab:
        one = lab.namespace("two", track=True)
        one.run(["conntrack", "-I", "-s", "192.0.2.9", "-d", "192.0.2.1", "-p", "tcp", "--sport",
                 "9", "--dport", "80", "--state", "TIME_WAIT", "-t", "100"])  # fmt: skip
        for i in range(40):
            one.run(["conntrack", "-I", "-s", "192.0.2.7", "-d", "192.0.2.1", "-p", "udp",
                     "--sport", str(100 + i), "--dport", "53", "-t", "300"])  # fmt: skip
        first = sorted(one.run(FORMS["proc"]).splitlines())
    later = []
    for text in first:
        left = next(word for word in text.split()[3:6] if word.isdigit() and int(word) > 20)
        later.append(text.replace("192.0.2.7", "192.0.2.8").replace(left, str(int(left) - 10), 1))
    path = tmp_path / "loop.txt"
    path.write_text("\n".join(first + later) + "\n")
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        events = join([batch.events for batch in recording.batches()])
        said = parse(recording.header.facts)
        hooks = recording.hooks
    kinds = np.bincount(events["kind"], minlength=8)
    assert kinds[Kind.EXISTING] == 41
    assert kinds[Kind.INSERT] == kinds[Kind.DESTROY] == 40
    assert said is not None
    assert [one["apart"] for one in said["dumps"]] == [None, 10.0]
    assert said["dumps"][0]["known_by"] == "countdown"
    assert hooks.changes
    assert not hooks.refusals
