"""Texts as terminals, pages, shells and bundles leave them: what is read of each, and what not."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ctrace.cli import cli
from ctrace.dumps.opened import open_any
from ctrace.errors import CtraceError
from ctrace.recording.format.evidence import parse

BARE = (
    "tcp      6 28 TIME_WAIT src=198.51.100.7 dst=192.0.2.10 sport=63518 dport=8063 "
    "src=192.0.2.10 dst=198.51.100.7 sport=8063 dport=63518 [ASSURED] mark=0 zone=0 use=2\n"
)
ENTRY = "ipv4     2 " + BARE
OTHER = ENTRY.replace("63518", "63519")
LATER = ENTRY.replace(" 28 ", " 21 ")
SHOWN = "conntrack v1.4.6 (conntrack-tools): {} flow entries have been {}.\n"
COUNTS = "/proc/sys/net/netfilter/nf_conntrack_"


def told(path: Path) -> dict[str, Any]:
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        said = parse(recording.header.facts)
    assert said is not None
    return said


READ: dict[str, tuple[bytes, dict[str, Any]]] = {
    "grep --color": (
        ENTRY.replace("8063", "\x1b[01;31m\x1b[K8063\x1b[m\x1b[K").encode(),
        {"service": "tcp/8063"},
    ),
    "PowerShell's UTF-16": (
        (ENTRY + OTHER).replace("\n", "\r\n").encode("utf-16"), {"entries": 2, "lines": 2},
    ),
    "a byte order mark": (("\ufeff" + ENTRY).encode(), {"entries": 1}),
    "a page's spaces in Latin-1": (
        ENTRY.replace("  ", "\xa0 ").encode("latin-1"), {"entries": 1, "assured": 1},
    ),
    "a page's entities": (
        ENTRY.replace("[", "&#91;").replace("]", "&#93;").replace("     ", "&nbsp; ").encode(),
        {"entries": 1, "assured": 1},
    ),
    "colours as less shows them": (
        ENTRY.replace("8063", "ESC[01;31mESC[K8063^[[m^[[K").encode(), {"service": "tcp/8063"},
    ),
    "what is to be, beside what is": (
        f"# cat {COUNTS}max\n65536\n# cat /etc/sysctl.d/9.conf\n"
        f"net.netfilter.nf_conntrack_max = 9\n# cat /etc/hostname\ngw\n# conntrack -L\n{BARE}"
        .encode(),
        {"max": 65536, "entries": 1},
    ),
    "headings of somebody": (
        f"Before:\n{ENTRY}After:\n{OTHER}{OTHER.replace('19', '20')}".encode(),
        {"entries": 2, "left_out": 1},
    ),
    "a page's spaces": (ENTRY.replace("  ", " \N{NO-BREAK SPACE}").encode(), {"entries": 1}),
    "a fenced quotation": (f"```\n$ conntrack -L\n{BARE}```\n".encode(), {"entries": 1}),
    "braces": (
        f"[root@h ~]# cat {COUNTS}{{count,max}}\n4489\n65536\n".encode(),
        {"count": 4489, "max": 65536},
    ),
    "two paths": (
        f"root@h:~# cat {COUNTS}max {COUNTS}count\n65536\n4489\n".encode(),
        {"count": 4489, "max": 65536},
    ),
    "a pattern of paths": (
        f"root@h:~# cat {COUNTS}*\n65536\n4489\n"
        f"root@h:~# cat /proc/net/nf_conntrack\n{ENTRY}".encode(),
        {"count": None, "max": None, "entries": 1},
    ),
    "both in one line": (
        f"h:~# echo $(cat {COUNTS}count) of $(cat {COUNTS}max)\n4489 of 65536\n".encode(),
        {"count": 4489, "max": 65536},
    ),
    "sysctl -n": (
        b"gw:~ # sysctl -n net.netfilter.nf_conntrack_count net.netfilter.nf_conntrack_max\n"
        b"4489\n65536\n",
        {"count": 4489, "max": 65536},
    ),
    "a loop of both": (
        f"# while sleep 1; do cat {COUNTS}count {COUNTS}max; done\n1\n9\n2\n9\n".encode(),
        {"count": 2, "max": 9},
    ),
    "BusyBox's prompt": (
        f"~ # cat /proc/net/nf_conntrack\n{ENTRY}/tmp # cat {COUNTS}max\n16384\n".encode(),
        {"entries": 1, "max": 16384},
    ),
    "the prompt of a node's shell": (
        f"sh-4.4# conntrack -L\n{BARE}sh-4.4# conntrack -C\n5\n".encode(),
        {"entries": 1, "count": 5},
    ),
    "zsh's prompt": ("\u279c  ~ conntrack -C\n5\n".encode(), {"count": 5}),
    "old sysctl's complaints": (
        b"error: permission denied on key 'net.ipv4.route.flush'\n"
        b'error: "Invalid argument" reading key "fs.binfmt_misc.register"\n'
        b"net.ipv4.netfilter.ip_conntrack_max = 65536\n",
        {"max": 65536},
    ),
    "a container's log": (
        f"2024-05-01T12:00:00.123456789Z stdout F {ENTRY}".encode(), {"entries": 1},
    ),
    "grep -n and cat -n": (f"12:{ENTRY}    13\t{OTHER}".encode(), {"entries": 2}),
    "a mark with its mask": (BARE.replace("mark=0", "mark=0x10/0xff").encode(), {"entries": 1}),
    "vendors' words": (
        BARE.replace("[ASSURED]", "[ASSURED] [SWFLOW] [blog:0 ] fc_fwd:1 qid=0 dscp=0x0").encode(),
        {"entries": 1, "assured": 1},
    ),
    "DCCP and security labels, as Linux 6.1 prints them": (
        b"ipv4     2 dccp     33 478 PARTOPEN src=192.0.2.1 dst=192.0.2.1 sport=39988 dport=7000 "
        b"packets=3 bytes=304 src=192.0.2.1 dst=192.0.2.1 sport=7000 dport=39988 packets=1 "
        b"bytes=104 [ASSURED] mark=0 secctx=kernel zone=0 delta-time=1 use=2\n"
        b"dccp     33 239 TIMEWAIT src=192.0.2.1 dst=192.0.2.1 sport=40004 dport=7000 packets=4 "
        b"bytes=368 src=192.0.2.1 dst=192.0.2.1 sport=7000 dport=40004 packets=2 bytes=156 "
        b"[ASSURED] mark=0 secctx=kernel delta-time=1 use=1 id=2451538374\n"
        b"udp      17 29 src=192.0.2.1 dst=192.0.2.1 sport=34249 dport=53 packets=1 bytes=29 "
        b"[UNREPLIED] src=192.0.2.1 dst=192.0.2.1 sport=53 dport=34249 packets=0 bytes=0 mark=0 "
        b"secctx=kernel delta-time=1 use=1\n",
        {"by": {"dccp": 2, "udp": 1}, "assured": 2, "unreplied": 1, "src_nat": 0, "dst_nat": 0},
    ),
    "an Android bug report": (
        "------ KERNEL LOG (dmesg) ------\n"
        "<4>[  100.500000] nf_conntrack: table full, dropping packet\n"
        "------ 0.123s was the duration of 'KERNEL LOG (dmesg)' ------\n"
        f"------ NAT (/proc/net/nf_conntrack: 2024-07-29 11:02:03) ------\n{ENTRY}"
        "------ 0.003s was the duration of 'NAT' ------\n"
        "------ COUNT (cat /proc/sys/net/netfilter/nf_conntrack_count) ------\n"
        "cat: /proc/x: Permission denied\n7\n".encode(),
        {"entries": 1, "full_seen": True, "count": 7},
    ),
    "a message of a log in two lines": (
        f"Jul 29 11:02:03 a kernel: nf_conntrack: table full,\ndropping packet\n{BARE}".encode(),
        {"refused_at_least": 1},
    ),
    "what conntrack deleted": (
        f"root@h:~# conntrack -D -p tcp\n{BARE}{SHOWN.format(1, 'deleted')}"
        f"root@h:~# conntrack -L\n{OTHER[11:]}{SHOWN.format(1, 'shown')}".encode(),
        {"entries": 1, "deleted": 1},
    ),
    "what a component's log says was deleted": (
        'I0625 13:13:20.361710    1 conntrack.go:71] "Conntrack entries deleted" output=<\n'
        f"\t{SHOWN.format(1, 'deleted')}\t{BARE}".encode(),
        {"entries": 0, "deleted": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", READ)
def test_it_is_read_as_if_it_had_not_been_copied(form: str, tmp_path: Path) -> None:
    text, expected = READ[form]
    path = tmp_path / "copied.txt"
    path.write_bytes(text)
    said = told(path)
    assert {name: said[name] for name in expected} == expected
    assert said["not_understood"] == 2 * (form == "headings of somebody"), said["unread"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("tcp,orig=(src=10.0.0.1,dst=10.0.0.2,sport=1,dport=80),reply=(src=10.0.0.2,dst=10.0.0.1,"
         "sport=80,dport=1),zone=5,protoinfo=(state=TIME_WAIT)", "as Open vSwitch prints it"),
        ("Jul 29 11:02:03 gw ulogd[3]: [NEW] ORIG: SRC=10.0.0.1 DST=10.0.0.2 PROTO=TCP SPT=5 "
         "DPT=80 PKTS=0 , REPLY: SRC=10.0.0.2 DST=10.0.0.1 PROTO=TCP SPT=80 DPT=5", "as ulogd"),
        (BARE.replace("198.51.100.7", "x.x.x.x"), "an address that is none"),
        (BARE[:75], "cut off before the reply's addresses"),
        (BARE[:90], "a direction without its destination"),
        ("-" + ENTRY, "a line that a diff takes away"),
        ("   1500 TIME_WAIT", "an unknown line"),
    ],
)  # fmt: skip
def test_what_is_not_read_has_its_reason(line: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "copied.txt"
    path.write_text(f"{OTHER}{line.rstrip()}\n")
    said = told(path)
    assert (said["entries"], said["not_understood"]) == (1, 1)
    assert why in said["unread"][0][2]


@pytest.mark.parametrize(
    ("first", "kind"), [(b"PK\x03\x04", "a zip archive"), (b"%PDF-1.4", "a PDF file")]
)
def test_what_is_no_text_is_told_by_what_it_is(first: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.write_bytes(first + bytes(99))
    with pytest.raises(CtraceError, match=f"is {kind}: give what is in it"):
        told(path)
    (tmp_path / "nf_conntrack").write_bytes(ENTRY.encode())
    assert told(tmp_path)["not_understood"] == 0  # beside others it is passed over


@pytest.mark.parametrize("between", [
    "Mon Jul 29 11:02:0{} CEST 2024", "Mon 29 Jul 2024 11:02:0{} AM CEST", "2024-07-29 11:02:0{}",
])  # fmt: skip
def test_times_of_an_unknown_zone_tell_how_far_dumps_are_apart(
    between: str, tmp_path: Path
) -> None:
    path = tmp_path / "loop.txt"
    path.write_text(f"{between.format(1)}\n{ENTRY}{between.format(8)}\n{OTHER}")  # none comes again
    said = told(path)
    assert [one["apart"] for one in said["dumps"]] == [None, 7.0]
    assert said["dumps"][0]["known_by"] == "clock"
    assert said["not_understood"] == 0


def test_a_time_with_its_offset_is_known(tmp_path: Path) -> None:
    path = tmp_path / "dump.txt"
    path.write_text(f"Mon Jul 29 14:02:03 +03 2024\n{ENTRY}")
    (dump,) = told(path)["dumps"]
    assert (dump["at"], dump["known_by"]) == (1722250923.0, "told")


@pytest.mark.parametrize(
    "text",
    [
        f"# cat /proc/net/nf_conntrack | head -1\n{ENTRY}",
        f"# grep 8063 /proc/net/nf_conntrack\n{ENTRY}",
        f"# conntrack -L -p tcp\n{BARE}{SHOWN.format(1, 'shown')}",
        f"{ENTRY}...\n{OTHER}",
        f"[snip]\n{ENTRY}",
    ],
)
def test_a_part_of_a_table_is_not_taken_for_all_of_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "part.txt"
    path.write_text(
        f"{text}# sysctl net.netfilter.nf_conntrack_max\nnet.netfilter.nf_conntrack_max = 4\n"
    )
    done = CliRunner().invoke(cli, ["report", str(path), "-o", "json"])
    (table,) = json.loads(done.stdout)["tables"]
    assert (table["fill"], table["max"]) == (None, None)
    shown = " ".join(CliRunner().invoke(cli, ["report", str(path)]).stdout.split())
    assert "a part of the table, and how many it held is not told" in shown
    assert told(path)["not_understood"] == 0


def test_each_namespace_has_its_own_table(tmp_path: Path) -> None:
    path = tmp_path / "two.txt"
    path.write_text(
        f"# conntrack -C\n7\n# ip netns exec blue conntrack -L\n{BARE}"
        f"# ip netns exec red conntrack -L\n{BARE}{OTHER[11:]}"
    )
    done = CliRunner().invoke(cli, ["report", str(path)])
    told = [line.split(None, 1)[1] for line in done.stdout.split("\n") if line[:5] == "Table"]
    assert [one.partition(";")[0] for one in told] == [
        "the host: 7 entries", "blue: 1 entry", "red: 2 entries",
    ]  # fmt: skip


def test_what_conntrack_says_it_showed_is_how_many_there_were(tmp_path: Path) -> None:
    path = tmp_path / "pasted.txt"
    path.write_text(f"# conntrack -L\n{BARE}...\n{SHOWN.format(5200, 'shown')}")
    done = CliRunner().invoke(cli, ["report", str(path), "-o", "json"])
    assert [one["count"] for one in json.loads(done.stdout)["tables"]] == [5200]


BUNDLES = {
    "must-gather": "must-gather.local.1/quay-io-x-sha256-0/nodes/{}/dmesg",
    "sos collect": "sos-collector-x/sosreport-{}-2024-07-29-abcdef/proc/net/nf_conntrack",
    "supportconfig": "scc_{}_240729_1102/network.txt",
}


@pytest.mark.parametrize("kind", BUNDLES)
@pytest.mark.parametrize("packed", [False, True])
def test_hosts_of_one_bundle_are_not_taken_for_one(kind: str, packed: bool, tmp_path: Path) -> None:
    path, names = tmp_path / "bundle.tar", [BUNDLES[kind].format(one) for one in ("web1", "web2")]
    texts = dict.fromkeys(names, ENTRY)
    idle = BUNDLES[kind].format("web3")
    texts[idle] = "Jul 29 11:02:03 web3 kubelet[1]: nothing of the table\n"
    with tarfile.open(path, "w") as archive:
        for name, text in texts.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    given = path
    if not packed:
        given = tmp_path / "bundle"
        with tarfile.open(path) as archive:
            archive.extractall(given)
    with pytest.raises(CtraceError, match=r"output of 2 hosts .*web1.*web2.*one host's folder"):
        told(given)
    if not packed:
        one = given / names[0].partition("web1")[0]
        (folder,) = [at for at in one.parent.glob("**/*web1*") if at.is_dir()]
        assert told(folder)["entries"] == 1
