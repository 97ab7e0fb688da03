"""A living table, imported from what the kernel and conntrack(8) print of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ctrace.cli import cli
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
TRANSLATES = """
table ip t {
    chain o { type nat hook output priority -100; udp dport 7001 dnat to 127.0.0.2:53; }
    chain p { type nat hook postrouting priority 100; udp dport 7002 snat to 127.0.0.9:4077; }
}
"""
LABELS = "table ip l { chain o { type filter hook output priority 0; ct label set 3; }; }"
SENDS = """
import socket
for port in (7001, 7002):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        one.sendto(b"", ("127.0.0.1", port))
"""
"""One entry with its destination and one with its source translated, by the kernel."""
STATES = ("SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK",
          "TIME_WAIT", "CLOSE")  # fmt: skip
SCTP = ("NONE", "CLOSED", "COOKIE_WAIT", "COOKIE_ECHOED", "ESTABLISHED", "SHUTDOWN_SENT",
        "SHUTDOWN_RECD", "SHUTDOWN_ACK_SENT")  # fmt: skip
"""All but those of heartbeats, which conntrack(8) 1.4.7 falls over."""
DCCP = ("REQUEST", "RESPOND", "PARTOPEN", "OPEN", "CLOSEREQ", "CLOSING", "TIMEWAIT")
NAMED = (
    "mount -t tmpfs none /etc && mkdir /etc/xtables && "
    "printf '3 three\\n5 five words\\n' >/etc/xtables/connlabel.conf && exec "
)
"""conntrack(8) shows only labels that a file names: one in a mount namespace of its own."""


def labelled(command: str) -> list[str]:
    """The command, where labels have names."""
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", NAMED + command]


FORMS = {
    "list": ["conntrack", "-L"],
    "extended": ["conntrack", "-L", "-o", "extended,id,timestamp"],
    "every word": labelled("conntrack -L -o extended,id,timestamp,ktimestamp,labels,userspace"),
    "labels": labelled("conntrack -L -o labels"),
    "labels in xml": labelled("conntrack -L -o xml,labels"),
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
    """Entries of every kind that conntrack(8) can make, with counters, times and labels."""
    for name in ("acct", "timestamp"):
        node.sysctl(f"net.netfilter.nf_conntrack_{name}", 1)
    node.run(["nft", LABELS])
    for address in ("192.0.2.1/32", "2001:db8::1/128"):
        node.run(["ip", "addr", "add", address, "dev", "lo"])

    def entry(*argv: object, anew: bool = True) -> None:
        words = [word for one in argv for word in str(one).split()]
        node.run(["conntrack", "-I", *words, "-t", "900"], check=anew)

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
    for i, state in enumerate(SCTP):
        for way in (four, six):
            entry(way, "-p sctp --orig-port-src", 5 + i, "--orig-port-dst 6 --state", state,
                  "--orig-vtag 1 --reply-vtag 2")  # fmt: skip
    entry(four, "-p gre --orig-key-src 5 --orig-key-dst 300")
    entry(six, "-p gre --orig-key-src 5 --orig-key-dst 300", seen)
    for i, state in enumerate(DCCP):  # a kernel without DCCP knows no ports of it: they are one
        entry(four, "-p dccp --sport", 5 + i, "--dport 6 --role client --state", state, anew=i == 0)
    entry(four, "-p 89")
    node.run(labelled("conntrack -I -s 198.51.100.8 -d 192.0.2.1 -p udp --sport 7 --dport 53 "
                      "-t 900 --label-add 'three,five words'"))  # fmt: skip
    node.sysctl("net.netfilter.nf_conntrack_udp_timeout", 900)
    node.run(["nft", TRANSLATES])
    node.run([sys.executable, "-c", SENDS])


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
    text = node.run(FORMS[form])
    assert ("packets" in text, "five words" in text) == (True, "unshare" in FORMS[form])
    path.write_text(text)
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
    mine, its = (ordered(one, "xml" not in form) for one in (existing, kernel))
    for name in SAME:
        assert np.array_equal(mine[name], its[name]), name
    assert sorted(mine["status"]) == sorted(both)
    assert said["src_nat"] == said["dst_nat"] == 1


LATER = 300
"""Seconds by which a dump may come after what it is compared with."""
SETTINGS = "/proc/sys/net/netfilter/nf_conntrack_"
WHEN = ("first_seen", "trend", "netns", "netns_name", "table_seconds")
"""What is about the time and place of looking, not about what the table holds."""


UNTOLD = ("SRC_NAT_DONE", "DST_NAT_DONE")
"""No tool prints that the kernel has looked for rules of translation."""


def shown(data: dict[str, Any], form: str) -> dict[str, Any]:
    """What a view's JSON says of the table and of those that hold it."""

    def plain(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: plain(one, key) for key, one in value.items() if key not in WHEN}
        if isinstance(value, list):
            return [plain(one) for one in value if one not in UNTOLD]
        return value

    (table,) = data["tables"]
    told = ("count", "max", "buckets", "fill", "load", "hashed", "composition")
    keys = {one["key"]: plain(one) for one in data["culprits"]}
    for one in keys.values():  # of several any may be shown; XML has no numbers of ICMP
        if one["held"] > 1 or ("xml" in form and one["proto"] == "icmp"):
            one["samples"] = []
    return {
        "held": data["held_total"],
        "table": plain({name: table[name] for name in told}),
        **keys,
    }


@pytest.mark.parametrize("group", ["pair", "service"])
def test_what_is_imported_is_what_top_says(node: Node, tmp_path: Path, group: str) -> None:
    said = node.run([sys.executable, "-m", "ctrace", "top", "1", "--once", "--format", "json",
                     "--hooks", "netlink", "--netns", node.path, "--group", group])  # fmt: skip
    around = node.run(["ip", "addr"]) + "".join(
        f"nf_conntrack_{name} = {node.run(['cat', SETTINGS + name])}"
        for name in ("max", "count", "buckets")
    )
    for form, argv in FORMS.items():
        path = tmp_path / f"{form}.txt"
        path.write_text(around + node.run(argv))
        done = CliRunner().invoke(
            cli, ["replay", str(path), "--once", "--format", "json", "--group", group]
        )
        mine, top = shown(json.loads(done.stdout), form), shown(json.loads(said), form)
        assert len(top) > 4
        for name in top | mine:
            assert absent(mine.get(name), top.get(name)) == top.get(name), (form, name)


def absent(mine: Any, top: Any) -> Any:
    """What dumps say, with what they cannot know taken from ``top``: they have null there."""
    if isinstance(mine, dict) and isinstance(top, dict):
        unread = top.get("left_n") == 0  # on a busy machine it ends before it has looked
        return {
            name: top[name]
            if name.startswith(("left_", "other_timeout"))
            and (unread or (None not in (one, top[name]) and 0 <= top[name] - one < LATER))
            else absent(one, top.get(name))
            for name, one in mine.items()
        }
    return top if mine is None else mine


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
