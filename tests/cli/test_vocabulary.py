"""One vocabulary over all verbs: a name means one thing, and a value is written one way."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from kit.command import ctrace

from ctrace.batch import Batch, Clock, HookInfo
from ctrace.cli import VERBS, cli
from ctrace.cli.kinds import Percent, Size, Time
from ctrace.errors import UsageError
from ctrace.host import netns
from ctrace.recording.format.meta import Header
from ctrace.recording.writer import Writer

METAVARS = {
    "--format": "FORMAT", "--output": "FILE", "--netns": "NAME", "--hooks": "FAMILY",
    "--limit": "N", "--stop-after": "N", "--group": "KEY", "--sort": "COLUMN", "--theme": "THEME",
    "--plan": "FILE", "--folded": "FILE", "--against": "FILE", "--sport": "PORT",
    "--dport": "PORT", "--zone": "ZONE", "--family": "FAMILY", "--status": "STATUS",
}  # fmt: skip
"""What stands for the value of an option, in whichever verb it is."""
TIMES = ("--duration", "--interval", "--keep", "--before", "--after", "--step", "--confirm-within")
SHORT = {"-o": "--output", "-y": "--yes", "-q": "--quiet", "-e": "--kinds"}
"""Short names beside conntrack's own filters."""


def options() -> Iterator[tuple[str, click.Option]]:
    """Every option that a help shows, with its verb."""
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                yield verb, option


def shown(option: click.Option) -> str:
    """What the help puts for the value."""
    wants_context = len(inspect.signature(option.make_metavar).parameters)  # since click 8.2
    return str(option.make_metavar(*[click.Context(cli)][:wants_context]))


def test_a_name_means_the_same_in_every_verb() -> None:
    means: dict[str, set[str]] = {}
    for _, option in options():
        if not option.is_flag:
            for name in option.opts:
                means.setdefault(name, set()).add(shown(option))
    assert {name: what for name, what in means.items() if len(what) > 1} == {}
    for name, metavar in METAVARS.items():
        assert means[name] == {metavar}, name


def test_no_value_is_called_after_its_type() -> None:
    for verb, option in options():
        if not option.is_flag:
            assert re.fullmatch(r"[A-Z]+([:/=][A-Z]+)*", shown(option)), (verb, option.opts)
            assert "TEXT" not in shown(option), (verb, option.opts)
            assert "INTEGER" not in shown(option), (verb, option.opts)


def test_times_sizes_and_shares_have_one_grammar() -> None:
    for verb, option in options():
        kind = {"TIME": Time, "SIZE": Size, "SHARE": Percent}.get(shown(option))
        assert kind is None or isinstance(option.type, kind), (verb, option.opts)
        if set(option.opts) & set(TIMES):
            assert isinstance(option.type, Time), (verb, option.opts)


def test_short_names_belong_to_one_long_name() -> None:
    for verb, option in options():
        for short, long in SHORT.items():
            if short in option.opts or long in option.opts:
                assert {short, long} <= set(option.opts), (verb, option.opts)


def test_formats_are_told_and_a_format_is_never_a_file() -> None:
    for verb, option in options():
        if "--format" in option.opts:
            assert isinstance(option.type, click.Choice)
            for name in option.type.choices:
                assert name in (option.help or ""), (verb, name)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "a.data"
    with Writer(str(path), Header(HookInfo("netlink"), Clock(0), 1)) as writer:
        writer.write(Batch.idle(2))
    return path


def test_a_file_gets_what_would_be_printed(recording: Path, tmp_path: Path) -> None:
    printed = ctrace("report", recording, "--format", "json").stdout
    by_name, by_format = tmp_path / "r.json", tmp_path / "r"
    assert ctrace("report", recording, "-o", by_name).stdout == ""
    assert ctrace("report", recording, "--format", "json", "-o", by_format).returncode == 0
    # Times of reading apart, all three are the same.
    assert json.loads(by_name.read_text()).keys() == json.loads(printed).keys()
    assert json.loads(by_format.read_text()) == json.loads(printed)
    assert ctrace("report", recording, "-o", "-").stdout == ctrace("report", recording).stdout
    taken = ctrace("report", recording, "-o", by_name)
    assert (taken.returncode, "exists" in taken.stderr) == (1, True)
    assert ctrace("report", recording, "-o", by_name, "--force").returncode == 0


def test_spellings_of_earlier_versions_work_and_are_not_shown(
    recording: Path, tmp_path: Path
) -> None:
    assert ctrace("report", recording, "-o", "json").stdout == (
        ctrace("report", recording, "--format", "json").stdout
    )
    assert ctrace("export", recording, "--to", "csv").stdout == (
        ctrace("export", recording, "--format", "csv").stdout
    )
    page = tmp_path / "page.html"
    assert ctrace("report", recording, "--html", page).returncode == 0
    assert page.read_text().lower().startswith("<!doctype html>")
    for verb, old in (("report", "--html"), ("export", "--to"), ("trace", "--count")):
        assert not re.search(rf"^\s+{old}\b", ctrace(verb, "--help").stdout, re.M)


@pytest.mark.parametrize(
    "words",
    [
        ["report", "no.data"], ["replay", "no.data", "--once"], ["diff", "no.data", "no.data"],
        ["export", "no.data", "--format", "csv"], ["merge", "no.data", "no.data", "-o", "x"],
        ["import", "no.data", "-o", "x"], ["advise", "no.data"], ["whatif", "no.data"],
        ["apply", "no.json"], ["confirm", "no.json"], ["perf", "--against", "no.json"],
    ],
    ids=lambda words: str(words[0]),
)  # fmt: skip
def test_a_missing_file_is_told_alike(words: list[str], tmp_path: Path) -> None:
    done = ctrace(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(
        r"ctrace: cannot (open|read) no\.(data|json): No such file or directory\n", done.stderr
    )


def completed(*words: str) -> set[str]:
    """What the shell would offer for the last word."""
    items = ShellComplete(cli, {}, "ctrace", "_CTRACE_COMPLETE").get_completions(
        list(words[:-1]), words[-1]
    )
    return {item.value for item in items}


def test_a_shell_is_answered_however_ctrace_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout and the one file run it as a module, which is called otherwise."""
    monkeypatch.setenv("_CTRACE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "ctrace re")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = ctrace()
    assert done.stdout.split() == ["plain,record", "plain,replay", "plain,report"]


def test_completion_knows_what_is_here() -> None:
    assert completed("top", "--hooks", "") == {"fentry", "kprobe", "netfilter", "netlink"}
    assert completed("trace", "-u", "UNREPLIED,a") == {"UNREPLIED,ASSURED"}
    assert "drop,insert_failed" in completed("trace", "-e", "drop,ins")
    assert "init" in completed("undo", "--netns", "")
    assert {space.name for space in netns.find()} >= completed("top", "--netns", "in")
    assert "top" in completed("tpo", ""), "a mistyped verb is no error while one types"
    assert completed("advise", "--hooks", "net") == {"netfilter", "netlink"}


@pytest.mark.parametrize("typed", ["120", "2m", "120s", "0.5h", "1h"])
def test_a_time_to_confirm_is_a_time_like_any(typed: str) -> None:
    done = CliRunner().invoke(cli, ["apply", "no.json", "--confirm-within", typed])
    assert "not a time" not in done.output
    assert "must be from" not in str(done.exception)


@pytest.mark.parametrize(
    "words",
    [["record", "--before", "1m"], ["record", "--ring", "1G", "--after", "1m"],
     ["top", "--once", "--resolve"], ["top", "--resolve", "--format", "json"]],
    ids=" ".join,
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(words: list[str]) -> None:
    error = CliRunner().invoke(cli, words).exception
    assert isinstance(error, UsageError), error
    assert "goes with" in str(error)
