"""A reload of the firewall drops a confirmed change's accepts: its NOTRACK goes with them."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from kit.changes import PORT, STRICT, guards, make_plan, rules_of
from kit.command import said
from kit.traffic import tcp_connections, tcp_server

from ctrace.advice.again import facts_of
from ctrace.change import apply, condition, keep, notes, undo
from ctrace.errors import CtraceError
from ctrace.host import ctnetlink, netns
from ctrace.lab import Lab, Node
from ctrace.plan import plan as plans
from ctrace.plan.plan import Accept
from ctrace.view.export.openmetrics import Exposition

pytestmark = pytest.mark.kernel
LONG = 120
FILTER = (
    "*filter\n:INPUT DROP [0:0]\n-A INPUT -i lo -j ACCEPT\n-A INPUT -p icmp -j ACCEPT\n"
    "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
    f"-A INPUT -p tcp -m conntrack --ctstate NEW -m tcp --dport {PORT} -j ACCEPT\nCOMMIT\n"
)
REDIRECT = (
    f"table ip n {{ chain pre {{ type nat hook prerouting priority -100; "
    f"tcp dport {PORT} redirect to :{PORT + 1}\n }}\n}}\n"
)
NATIVE = "delete table inet fw\n" + STRICT
KINDS: dict[str, tuple[list[str], str, str, Accept]] = {
    "nft": (["nft", "-f", "-"], STRICT, NATIVE,
            Accept("nft", "inet", "fw", "in", -1, "input", "server", "to")),
    **{
        tool: ([f"{tool}-restore"], FILTER, FILTER,
               Accept(tool, "ip", "filter", "INPUT", -1, "input", "server", "to"))
        for tool in ("iptables-nft", "iptables-legacy")
    },
}  # fmt: skip
"""Loader, firewall, what a reload loads, the accept that the plan needs."""


@contextmanager
def confirmed(lab: Lab, kind: str, backend: str = "nft") -> Iterator[tuple[Node, Node, str]]:
    """A server behind such a firewall with a confirmed change, its client, its address."""
    argv, rules, _, accept = KINDS[kind]
    server, client = lab.namespace("server"), lab.namespace("client")
    lab.link(server, client)
    server.run(argv, stdin=rules)
    address = server.addresses["client"][0]
    plan = make_plan(server, accepts=(accept,), backend=backend)
    with tcp_server(server, PORT):
        apply.start(apply.prepare(plan), 60)
        apply.confirm(server.inum)
        untracked(server, client, address)
        yield server, client, address
        undo.undo(server.inum)
        until(lambda: not notes.guarded(server.inum), "the guard ends with the change")


def works(client: Node, address: str, timeout: float = 30) -> bool:
    return len(tcp_connections(client, (address, PORT), 1, timeout=timeout).flows) == 1


def comes_back(client: Node, address: str) -> None:
    """A lost first packet is sent again after a second, then after two: ask anew instead."""
    until(lambda: works(client, address, 1), "the service is back")


def untracked(server: Node, client: Node, address: str) -> None:
    ctnetlink.flush(server.path)
    assert works(client, address)
    assert not entries(server), "nothing of it is tracked"


def entries(server: Node) -> int:
    found = ctnetlink.dump(server.path)
    return int(((found["dport"] == PORT) | (found["sport"] == PORT)).sum())


def until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def state(server: Node) -> str:
    return next((c.state for c in condition.conditions() if c.netns == server.inum), "")


@pytest.mark.parametrize(
    ("kind", "backend"),
    [("nft", "nft"), ("iptables-nft", "nft"), ("iptables-legacy", "iptables-legacy")],
)
def test_the_service_survives_and_the_change_comes_back(lab: Lab, kind: str, backend: str) -> None:
    with confirmed(lab, kind, backend) as (server, client, address):
        server.run(KINDS[kind][0], stdin=KINDS[kind][2])
        comes_back(client, address)
        until(lambda: "put back" in note(server), "it was judged again and put back")
        assert state(server) == condition.HOLDS
        untracked(server, client, address)


def note(server: Node) -> str:
    found = notes.read(server.inum)
    return found.said if found else ""


def test_what_is_not_safe_any_more_stays_off(lab: Lab) -> None:
    """The new rules redirect the port, which needs tracking."""
    with confirmed(lab, "nft") as (server, client, address), tcp_server(server, PORT + 1):
        server.run(["nft", "-f", "-"], stdin=REDIRECT + NATIVE.replace("8063", "8063-8064"))
        comes_back(client, address)
        until(lambda: "not put back" in note(server), "it was judged")
        assert state(server) == condition.OFF
        ctnetlink.flush(server.path)
        assert works(client, address)
        assert entries(server), "it is tracked"


def the_guard(server: Node) -> int:
    until(lambda: len(guards({server.inum})) == 1, "there is one guard")
    return guards({server.inum})[0]


def test_all_who_are_asked_tell_at_once(lab: Lab) -> None:
    """With its guard stopped nobody can mend it: what is missing is told all the same."""
    from ctrace.cli.about.doctor import WARN, _about_changes

    with confirmed(lab, "iptables-nft") as (server, _, _address):
        guard = the_guard(server)
        os.kill(guard, signal.SIGSTOP)
        try:
            server.run(KINDS["iptables-nft"][0], stdin=FILTER)
            assert state(server) == condition.BROKEN
            about = facts_of(server.inum)
            assert about
            assert "ip filter INPUT" in about.condition
            assert [f.level for f in _about_changes() if str(server.inum) in f.text] == [WARN]
            told = said("applied", "--netns", str(server.inum))
            assert "confirmed, but its accepts are missing (ip filter INPUT)" in told
            shown = list(Exposition()._changes(condition.conditions()))
            (mine,) = [
                s
                for family in shown
                for s in family.samples
                if str(server.inum) in s.labels["netns"]
            ]
            assert (mine.value, mine.labels["state"]) == (0.0, "broken")
        finally:
            os.kill(guard, signal.SIGCONT)
        until(lambda: state(server) == condition.HOLDS, "it is mended")


@pytest.mark.parametrize(
    ("kind", "backend"), [("nft", "nft"), ("iptables-legacy", "iptables-legacy")]
)
def test_without_its_guard_it_ends_by_itself(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, kind: str, backend: str
) -> None:
    with confirmed(lab, kind, backend) as (server, client, address):
        os.kill(the_guard(server), signal.SIGKILL)
        until(lambda: not notes.guarded(server.inum), "it is dead")
        found = notes.read(server.inum)
        assert found
        monkeypatch.setattr(keep, "LEASE_S", 3)
        with server.enter():
            keep.renew(plans.from_json(found.plan))
        server.run(KINDS[kind][0], stdin=KINDS[kind][2])
        comes_back(client, address)
        assert state(server) == condition.BROKEN
        if kind == "nft":
            server.run(KINDS["nft"][0], stdin=NATIVE)


@pytest.mark.parametrize("removed", ["delete table inet ctrace", "flush chain inet ctrace pre"])
def test_taken_away_by_hand_it_stays_away(lab: Lab, removed: str) -> None:
    """Also half a pair of rules, which would cut the service off: the rest goes, too."""
    with confirmed(lab, "nft") as (server, client, address):
        server.run(["nft", *removed.split()])
        until(lambda: "ctrace" not in rules_of(server), "its accepts go, too")
        until(lambda: not notes.guarded(server.inum), "the guard ends")
        assert state(server) == condition.OVER
        assert "something else removed its rules" in said("applied")
        assert works(client, address)
        undo.undo(server.inum)
        assert state(server) == ""


@pytest.mark.parametrize("kind", ["nft", "iptables-legacy"])
def test_a_plan_without_accepts_is_judged_again_by_itself(lab: Lab, kind: str) -> None:
    server, client = lab.namespace("server", track=True), lab.namespace("client")
    lab.link(server, client)
    address = server.addresses["client"][0]
    with tcp_server(server, PORT):
        apply.start(apply.prepare(make_plan(server)), 60)
        apply.confirm(server.inum)
        assert notes.guarded(server.inum), "at once"
        assert len(guards({server.inum})) == 1, "it needs no second one"
        server.run(KINDS[kind][0], stdin=KINDS[kind][1])
        until(lambda: "would need an accept" in note(server), "what changed was seen")
        until(lambda: "put back" in note(server), "with the accept it is in place again")
        untracked(server, client, address)
    undo.undo(server.inum)


def test_what_nobody_watches_is_told(lab: Lab) -> None:
    """Who asks has it judged by the rules as they are by then."""
    server, client = lab.namespace("server", track=True), lab.namespace("client")
    lab.link(server, client)
    apply.start(apply.prepare(make_plan(server)), 60)
    apply.confirm(server.inum)
    os.kill(the_guard(server), signal.SIGKILL)
    until(lambda: state(server) == condition.UNWATCHED, "its guard is missed")
    server.run(["nft", "add", "table", "inet", "late"])
    assert "judged again now, it is safe; nothing sees" in said(
        "applied", "--netns", str(server.inum)
    )
    server.run(["nft", "-f", "-"], stdin=REDIRECT)
    about = facts_of(server.inum)
    assert about
    assert f"tcp/{PORT} is unsafe" in about.condition
    undo.undo(server.inum)


def test_rules_that_make_it_unsafe_take_it_off(lab: Lab) -> None:
    """Its accepts stand: that alone is not enough."""
    with confirmed(lab, "nft") as (server, client, address), tcp_server(server, PORT + 1):
        server.run(["nft", "-f", "-"], stdin=REDIRECT)
        until(lambda: f"tcp/{PORT} is unsafe" in note(server), "it was judged")
        assert state(server) == condition.OFF
        server.run(["nft", "insert rule inet fw in tcp dport 8064 accept"])
        ctnetlink.flush(server.path)
        assert works(client, address)
        assert entries(server), "it is tracked"


def test_on_trial_a_reload_takes_it_back(lab: Lab) -> None:
    server, client = lab.namespace("server"), lab.namespace("client")
    lab.link(server, client)
    server.run(["nft", "-f", "-"], stdin=STRICT)
    apply.start(apply.prepare(make_plan(server, accepts=(KINDS["nft"][3],))), LONG)
    server.run(["nft", "-f", "-"], stdin=NATIVE)
    until(lambda: not undo.applied(server.inum), "it is taken back")
    until(lambda: "accepts" in note(server), "and says why")
    with pytest.raises(CtraceError, match="accepts"):
        apply.confirm(server.inum)
    undo.undo(server.inum)


@pytest.mark.parametrize("backend", KINDS)
def test_rules_that_a_saved_firewall_brought_back_are_told(
    lab: Lab, state: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved while the change was in place, loaded at the next boot: there is no note, no guard."""
    server = lab.namespace("server", track=True)
    apply.start(apply.prepare(make_plan(server, backend=backend)), 60)
    apply.confirm(server.inum)
    os.kill(the_guard(server), signal.SIGKILL)
    shutil.rmtree(state)
    spaces = [space for space in netns.find() if space.inum == server.inum]
    monkeypatch.setattr(netns, "find", lambda: spaces)
    (told,) = condition.conditions()
    assert told.state == condition.UNWATCHED
    assert "no note" in condition.of(spaces[0])
    assert "no note" in said("applied", "--netns", str(server.inum))
    undo.undo(server.inum)
    assert not condition.conditions()


def test_the_namespace_is_not_kept_alive(lab: Lab, state: Path) -> None:
    """Also when ctrace itself runs in it, as with ip netns exec. Nothing of it is left."""
    server = lab.namespace("server", track=True)
    server.run(["nft", "-f", "-"], stdin=STRICT)
    with server.enter():
        apply.start(apply.prepare(make_plan(server, accepts=(KINDS["nft"][3],))), 60)
        until(lambda: notes.guarded(server.inum), "its guard is there")
        apply.confirm(server.inum)
    guard = the_guard(server)
    homes: set[str] = set()

    def at_home() -> bool:  # a thread of it may look into the namespace just now
        homes.clear()
        for task in glob.glob(f"/proc/{guard}/task/*/ns/net"):
            with suppress(FileNotFoundError):
                homes.add(os.readlink(task))
        return len(homes) == 1

    until(at_home, "all of the guard is in one namespace")
    (home,) = homes
    assert home != f"net:[{server.inum}]"
    with suppress(OSError):
        assert home == os.readlink("/proc/1/ns/net")
    server.close()
    until(lambda: not os.path.exists(f"/proc/{guard}") or dead(guard), "the guard ends")
    assert not list(state.iterdir())


def dead(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True
