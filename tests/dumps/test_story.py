"""What one host's lines tell, and that the script which gathers them needs only a shell."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from ctrace.cli import cli
from ctrace.cli.recordings.collect import SCRIPT

LINES = "\n".join(
    [
        "[root@web ~]# dmesg | tail",
        "[5000.752270] nf_conntrack: table full, dropping packet",
        "[5005.728802] net_ratelimit: 912 callbacks suppressed",
        "[5005.728809] nf_conntrack: table full, dropping packet",
        "[root@web ~]# cat /proc/net/nf_conntrack",
        *(
            f"ipv4     2 tcp      6 {left} TIME_WAIT src=198.51.100.{left} dst=192.0.2.10 "
            f"sport={4000 + left} dport=8443 src=192.0.2.10 dst=198.51.100.{left} sport=8443 "
            f"dport={4000 + left} [ASSURED] mark=0 zone=0 use=2"
            for left in range(10, 110)
        ),
        "[root@web ~]# sysctl -a | grep conntrack",
        "net.netfilter.nf_conntrack_count = 5200",
        "net.netfilter.nf_conntrack_max = 65536",
        "net.netfilter.nf_conntrack_tcp_timeout_time_wait = 120",
        "[root@web ~]# lsmod | grep conntrack",
        "xt_conntrack           12760  1",
        "nf_conntrack          105702  2 xt_CT,xt_conntrack",
    ]
)


def run(*argv: str, text: str = LINES) -> str:
    done = CliRunner().invoke(cli, list(argv), input=text)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_the_report_tells_what_the_lines_do() -> None:
    said = run("report", "-")
    for part in (
        "tcp/8443 TIME_WAIT 100",
        "at least 914 packets",
        "from 5000.752270 to 5005.728809 s after boot",
        "5 200 entries of 65 536",
        "held by xt_CT, xt_conntrack",
        "NOTRACK for tcp/8443, by --dport 8443 and --sport 8443 in PREROUTING and OUTPUT",
        "a shorter nf_conntrack_tcp_timeout_time_wait: how many entries it would save, two dumps",
        "11 to 110 s since the last packet",  # 120 s less what is left
    ):
        assert part in " ".join(said.split()), part


def test_the_markdown_tells_the_whole_story() -> None:
    said = run("report", "-", "--markdown").replace("\\", "")
    for part in (
        "tcp/8443",
        "waiting out TIME_WAIT",
        "full, from 5000.752270 to 5005.728809 s after boot",
        "held by xt_CT, xt_conntrack",
        "NOTRACK for tcp/8443",
        "ctrace advise proves, once its rules are in the texts",
        "a shorter nf_conntrack_tcp_timeout_time_wait",
        "a larger nf_conntrack_max",
    ):
        assert part in " ".join(said.split()), part
    assert len(said.splitlines()) < 25
    assert max(map(len, said.splitlines())) <= 100
    assert "fullest" not in said  # it was full before, and what was read is one moment


def test_the_page_has_nothing_empty() -> None:
    page = run("report", "-", "--format", "html")
    assert "<polyline" not in page  # one moment has no course
    assert "Over time" not in page
    assert ">-<" not in page
    assert "914</b><span>refused at least, by the log" in page


@pytest.mark.parametrize(
    ("more", "helps"),
    [
        ("net.netfilter.nf_conntrack_count = 60000", True),
        ("net.netfilter.nf_conntrack_count = 6000", False),
        ("cpu=0 found=1 invalid=0 insert=0 insert_failed=0 drop=12 early_drop=0", True),
    ],
)
def test_what_may_help_is_told_of_a_table_that_was_short_of_room(more: str, helps: bool) -> None:
    lines = [*LINES.splitlines()[5:105], "net.netfilter.nf_conntrack_max = 65536", more]
    assert ("NOTRACK for tcp/8443" in run("report", "-", text="\n".join(lines))) == helps


def test_a_dated_log_stands_in_the_course_of_events() -> None:
    log = "2024-07-28T11:02:03+0000 gw kernel: nf_conntrack: table full, dropping packet\n"
    text = log + log.replace("02:03", "04:03") + "2024-07-29T09:00:00Z\n" + LINES.splitlines()[5]
    said = run("report", "-", "--markdown", text=text)
    for part in (
        "`11:02:03` the kernel logs that the table is full, for the first time (2024-07-28)",
        "`11:04:03` the kernel logs that the table is full, for the last time (2024-07-28)",
    ):
        assert part in " ".join(said.split())


@pytest.mark.parametrize("told", [True, False])
def test_how_long_connections_were_idle_is_told_where_the_timeout_is(told: bool) -> None:
    left = 432000 - 9 * 3600
    lines = [
        f"ipv4     2 tcp      6 {left} ESTABLISHED src=198.51.100.{i} dst=192.0.2.10 sport={i} "
        f"dport=8443 src=192.0.2.10 dst=198.51.100.{i} sport=8443 dport={i} [ASSURED] use=2"
        for i in range(1, 101)
    ]
    if told:
        lines.append("net.netfilter.nf_conntrack_tcp_timeout_established = 432000")
    data = json.loads(run("report", "-", "-o", "json", text="\n".join(lines)))
    assert data["tables"][0]["composition"]["left_p50_s"] == left
    text = data["why"][0]["text"]
    assert ("half had no packet for 9 h" in text) == told
    assert ("whether they are idle one dump does not tell" in text) != told


def test_advice_names_what_a_proof_wants() -> None:
    (one,) = json.loads(run("advise", "-", "-o", "json"))["candidates"]
    assert one["verdict"] == "cannot-say"
    (text,) = [reason for reason in one["reasons"] if "add to the evidence" in reason]
    for command in ("ip -d addr", "ip rule", "sysctl -a", "nft list ruleset", "iptables-save"):
        assert f"`{command}`" in text


def test_a_change_is_not_foretold_from_one_moment(tmp_path: Path) -> None:
    path = tmp_path / "dump.txt"
    path.write_text(LINES)
    done = CliRunner().invoke(cli, ["whatif", str(path), "--notrack", "tcp/8443"])
    assert done.exit_code == 1
    assert "two dumps some seconds apart" in str(done.exception)


def test_what_a_dump_cannot_tell_is_null_and_never_zero() -> None:
    data = json.loads(run("report", "-", "-o", "json"))
    assert data["hooks"]["family"] == "dump"
    for name in ("insert", "destroy", "drop", "early_drop", "insert_failed"):
        assert data["totals"][name] is None
    assert data["rates_per_s"]["insert"] is None
    assert data["tables"][0]["count"] == 5200
    assert data["culprits"][0]["inserts"] is None
    bare = json.loads(run("report", "-", "-o", "json", text=LINES.splitlines()[5] + "\n"))
    assert (bare["tables"][0]["max"], bare["tables"][0]["fill"]) == (None, None)


def test_import_makes_a_recording_that_others_read(tmp_path: Path) -> None:
    out = tmp_path / "web.data"
    run("import", "-", "-o", str(out))
    direct = json.loads(run("report", "-", "-o", "json"))
    stored = json.loads(run("report", str(out), "-o", "json"))
    for name in ("totals", "held_total"):
        assert stored[name] == direct[name]
    assert stored["held_total"] == 100


def shells() -> list[list[str]]:
    return [
        [shutil.which(argv[0]) or argv[0], *argv[1:]]
        for argv in (["dash"], ["bash"], ["busybox", "ash"])
        if shutil.which(argv[0])
    ]


@pytest.mark.slow
@pytest.mark.parametrize("shell", shells(), ids=lambda argv: Path(argv[-1]).name)
def test_collect_needs_a_shell_alone_and_leaves_nothing(tmp_path: Path, shell: list[str]) -> None:
    tools, place = tmp_path / "tools", tmp_path / "tmp"
    tools.mkdir()
    place.mkdir()
    if shell == [shutil.which("dash")]:  # as in a chroot, whose mounts it does not know
        (tools / "df").write_text(
            "#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity\n"
        )
        (tools / "df").chmod(0o755)
    done = subprocess.run(
        [*shell, str(SCRIPT)], capture_output=True, timeout=110, check=True,
        env={"PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": str(place)},
    )  # fmt: skip
    assert done.stderr == b""
    assert list(place.iterdir()) == []
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        names = archive.getnames()
    assert "./uname" in names
    bundle = tmp_path / "evidence.tar.gz"
    bundle.write_bytes(done.stdout)
    said = json.loads(run("report", str(bundle), "-o", "json"))
    assert said["recording"]["kernel"] == os.uname().release


@pytest.mark.slow
def test_collect_without_tar_is_one_text(tmp_path: Path) -> None:
    """A router may have neither tar nor find, and little room."""
    tools, place = tmp_path / "tools", tmp_path / "tmp"
    for folder in (tools, place):
        folder.mkdir()
    fakes = {"find": "exit 1", "df": "echo tmpfs 9000 7000 2000 78% /tmp", "tc": "seq 46000"}
    for name, text in fakes.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    script = SCRIPT.read_text()
    assert script.count("command -v tar") == 1
    done = subprocess.run(
        ["sh"], input=script.replace("command -v tar", "command -v no-tar"), capture_output=True,
        timeout=110, check=True, text=True,
        env={"PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": str(place)},
    )  # fmt: skip
    assert list(place.iterdir()) == []
    assert "==> dump2/epoch <==" in done.stdout
    cut = done.stdout.partition("==> host/tc_qdisc <==\n")[2].partition("==>")[0]
    assert cut.startswith("1\n2\n")
    assert cut.endswith("\n...\n")  # as of a table that is cut off
    assert done.stderr == (
        f"collect: there is little room below {place}, so long texts are cut off: set TMPDIR to a "
        "place with more\n"
    )
    said = json.loads(run("report", "-", "-o", "json", text=done.stdout))
    assert said["recording"]["kernel"] == os.uname().release


def test_collect_that_finds_no_place_says_so() -> None:
    done = subprocess.run(
        ["sh", str(SCRIPT)], capture_output=True, timeout=110, check=False, text=True,
        env={"PATH": os.environ["PATH"], "TMPDIR": "/proc/self"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "no folder can be made below /proc/self: set TMPDIR" in done.stderr


@pytest.mark.parametrize(
    "shell", [one for one in shells() if len(one) == 1], ids=lambda argv: Path(argv[-1]).name
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_collect_that_is_ended_as_it_makes_its_folder_leaves_nothing(
    tmp_path: Path, shell: list[str], when: str
) -> None:
    """The signal comes from mkdir itself, so that it hits that moment each time (busybox' shell
    has its own)."""
    tools, place = tmp_path / "tools", tmp_path / "tmp"
    tools.mkdir()
    place.mkdir()
    steps = ["kill -TERM $PPID", f'{shutil.which("mkdir")} "$@"']
    if when == "after":
        steps.reverse()
    (tools / "mkdir").write_text("\n".join(["#!/bin/sh", *steps, ""]))
    (tools / "mkdir").chmod(0o755)
    done = subprocess.run(
        [*shell, str(SCRIPT)], capture_output=True, timeout=110,
        check=False, env={"PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": str(place)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == b""
    assert list(place.iterdir()) == []


def test_collect_that_is_ended_at_work_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        ["sh", str(SCRIPT)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)},
    ) as running:  # fmt: skip
        while not list(tmp_path.glob("*/README")):
            assert running.poll() is None
        running.terminate()
        running.communicate(timeout=110)
    assert list(tmp_path.iterdir()) == []


def test_collect_touches_no_folder_that_was_there(tmp_path: Path) -> None:
    tools, place = tmp_path / "tools", tmp_path / "tmp"
    tools.mkdir()
    place.mkdir()
    mkdir = shutil.which("mkdir")
    (tools / "mkdir").write_text(f'#!/bin/sh\n{mkdir} "$@"\n: >"$1/kept"\n{mkdir} "$@"\n')
    (tools / "mkdir").chmod(0o755)
    done = subprocess.run(
        ["sh", str(SCRIPT)], capture_output=True, timeout=110,
        check=False, env={"PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": str(place)},
    )  # fmt: skip
    assert done.returncode == 1
    assert [path.name for path in place.glob("*/*")] == ["kept"]
