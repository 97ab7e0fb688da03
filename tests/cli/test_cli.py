"""The command line's frame: every verb loads, helps, and fails in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from ctrace.cli import VERBS, cli

ROOT = Path(__file__).parents[2]


def ctrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ctrace", *arguments], capture_output=True, text=True, check=False
    )


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
        (["trace", "--count", "x"], "not a valid integer"),
        (["trace", "-p", "bogus"], "unknown protocol 'bogus'"),
        (["trace", "-s", "not-an-address"], "is not an address or prefix"),
        (["trace", "-s", "10.0.0.1", "-6"], "no flow can match both"),
        (["trace", "-u", "SLEEPY"], "unknown status 'SLEEPY'"),
        (["trace", "--dport", "70000"], "0<=x<=65535"),
        (["trace", "--netns", "no-such-namespace"], "no-such-namespace"),
        (["trace", "--hooks", "magic"], "magic"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(arguments: list[str], says: str) -> None:
    done = ctrace(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_completion_is_a_script_that_the_shell_accepts() -> None:
    done = ctrace("completion", "bash")
    assert "_CTRACE_COMPLETE" in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def test_man_page_holds_every_verb_and_formats_cleanly() -> None:
    page = ctrace("man").stdout
    for verb in VERBS:
        assert f"\n.SS {verb} " in page
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww"], input=page, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "ctrace" in done.stdout


def test_no_word_of_where_this_was_made() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        text = (ROOT / name).read_bytes()
        assert b"/wor" + b"k/" not in text, name
