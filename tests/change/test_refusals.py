"""What apply refuses: in one line, with nothing changed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from kit.changes import PORT, TRACKED, make_plan, rules_of
from kit.examples import examples

from ctrace.advice.again import judge_plan
from ctrace.change import apply, guard, notes, undo
from ctrace.cli.changes.applied import command as applied_verb
from ctrace.cli.changes.apply import command as apply_command
from ctrace.cli.changes.undo import command as undo_verb
from ctrace.errors import CtraceError, UsageError
from ctrace.host import commands
from ctrace.host.netns import Namespace
from ctrace.lab import Lab
from ctrace.plan import plan as plans
from ctrace.plan.plan import CtTimeout, Notrack, Plan

GOOD = Plan(
    created=1,
    host="host",
    netns=4026531840,
    netns_name="init",
    fingerprint="0" * 64,
    backend="nft",
    levers=(
        Notrack("tcp", PORT, ("server",), addresses=("10.0.0.1",)),
        CtTimeout("udp", 53, ("client",), (("unreplied", 5),)),
    ),
)

HOSTILE = st.one_of(
    st.sampled_from(
        [
            "$(reboot)", "`id`", "; rm -rf /", "80 } ; delete table inet fw", "\n*filter\n-F",
            '" accept comment "', "@armed", "-j ACCEPT", "../../etc/passwd", "\x00", "ctrace", "",
        ]
    ),
    st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=30),
    st.lists(st.text(max_size=5), max_size=3), st.dictionaries(st.text(max_size=5), st.none()),
)  # fmt: skip


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path to a value in a JSON document."""
    found = [at] if at else []
    pairs: list[tuple[Any, Any]] = []
    if isinstance(document, dict):
        pairs = list(document.items())
    elif isinstance(document, list):
        pairs = list(enumerate(document))
    for key, value in pairs:
        found += places(value, (*at, key))
    return found


@examples(150)
@given(st.data())
def test_a_plan_edited_by_hand_stays_within_its_fields(data: st.DataObject) -> None:
    """Whatever is written into a field: refused in one line, or rules of the same shape."""
    document = json.loads(plans.to_json(GOOD))
    *parents, last = data.draw(st.sampled_from(places(document)))
    value = data.draw(HOSTILE)
    inner = document
    for key in parents:
        inner = inner[key]
    inner[last] = value
    try:
        plan = plans.from_json(json.dumps(document))
    except UsageError as refusal:
        assert len(str(refusal).splitlines()) == 1  # noqa: PT017
        return
    text = apply.describe(plan, 60)
    scripts = [line for line in text.splitlines() if not line.startswith(("#", "Plan", "  "))]
    words = set(" ".join(scripts).split())
    assert not words & {"$(reboot)", "`id`", "rm", "reboot", "-F"}
    assert "fw" not in words
    assert [line for line in scripts if line.startswith("delete")] == ["delete table inet ctrace"]


@examples(60)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_file_gets_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    file.write_bytes(content)
    result = CliRunner().invoke(apply_command, [str(file), "--yes"])
    assert isinstance(result.exception, CtraceError)
    assert result.exception.exit_code == 1  # as for any file that can't be read
    assert len(str(result.exception).splitlines()) == 1


CHANGES: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    "another host": (lambda plan: replace(plan, host="elsewhere"), "is for host 'elsewhere'"),
    "namespace gone": (lambda plan: replace(plan, netns=4026539999), "is gone"),
    "other rules": (lambda plan: replace(plan, fingerprint="1" * 64), "changed since the plan"),
}


@pytest.mark.kernel
@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_that_does_not_fit(lab: Lab, name: str) -> None:
    change, message = CHANGES[name]
    node = lab.namespace("node")
    node.run(["nft", "-f", "-"], stdin=TRACKED)
    before = rules_of(node)
    with pytest.raises(CtraceError, match=message):
        apply.prepare(change(make_plan(node)))
    assert rules_of(node) == before


@pytest.mark.kernel
def test_rules_changed_between_advise_and_apply(lab: Lab) -> None:
    node = lab.namespace("node")
    node.run(["nft", "-f", "-"], stdin=TRACKED)
    plan = make_plan(node)
    prepared = apply.prepare(plan)
    node.run(["nft", "add", "rule", "inet", "fw", "in", "tcp", "dport", "22", "drop"])
    before = rules_of(node)
    with pytest.raises(CtraceError, match="changed since the plan"):
        apply.prepare(plan)
    with pytest.raises(CtraceError, match="changed just now"):
        apply.start(prepared, 30)
    assert rules_of(node) == before
    assert notes.read(node.inum) is None


@pytest.mark.kernel
def test_a_namespace_that_goes_away(lab: Lab) -> None:
    node = lab.namespace("node", track=True)
    plan = make_plan(node)
    prepared = apply.prepare(plan)
    node.close()
    for attempt in (lambda: apply.prepare(plan), lambda: apply.start(prepared, 30)):
        with pytest.raises(CtraceError) as caught:
            attempt()
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.kernel
def test_without_nft(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    node = lab.namespace("node", track=True)
    plan = make_plan(node)
    before = rules_of(node)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.setattr(commands, "SBIN", "")
        with pytest.raises(CtraceError, match="nft"):
            apply.prepare(plan)
    assert rules_of(node) == before


@pytest.mark.kernel
@pytest.mark.parametrize("within", [0, 4, 3601, -1])
def test_times_to_confirm_out_of_range(lab: Lab, within: int) -> None:
    node = lab.namespace("node", track=True)
    prepared = apply.prepare(make_plan(node))
    before = rules_of(node)
    with pytest.raises(CtraceError, match="from 5 to 3600"):
        apply.start(prepared, within)
    assert rules_of(node) == before


@pytest.mark.kernel
def test_confirming_too_late_or_nothing(lab: Lab) -> None:
    node = lab.namespace("node", track=True)
    with pytest.raises(CtraceError, match="no trial"):
        apply.confirm(node.inum)
    apply.start(apply.prepare(make_plan(node)), 30)
    # What the kernel does at the deadline.
    node.run(["nft", "flush", "set", "inet", "ctrace", "armed"])
    with pytest.raises(CtraceError, match="trial is over"):
        apply.confirm(node.inum)
    undo.undo(node.inum)


@pytest.mark.kernel
def test_a_rule_that_the_kernel_refuses_changes_nothing(lab: Lab) -> None:
    node = lab.namespace("node", track=True)
    accept = plans.Accept("nft", "inet", "nosuch", "in", 0, "input", "server", "to")
    plan = make_plan(node, accepts=(accept,))
    before = rules_of(node)
    with pytest.raises(CtraceError, match="can't be applied here"):
        apply.prepare(plan)
    assert rules_of(node) == before


@pytest.mark.kernel
def test_rollback_hazards_are_named(lab: Lab) -> None:
    node = lab.namespace("node", track=True)
    node.sysctl("net.netfilter.nf_conntrack_tcp_loose", 0)
    node.run(
        ["iptables-nft", "-A", "INPUT", "-p", "tcp", "!", "--syn", "-m", "conntrack",
         "--ctstate", "NEW", "-j", "DROP"]
    )  # fmt: skip
    assert not apply.prepare(make_plan(node, roles=("client",))).warnings, "these have sockets"
    warnings = apply.prepare(make_plan(node, roles=("forward",))).warnings
    assert len(warnings) == 2
    assert "tcp_loose is 0" in warnings[0]
    assert "without" in warnings[1]


def judge_by_one_that_ended(plan: Plan, space: Namespace) -> Plan:
    """In a namespace known by a process that has ended meanwhile."""
    return judge_plan(plan, replace(space, path="/proc/4194305/ns/net"))


@pytest.mark.kernel
def test_rules_that_changed_are_judged_again(lab: Lab) -> None:
    """A ban makes no difference; a translation of the port does, and is named."""
    node, other = lab.namespace("node"), lab.namespace("other")
    lab.link(node, other)
    node.run(["nft", "-f", "-"], stdin=TRACKED)
    plan = make_plan(node)
    node.run(["nft", "add", "rule", "inet", "fw", "in", "ip", "saddr", "192.0.2.7", "drop"])
    prepared = apply.prepare(plan, judge_by_one_that_ended)
    assert "judged again" in prepared.warnings[0]
    assert prepared.plan.fingerprint != plan.fingerprint
    node.run(["nft", "add", "rule", "inet", "fw", "in", "ip", "saddr", "192.0.2.8", "drop"])
    trial = apply.start(prepared, 30)  # once more, between prepare and start
    assert undo.applied(node.inum)
    apply.revert(trial)
    node.run(["nft", "-f", "-"], stdin="table ip nat {\nchain pre {\n"
             "type nat hook prerouting priority dstnat;\n"
             f"tcp dport {PORT} redirect to :9\n}}\n}}\n")  # fmt: skip
    before = rules_of(node)
    with pytest.raises(CtraceError, match=f"tcp/{PORT} is (unsafe|cannot-say)"):
        apply.prepare(plan, judge_plan)
    assert rules_of(node) == before


@pytest.mark.kernel
def test_a_namespace_that_vanishes_while_all_are_looked_at(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing and undoing go on with the others."""
    from ctrace.host import netns

    node = lab.namespace("node", track=True)
    gone = netns.Namespace(4026539998, "gone", "/proc/4194305/ns/net")
    here = [space for space in netns.find() if space.inum == node.inum]
    apply.start(apply.prepare(make_plan(node)), 30)
    looks = itertools.count()
    monkeypatch.setattr(netns, "find", lambda: here if next(looks) % 2 else [gone, *here])
    assert [change.namespace.inum for change in undo.applied()] == [node.inum]
    assert [change.namespace.inum for change in undo.undo()] == [node.inum]
    assert not undo.applied()


@pytest.mark.kernel
@pytest.mark.parametrize("path", ["/proc/4194305/ns/net", "/proc/self/ns/net"])
def test_a_namespace_known_by_a_process_that_ended_or_only_looked_in(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Its rules are found all the same, and taken back: by undo, and by the trial's guard."""
    from ctrace.host import netns

    node = lab.namespace("node", track=True)
    before = rules_of(node)
    apply.start(apply.prepare(make_plan(node)), 30)
    real = next(space for space in netns.find() if space.inum == node.inum)
    other = replace(real, path=path)
    answers = iter([[other], [other], [real]])
    with monkeypatch.context() as patch:
        patch.setattr(netns, "find", lambda: next(answers, [real]))
        assert [change.namespace.inum for change in undo.applied(node.inum)] == [node.inum]
        answers = iter([[other], [other], [real]])
        assert [change.namespace.inum for change in undo.undo(node.inum)] == [node.inum]
    assert rules_of(node) == before
    apply.start(apply.prepare(make_plan(node)), 30)
    note = notes.read(node.inum)
    assert note
    assert guard._tidied(netns.Way(node.inum, other), note)
    assert rules_of(node) == before


@pytest.mark.kernel
def test_a_namespace_that_cannot_be_read_keeps_no_other_from_an_answer(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever has one of his own can make nft fail in it, or never end."""
    from ctrace.host import netns

    node, stranger = lab.namespace("node"), lab.namespace("stranger")
    before = rules_of(node)
    apply.start(apply.prepare(make_plan(node)), 60)
    shim = tmp_path / "nft"
    shim.write_text(
        f"#!/bin/sh\n[ $(readlink /proc/self/ns/net) = 'net:[{stranger.inum}]' ] && exit 1\n"
        f'exec {shutil.which("nft")} "$@"\n'
    )
    shim.chmod(0o755)
    ours = [space for space in netns.find() if space.inum in (node.inum, stranger.inum)]
    name = next(space.name for space in ours if space.inum == stranger.inum)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        patch.setattr(netns, "find", lambda: ours)
        note = notes.read(node.inum)
        assert note
        notes.write(replace(note, netns=4026539998))  # of one that is gone
        asked = CliRunner().invoke(undo_verb, [])
        assert "name it with --netns" in str(asked.exception)
        assert not notes.path(4026539998).exists(), "swept by the way"
        for verb, told in ((applied_verb, "on trial"), (undo_verb, "removed server tcp/8063")):
            ran = CliRunner().invoke(verb, ["-y"] if verb is undo_verb else [])
            assert told in ran.output
            assert isinstance(ran.exception, CtraceError)
            assert f"{name} cannot be read" in str(ran.exception)
    assert rules_of(node) == before
