"""The command line's frame: every verb loads, helps, and fails in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from kit.command import ctrace

from ctrace.batch import Batch, Clock, HookInfo
from ctrace.cli import VERBS, LazyGroup, _status, cli, output
from ctrace.recording.format.meta import Header
from ctrace.recording.writer import Writer

ROOT = Path(__file__).parents[2]
RECORDING = "<a recording>"
"""Stands for the path of one."""


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of nothing much."""
    path = tmp_path_factory.mktemp("recording") / "a.data"
    with Writer(str(path), Header(HookInfo("netlink"), Clock(0), 1)) as writer:
        writer.write(Batch.idle(2))
    return path


def test_every_verb_is_there() -> None:
    assert cli.list_commands(click.Context(cli)) == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{verb}: {parameter.opts} has no help"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "No such command"),
        (["help", "tpo"], "the nearest is top"),
        (["report", "-o"], "requires an argument. See ctrace report --help"),
        (["trace", "--count", "x"], "'x' does not fit: give a whole number, at least 1"),
        (["trace", "-p", "bogus"], "unknown protocol 'bogus'"),
        (["top", "-p", "tpc"], "udplite; the nearest is tcp"),
        (["trace", "-s", "not-an-address"], "is not an address or prefix"),
        (["trace", "-s", "10.0.0.1", "-6"], "no flow can match both"),
        (["top", "-u", "OFFLOAD"], "ctrace cannot tell which held entries are 'OFFLOAD'"),
        (["top", "-u", "ASSURED,UNREPLIED"], "no entry is UNREPLIED and has seen a reply"),
        (["top", "-u", "SLEEPY"], "unknown status 'SLEEPY'"),
        (["record", "-o", "/nonexistent/x", "-u", "ASSURED"], "-u can't choose what is recorded"),
        (["advise", "-u", "unreplied"], "-u can't choose what is recorded or advised on"),
        (["trace", "-u", "asured"], "EXPECTED; the nearest is ASSURED"),
        (["trace", "--kinds", "dorp"], "; the nearest is drop"),
        (["trace", "--dport", "70000"], "'70000' is not a port: give one number up to 65535"),
        (["top", "--sport", "80-443"], "'80-443' is not a port"),
        (["top", "--dport", "http"], "'http' is not a port: give one number up to 65535"),
        (["top", "-w", "9e9"], "give a whole number, 0 to 65535"),
        (["report", "--limt", "3"], "; the nearest is --limit. See ctrace report --help"),
        (["report", "--json"], "'--json'; it is called --format json here. See"),
        (["import", "--format", "json", "x"], "No such option '--format'. See ctrace import"),
        (["top", "--n", "x"], "No such option '--n'; the nearest is -n. See ctrace top"),
        (["top", "--interval", "5"], "'--interval'; give its value without it. See"),
        (["undo", "--all", "--netns", "init"], "give one of the two"),
        (["trace", "--netns", "no-such-namespace"], "no-such-namespace"),
        (["trace", "--hooks", "magic"], "magic"),
        (
            ["replay", RECORDING, "--at", "bad"],
            "'bad' is not a time: give 10:03:07 (UTC), +30, -2m or 50%",
        ),
        (["replay", RECORDING, "--at", "2019-99-01"], "give one like 2019-07-03T11:02:00Z"),
        (["replay", RECORDING, "--speed", "0"], "'0' is not a speed: give one like 0.5"),
        (["replay", RECORDING, "--step", "x"], "'x' is not a time"),
        (["export", RECORDING], "say which format with --format: parquet, csv, jsonl, openmetrics"),
        (["export", RECORDING, "--to", "xml"], "is not one of 'parquet', 'csv'"),
        (["export", RECORDING, "--to", "parquet"], "Parquet needs a file: give one with -o"),
        (["report", RECORDING, "--group", "colour"], "'--group'"),
        (["report", RECORDING, "--group", "servce"], "'netns'; the nearest is service. See"),
        (["report", RECORDING, "--format", "jsn"], "'html'; the nearest is json. See"),
        (["diff", RECORDING], "Missing argument 'AFTER'"),
        (["merge", RECORDING, "-o", "x"], "one recording needs no merging"),
        (["apply", __file__, "--confirm-within", "1"], "must be from 5 to 3600 seconds"),
        (["apply", __file__, "--confirm-within", "soon"], "'soon' is not a time"),
        (["merge", RECORDING, RECORDING], "Missing option '-o'"),
        (["record", "--trigger", "x"], "is not a trigger: use drop, evict, fill=90"),
        (["record", "--ring", "5"], "--ring': 5 is too little: at least 8M"),
        (["record", "--keep", "never"], "'never' is not a time"),
        (["record", "--stop-after", "0"], "'--stop-after'"),
        (["undo", "--netns="], "'--netns=' is empty: give a value"),
        (["undo", "--netns", ""], "The word after '--netns' is empty"),
        (["metrics", "--web.config.file", ""], "The word after '--web.config.file' is empty"),
        (["report", ""], "The word after 'report' is empty"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(
    arguments: list[str], says: str, recording: Path
) -> None:
    done = ctrace(*(str(recording) if word == RECORDING else word for word in arguments))
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("ctrace: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["replay", "nothing.data"], "cannot open nothing.data: No such file or directory"),
        (["report", __file__], "is not a ctrace recording"),
        (["apply", "nothing.json"], "cannot read nothing.json: No such file or directory"),
        (["apply", __file__], "is not valid JSON"),
        (["apply", "/"], "/ is not a regular file"),
        (["perf", "--against", "/"], "/ is a directory, not a file"),
        (["report", RECORDING, "--html", "/nowhere/x.html"], "cannot write /nowhere/x.html"),
        (["export", RECORDING, "-o", "/nowhere/x.csv"], "cannot write /nowhere/x.csv"),
        (["diff", RECORDING, "nothing.data"], "cannot open nothing.data"),
        (["merge", RECORDING, "nothing.data", "-o", "x"], "cannot open nothing.data"),
        (["merge", RECORDING, "--redact", "-o", RECORDING], "exists"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_1(
    arguments: list[str], says: str, recording: Path
) -> None:
    done = ctrace(*(str(recording) if word == RECORDING else word for word in arguments))
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("ctrace: ")


def test_what_nobody_foresaw_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr(LazyGroup, "invoke", broken)
    monkeypatch.setattr(sys, "argv", ["ctrace", "man"])
    assert _status() == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.match(r"ctrace: ValueError in \w+\.py line \d+: two lines; this is a defect", said)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives root's rights up, so it needs them")
@pytest.mark.parametrize(
    ("arguments", "doing"),
    [
        (["confirm"], "changing rules"),
        (["undo"], "changing rules"),
        (["applied"], "reading every namespace's rules"),
        (["doctor", "--why"], "reading every namespace's rules"),
        (["advise"], "tracing"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_without_root_is_one_line(arguments: list[str], doing: str) -> None:
    done = ctrace(*arguments, user=65534)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"ctrace: {doing} needs root: run it with sudo\n"


def test_completion_is_a_script_that_the_shell_accepts() -> None:
    done = ctrace("completion", "bash")
    assert "_CTRACE_COMPLETE" in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff, as in a bare root")
def test_man_page_holds_every_verb_and_formats_cleanly() -> None:
    page = ctrace("man").stdout
    for verb in VERBS:
        assert f"\n.SS {verb} " in page
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww"], input=page, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    # An example is a line of its own.
    assert re.search(r"^ +ctrace top 5 12 +a minute, in steps of five seconds$", done.stdout, re.M)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git, as in a bare root")
def test_no_word_of_where_this_was_made() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        text = (ROOT / name).read_bytes()
        assert b"/wor" + b"k/" not in text, name


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("it holds more than 4,194,304 files: name them", "4\u202f194\u202f304 files: name them"),
        ("at least (1,234), or 5,678.", "(1\u202f234), or 5\u202f678."),
        ("cannot open /dumps/1,234/all.txt", "/dumps/1,234/all.txt"),
        ("'1,234' is not a port", "'1,234' is"),
        ("1,234.data exists", "1,234.data exists"),
    ],
)
def test_an_error_groups_digits_as_the_views_do_but_not_in_names(
    said: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTRACE_ASCII", "0")
    assert shown in output.remark(said)
    monkeypatch.setenv("CTRACE_ASCII", "1")
    assert output.remark(said) == said
