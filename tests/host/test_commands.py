"""Tools are found where they are, also by a user or a job whose path lacks sbin."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctrace.advice.facts import facts
from ctrace.errors import TryAgain
from ctrace.host import commands
from ctrace.lab import Lab

RULES = """
table inet fw {
    chain in { type filter hook input priority 0; policy drop; ct state established accept; }
}
"""


@pytest.mark.kernel
@pytest.mark.parametrize("path", ["/usr/bin:/bin", ""])
def test_what_is_read_does_not_depend_on_the_path(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a plain su, and in a job of cron."""
    with Lab() as lab:
        node = lab.namespace("n")
        node.run(["nft", "-f", "-"], stdin=RULES)
        node.run(["iptables-legacy", "-A", "INPUT", "-j", "ACCEPT"])
        usual = facts(node.path)
        monkeypatch.setenv("PATH", path)
        here = facts(node.path)
    assert usual.ruleset is not None
    assert here.ruleset is not None
    assert usual.has_nft
    assert here.has_nft
    assert here.ruleset.gaps == usual.ruleset.gaps == ()
    assert here.ruleset.fingerprint == usual.ruleset.fingerprint


def test_nothing_is_taken_from_the_folder_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "planted-tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert not commands.have("planted-tool")


def test_a_tool_that_only_waits_for_a_processor_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also gets all of its input, which is more than a pipe holds."""
    monkeypatch.setattr(commands, "_progress", lambda _: (False, 0.0))
    text = "rule\n" * 100_000
    found = commands.output(["sh", "-c", "sleep 0.3; cat"], text, patience=0.02)
    assert found == (0, text, "")


@pytest.mark.parametrize(
    ("tool", "why"),
    [("sleep 1000", "does not come to an end"), ("while :; do :; done", "of a processor's time")],
)
def test_a_tool_that_hangs_is_given_up(tool: str, why: str) -> None:
    with pytest.raises(TryAgain, match=why):
        commands.output(["sh", "-c", tool], patience=0.1)
