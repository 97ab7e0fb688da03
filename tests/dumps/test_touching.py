"""Dumps that nothing separates, as a loop leaves them, and streams that come bit by bit."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import zstandard
from click.testing import CliRunner

from ctrace.cli import cli
from ctrace.dumps.opened import open_any
from ctrace.record import Kind, join
from ctrace.recording.format.evidence import parse

EVERY = 5
"""Seconds between two dumps of the loop."""
PACKERS: list[Callable[[bytes], bytes]] = [
    bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.compress,
]  # fmt: skip


def line(client: int, left: int, dport: int = 443) -> bytes:
    return (
        f"ipv4     2 tcp      6 {left} TIME_WAIT src=198.51.100.{client} dst=192.0.2.10 "
        f"sport={4000 + client} dport={dport} src=192.0.2.10 dst=198.51.100.{client} sport={dport} "
        f"dport={4000 + client} [ASSURED] mark=0 zone=0 use=2\n"
    ).encode()


def dumps() -> list[bytes]:
    """Four looks at a table in which one entry ends and one is made between each two."""
    return [
        b"".join(line(client, 119 - EVERY * (at + 10 - client)) for client in range(at, at + 10))
        for at in range(4)
    ]


def told(*paths: str) -> tuple[dict[str, Any], list[int]]:
    """The evidence, and how many records of each kind there are."""
    with open_any(paths) as recording:  # type: ignore[attr-defined]
        said = parse(recording.header.facts)
        events = join([batch.events for batch in recording.batches()])
    assert said is not None
    return said, np.bincount(events["kind"], minlength=len(Kind) + 1).tolist()


@pytest.mark.parametrize("later", [0, 3])
def test_a_line_that_occurs_twice_is_no_second_dump(later: int, tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(line(1, 90) + line(2, 80) + line(3, 70) + line(2, 80 - later))
    said, _ = told(str(path))
    looks = [one["entries"] for one in said["dumps"]]
    assert (said["entries"], looks) == ((1, [3, 1]) if later else (3, [3]))


def check(said: dict[str, Any], kinds: list[int]) -> None:
    assert [(one["entries"], one["apart"]) for one in said["dumps"]] == [
        (10, None), (10, EVERY), (10, EVERY), (10, EVERY)
    ]  # fmt: skip
    assert (kinds[Kind.EXISTING], kinds[Kind.INSERT], kinds[Kind.DESTROY]) == (10, 3, 3)
    assert said["not_understood"] == 0


@contextmanager
def piped(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard input is a pipe into which ``data`` comes in small parts."""
    reader, writer = os.pipe()

    def feed() -> None:
        with os.fdopen(writer, "wb", buffering=0) as file:
            for at in range(0, len(data), 7):
                file.write(data[at : at + 7])

    thread = threading.Thread(target=feed)
    with os.fdopen(reader, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize("pack", PACKERS, ids=["plain", "gzip", "bzip2", "xz", "zstd"])
def test_a_loop_into_one_file_is_as_many_dumps(
    tmp_path: Path, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each dump packed by itself and appended, or all of them in one stream; from a file or a
    pipe."""
    appended, whole = b"".join(map(pack, dumps())), pack(b"".join(dumps()))
    for data in (appended, whole):
        path = tmp_path / "loop"
        path.write_bytes(data)
        check(*told(str(path)))
        with piped(data, monkeypatch):
            check(*told("-"))


def test_dumps_without_the_newline_between_them(tmp_path: Path) -> None:
    """``printf %s "$(cat ...)"`` leaves it out: the line has the last entry and the first."""
    path = tmp_path / "loop"
    path.write_bytes(b"".join(one.rstrip(b"\n") for one in dumps()))
    check(*told(str(path)))
    listed = [b"\n".join(row[len("ipv4     2 ") :] for row in one.splitlines()) for one in dumps()]
    assert listed[0].startswith(b"tcp ")
    path.write_bytes(b"".join(listed))  # as conntrack -L prints it
    check(*told(str(path)))


def test_two_directions_more_in_one_line_are_no_entry(tmp_path: Path) -> None:
    """Where nothing tells the end of the first, neither is taken."""
    path = tmp_path / "odd"
    path.write_bytes(line(1, 9) + line(2, 9).replace(b"\n", b" ") + line(3, 9))
    said, kinds = told(str(path))
    assert (kinds[Kind.EXISTING], said["not_understood"]) == (1, 1)
    assert said["unread"][0][1:] == [2, "more than two directions"]


def test_a_few_that_came_again_in_a_long_walk_are_no_second_dump(tmp_path: Path) -> None:
    """A table of thousands works on while it is listed: some close and open again."""
    many = [line(1 + n % 200, 50, 1000 + n // 200) for n in range(5000)]
    path = tmp_path / "long"
    path.write_bytes(b"".join(many) + line(1, 20, 1000) + b"".join(
        one.replace(b"192.0.2.10", b"192.0.2.11") for one in many[:500]))  # fmt: skip
    said, kinds = told(str(path))
    assert (len(said["dumps"]), said["entries"], kinds[Kind.EXISTING]) == (1, 5500, 5500)


# -- a table of which the texts do not tell all ----------------------------------------


def run(*argv: str, text: bytes) -> str:
    done = CliRunner().invoke(cli, list(argv), input=text)
    assert done.exit_code == 0, (done.output, done.exception)
    return " ".join(done.stdout.split())


COUNT = b"net.netfilter.nf_conntrack_count = 4711\n"
MAX = b"net.netfilter.nf_conntrack_max = 65536\n"


def test_a_count_without_a_maximum_is_a_table_with_its_limit_unknown(tmp_path: Path) -> None:
    for text, count in ((COUNT, 4711), (COUNT + dumps()[0], 4711), (dumps()[0], 10)):
        table = json.loads(run("report", "-", "-o", "json", text=text))["tables"][0]
        assert (table["count"], table["max"], table["fill"]) == (count, None, None)
        assert table["seconds_to_full"] is None
    stored = tmp_path / "count.data"
    run("import", "-", "-o", str(stored), text=COUNT)
    said = run("report", str(stored), text=b"")
    assert "READ 4 711 entries, as it was read" in said
    assert "no limit" not in said
    assert "0 entries" not in said.replace("4 711 entries", "")
    screen = run("replay", "--once", str(stored), text=b"")
    assert "4 711 entries, limit unknown" in screen
    samples = run("export", "--to", "openmetrics", str(stored), text=b"")
    assert " 4711 " in samples
    assert "ctrace_table_max{" not in samples


def test_a_maximum_that_is_none_is_told_as_such() -> None:
    said = run("report", "-", text=COUNT + b"net.netfilter.nf_conntrack_max = 0\n")
    assert "4 711 entries; no maximum is set" in said
    assert "no limit" in said


def test_dumps_without_the_maximum_are_never_healthy() -> None:
    """Nobody knows how near to its limit the table was."""
    said = run("report", "-", text=b"".join(dumps()))
    assert "HEALTHY" not in said
    assert "READ 10 entries, as it was read" in said
    said = run("report", "-", text=b"".join(dumps()) + MAX)
    assert "READ fullest at" in said  # but whether it refused anything is not known
    assert "HEALTHY" not in said


def test_a_count_that_nothing_tells_is_null() -> None:
    data = json.loads(run("report", "-", "-o", "json", text=b"[1.5] nf_conntrack: table full, "
                          b"dropping packet\n"))  # fmt: skip
    assert (data["tables"][0]["count"], data["held_total"]) == (None, None)
    told = json.loads(run("report", "-", "-o", "json", text=COUNT))
    assert (told["tables"][0]["count"], told["held_total"]) == (4711, 0)


def test_events_alone_tell_neither_the_table_nor_refusals() -> None:
    """What was there before them is unknown, and how many conntrack lost."""
    event = line(1, 90).decode().partition("tcp")[2]
    text = (
        f"[1722250923.5]\t[DESTROY] tcp{event}[1722250924.5]\t    [NEW] tcp{event}"
        "WARNING: We have hit ENOBUFS! We are losing events.\n"
    )

    def run(*verb: str) -> str:
        done = CliRunner().invoke(cli, [*verb, "-"], input=text)
        assert done.exit_code == 0, done.exception
        return " ".join(done.stdout.split())

    (table,) = json.loads(run("replay", "--once", "--format", "json"))["tables"]
    assert (table["count"], table["totals"]["insert"]) == (None, 1)
    shown = run("report")
    assert "READ nothing tells how many entries" in shown
    assert "events, at least 1 lost" in shown
    assert "namespace inserted destroyed dump 1 1" in shown
    assert "at least 1 entry" in run("advise")
    assert "then, as counted - - - - -" in run("whatif", "--max", "9")
    samples = [one.rpartition(" ") for one in run("export", "--to", "openmetrics").split("\n")]
    assert len(samples) == len(set(samples))


def test_a_table_that_stays_level_is_not_rising() -> None:
    """As many go as come, between dumps as well."""
    text = b"net.netfilter.nf_conntrack_max = 110\n"
    for look in range(4):
        text += b"Mon Jul 29 11:02:%02d UTC 2024\n" % (look * 5)
        text += b"".join(line(port, 90 - look * 5) for port in range(10 * look, 10 * look + 100))
    assert "RISING" not in run("replay", "--once", "-", text=text)
    (table,) = json.loads(run("replay", "--once", "-o", "json", "-", text=text))["tables"]
    assert (table["rates_per_s"]["insert"], table["rates_per_s"]["destroy"]) == (2.0, 2.0)


def test_a_difference_knows_what_texts_do_not_list(tmp_path: Path) -> None:
    """Of a part of a table neither the sum nor a key's entries; and nobody opened its entries."""
    part, whole, log = (tmp_path / name for name in ("part", "whole", "log"))
    part.write_bytes(line(1, 90) + COUNT)
    whole.write_bytes(line(1, 90) + line(2, 80))
    log.write_bytes(b"[1.5] nf_conntrack: table full, dropping packet\n")
    for before, held, key in ((part, 4711, None), (log, None, None), (whole, 2, 2)):
        data = json.loads(run("diff", str(before), str(whole), "-o", "json", text=b""))
        assert (data["before"]["held"], data["after"]["held"]) == (held, 2)
        assert [one["before"]["held"] for one in data["changes"]] == [key]
    rows = run("export", "--to", "jsonl", str(whole), text=b"").split("} {")
    assert len(rows) == sum('"pid": 0' in row for row in rows)


def test_what_was_not_counted_is_not_nought() -> None:
    said = run("report", "-", text=MAX)
    assert "at most 65 536 entries; how many it held is not in the texts" in said
    assert "nothing tells how many entries" in said
    assert "held nothing" not in said


@pytest.mark.slow
def test_a_loop_tells_no_life_that_it_did_not_see_and_no_rise_from_nothing(tmp_path: Path) -> None:
    """What comes between two looks in TIME_WAIT was made at an unknown time."""

    def entry(port: int, left: int) -> str:
        there, back = "src=198.51.100.7 dst=192.0.2.10", "src=192.0.2.10 dst=198.51.100.7"
        return (f"ipv4     2 tcp      6 {left} TIME_WAIT {there} sport={port} dport=8063 {back} "
                f"sport=8063 dport={port} [ASSURED] use=2\n")  # fmt: skip

    text = MAX.decode() + "net.netfilter.nf_conntrack_tcp_timeout_time_wait = 120\n"
    for look in range(13):
        text += f"Mon Jul 29 11:{look // 6:02d}:{10 * (look % 6):02d} CEST 2024\n"
        for port in range(3000 + 200 * look, 5400 + 200 * look):  # 20 a second, each for 120 s
            text += entry(port, max(1, 119 - (5400 + 200 * look - port) // 20))
    data = json.loads(run("report", "-", "-o", "json", text=text.encode()))
    assert data["culprits"][0]["life_n"] == 0
    assert data["culprits"][0]["destroys"] > 2000
    assert "rises from 0" not in run("report", "-", text=text.encode())


def test_numbers_and_lists_of_a_bundle_are_no_time_and_no_unread_lines(tmp_path: Path) -> None:
    """As in a sosreport, which has thousands of files about other things."""
    files = {
        "date": "Mon Jul 29 11:02:03 UTC 2024\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1787343104\n",
        "sys/block/vda/queue/max_segment_size": "4294967295\n",
        "var/log/other.log": "Jul 29 11:02:03 a sshd[1]: x\nwhat is this\n2031-01-01 00:00:00Z\n",
        "proc/sys/net/netfilter/nf_conntrack_count": "7\n",
    }
    for name, text in files.items():
        path = tmp_path / "sosreport-a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with open_any([str(tmp_path / "sosreport-a")]) as recording:  # type: ignore[attr-defined]
        said = parse(recording.header.facts)
        clock = recording.clock.offset / 1e9 + 86400
    assert said is not None
    assert (said["count"], said["not_understood"]) == (7, 0)
    assert round(clock) == 1722250923
