"""How often the guard has a change judged again, by made processes and a made clock; what is told
of a change that is off, and undone of it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, cast

import pytest

from ctrace.advice import again, hazards
from ctrace.advice.facts import Facts
from ctrace.change import apply, condition, guard, keep, notes, undo, watch
from ctrace.change.standing import Generation, Standing
from ctrace.errors import CtraceError, TryAgain
from ctrace.host import commands, netns
from ctrace.host.netns import Namespace
from ctrace.plan import plan as plans
from ctrace.rehearsal.snapshot import Snapshot
from ctrace.ruleset.model import Ruleset

TOOK_S = 40
EMPTY = Snapshot((), (), (), (), (), (), (), (), (), (), ())


class Made:
    """What the guard starts, in place of subprocess, and the clock that it reads."""

    DEVNULL = -3

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.now = 1000.0
        self.began: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def Popen(self, *_: object, **__: object) -> SimpleNamespace:
        if self.codes and self.codes[0] < 0:
            self.codes.pop(0)
            raise BlockingIOError("no more processes")
        code = self.codes.pop(0) if self.codes else 0
        ends = self.now + TOOK_S
        self.began.append(self.now)

        def poll() -> Optional[int]:
            return code if self.now >= ends else None

        return SimpleNamespace(poll=poll, kill=int, wait=int, returncode=code)


def watched(monkeypatch: pytest.MonkeyPatch, made: Made, seconds: int, change_s: int) -> None:
    """A guard looks once a second; rules change every ``change_s``."""
    monkeypatch.setattr(guard, "subprocess", made)
    monkeypatch.setattr(guard, "time", made)
    one = guard.Guard(1)
    one._again = made.now + 2 * seconds  # when it may be put back is another matter
    for second in range(seconds):
        made.now += 1
        try:
            one._rejudge((second // change_s, ()))
        except OSError:
            continue


def noted(inum: int, plan: str, **more: Any) -> None:
    """A confirmed change's note."""
    note = notes.Note(inum, notes.boot_id(), plan, applied=0, deadline=0.0, flush=False)
    notes.write(replace(note, **more))


def test_a_judgement_that_failed_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first could not be started, the second failed, the third told."""
    made = Made(-1, 1, 0)
    watched(monkeypatch, made, 5000, 5000)
    assert len(made.began) == 2


def test_rules_that_always_change_cost_a_twentieth(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made()
    watched(monkeypatch, made, 20_000, 10)
    assert len(made.began) > guard.AT_ONCE
    least = guard.AT_ONCE + 1
    assert len(made.began) * TOOK_S <= least * TOOK_S + 20_000 / guard.SHARE


def untracked(here: int, backend: str) -> plans.Plan:
    """A plan for a web server of a namespace."""
    web = plans.Notrack("tcp", 80, ("server",))
    return replace(plans.alone(web, backend=backend), netns=here, netns_name="here")


def test_what_is_off_without_a_rule_is_told_so_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """iptables' rules are removed while a change is off, and a reload has dropped its accepts."""
    here = os.stat("/proc/self/ns/net").st_ino
    space = Namespace(here, "here", "/proc/self/ns/net")
    plan = untracked(here, "iptables-legacy")
    monkeypatch.setattr(netns, "find", lambda: [space])
    monkeypatch.setattr(undo, "applied", lambda _only=None: [])
    monkeypatch.setattr(Standing, "look", lambda *_: (False, ()))
    noted(here, plans.to_json(plan), said="off since 12:00:00", off=True)
    assert [(c.state, c.told) for c in condition.conditions()] == [
        (condition.OFF, "off since 12:00:00")
    ]
    undo.undo(here)
    assert notes.read(here) is None, "so nothing puts it back"


def test_an_undo_that_was_killed_half_way_is_finished_by_the_next(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rules are gone, its note is not; a draft of the note was being written."""
    here = os.stat("/proc/self/ns/net").st_ino
    monkeypatch.setattr(netns, "find", lambda: [Namespace(here, "here", "/proc/self/ns/net")])
    monkeypatch.setattr(undo, "applied", lambda _only=None: [])
    noted(here, plans.to_json(untracked(here, "nft")))
    undo.undo()
    notes.path(here).with_suffix(".new").touch()
    undo.undo()
    assert [path.suffix for path in state.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("failure", "is_objection"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), False),
        (MemoryError(), False),
        (TryAgain("the kernel did not answer in time"), False),
        (CtraceError("neither the tun nor the veth module is loaded"), True),
    ],
)
def test_no_memory_or_time_is_no_objection(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, is_objection: bool
) -> None:
    """The change stays in force until it can be judged; what would always stand in the way is
    one."""
    here = os.stat("/proc/self/ns/net").st_ino
    space = Namespace(here, "here", "/proc/self/ns/net")
    plan = untracked(here, "nft")

    def refused(*_: object) -> None:
        raise failure

    about = Facts(ruleset=Ruleset(), snapshot=EMPTY)
    monkeypatch.setattr(again, "facts", lambda _: about)
    monkeypatch.setattr(hazards, "Room", refused)
    monkeypatch.setattr(apply, "fingerprint", lambda _: "1" * 64)
    monkeypatch.setattr(condition, "fingerprint", lambda _: "1" * 64)
    monkeypatch.setattr(Standing, "look", lambda *_: (True, ()))
    monkeypatch.setattr(apply, "locate", lambda _: space)
    monkeypatch.setattr(keep, "off", lambda _: None)
    notes.write(
        notes.Note(
            netns=here,
            boot=notes.boot_id(),
            plan=plans.to_json(plan),
            applied=0,
            deadline=0,
            flush=False,
        )
    )
    if is_objection:
        apply.look_again(here, again.judge_plan, again.objection)
    else:
        with pytest.raises(TryAgain):
            apply.look_again(here, again.judge_plan, again.objection)
        told = condition.of(space, again.objection)
        assert "judging it again failed" in told
    found = notes.read(here)
    notes.forget(here)
    assert found
    assert found.off == is_objection


def test_a_lease_is_renewed_at_once_after_a_suspend_or_a_set_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = {"boot": 1000.0, "wall": 1e9}
    monkeypatch.setattr(notes, "now", lambda: clock["boot"])
    monkeypatch.setattr(guard, "time", SimpleNamespace(time=lambda: clock["wall"]))
    one = guard.Guard(1)

    def due(boot: float, wall: float) -> bool:
        clock["boot"] += boot
        clock["wall"] += wall
        return one._is_due()

    assert due(0, 0), "the first"
    assert not due(1, 1)
    assert due(1, 3600), "set forward"
    assert not due(1, 1)
    assert due(1, -7200), "set back"
    assert not due(1, 1)
    assert due(3600, 3600), "suspended: no time has passed for CLOCK_MONOTONIC"
    assert not due(keep.RENEW_S - 1, keep.RENEW_S - 1)
    assert due(1, 1)


def test_a_host_that_can_start_nothing_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    with pytest.raises(CtraceError, match="guard cannot be started: Resource"):
        apply.start_guard(1)
    with pytest.raises(CtraceError, match="sh cannot be started: Resource"):
        commands.output(["sh"])


def test_what_others_change_during_a_renewal_is_not_taken_for_it() -> None:
    """A renewal in nftables is one transaction."""
    cases: list[tuple[Generation, bool]] = [
        ((6, ()), True),
        ((7, ()), False),
        ((6, (("ip raw", 1),)), False),
    ]
    for after, taken in cases:
        one = guard.Guard(1)
        one._generation = (5, ())
        one._seen((5, ()), after, "nft")
        assert (one._generation == after) is taken


def test_a_plan_of_another_version_hides_no_other_change(monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = [
        Namespace(inum, f"n{inum}", f"/proc/{inum}/ns/net") for inum in (4026533001, 4026533002)
    ]
    monkeypatch.setattr(netns, "find", lambda: spaces)
    monkeypatch.setattr(netns.Way, "held", lambda way: contextlib.nullcontext(way._known))
    monkeypatch.setattr(Standing, "look", lambda *_: (True, ()))
    monkeypatch.setattr(notes, "guarded", lambda _inum: True)
    whole = plans.alone(plans.Notrack("tcp", 80, ("server",)))
    plan = plans.to_json(replace(whole, netns_name="n", host="h"))
    noted(spaces[0].inum, plan.replace('"version": 1', '"version": 2'))
    noted(spaces[1].inum, plan)
    found = {one.name: one for one in condition.conditions()}
    assert found["n4026533002"].state == condition.HOLDS
    assert "another version" in found["n4026533001"].told


def test_whether_a_guard_lives_is_seen_where_nothing_may_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a unit with ProtectSystem=strict, in which /run is read-only."""
    lock = notes.claim(4026533001)
    assert lock is not None
    plain = os.open

    def read_only(path: str, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return plain(path, flags, *rest, **more)

    with monkeypatch.context() as inside:
        inside.setattr(os, "open", read_only)
        assert notes.guarded(4026533001)
    os.close(lock)
    assert not notes.guarded(4026533001)


def test_a_guard_outlives_a_state_that_it_cannot_read(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody made the folder readable to all for a moment: it is no reason to leave a trial."""
    noted(1, "{}", over=True)
    state.chmod(0o755)
    made = Made()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            state.chmod(0o700)

    monkeypatch.setattr(guard, "time", SimpleNamespace(sleep=sleep, monotonic=made.monotonic))
    guard.Guard(1).run()
    assert len(slept) == 3, "it went on until it could read that the change is over"


def test_probes_where_the_kernel_has_no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """ipv6.disable=1: socket(2) itself refuses the family."""

    class NoSix(socket.socket):
        def __init__(self, family: int = -1, *rest: Any, **more: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *rest, **more)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(socket, "socket", NoSix)
        wanted = [("127.0.0.1", port), ("::1", port)]
        assert watch.answering(wanted) == {("127.0.0.1", port)}


def test_what_another_confirms_is_not_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One asks whether to keep it, and somebody else keeps it meanwhile."""
    space = Namespace(4026533001, "n", "/nowhere")
    plan = plans.alone(plans.Notrack("tcp", 80, ("server",)))
    prepared = apply.Prepared(plan, space, (), "nothing")
    trial = apply.Trial(prepared, 99.5, cast(watch.Watch, None))
    taken: list[int] = []
    monkeypatch.setattr(apply, "inside", lambda _space: contextlib.nullcontext(""))
    monkeypatch.setattr(apply, "_take_back", lambda space, *_: taken.append(space.inum))
    noted(space.inum, "{}", deadline=99.5)
    assert not apply.fate(trial)
    assert apply.revert(trial)
    noted(space.inum, "{}")
    assert "it stays" in apply.fate(trial)
    assert not apply.revert(trial)
    noted(space.inum, "{}", deadline=300.0)
    assert "another trial" in apply.fate(trial)
    assert not apply.revert(trial)
    noted(space.inum, "{}", over=True, said="taken back")
    assert apply.fate(trial) == "taken back"
    assert apply.revert(trial)
    assert len(taken) == 2


def test_a_state_folder_of_others_hides_no_rules(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Advice has the rules all the same, and says what is wrong with the folder."""
    space = Namespace(os.stat("/proc/self/ns/net").st_ino, "n", "/proc/self/ns/net")
    monkeypatch.setattr(again, "find", lambda: [space])
    monkeypatch.setattr(again, "facts", lambda _path: Facts(addresses=("192.0.2.1",)))
    state.mkdir(mode=0o755)
    about = again.facts_of(space.inum)
    assert about is not None
    assert about.addresses == ("192.0.2.1",)
    assert "not a private directory" in about.condition
