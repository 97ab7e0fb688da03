"""Names that strangers chose are harmless from where they enter."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrace.batch import Names, Netns, Owner
from ctrace.host import cgroup, netns, process
from ctrace.lab import Lab
from ctrace.names import clean
from ctrace.recording.format.meta import names_json, parse_names
from ctrace.ruleset.installed import tagged_lines, tagged_rules

EVIL = "\x1b]0;owned\x07\x1b[31mEVIL\u202e\x0b\r\x85\u2028"
ANY = st.text(max_size=40) | st.sampled_from((EVIL, "\u05d0\u0300\u0301\u0302", "\ud800"))


def harmless(text: str) -> bool:
    """No character that a terminal obeys or that reorders its neighbours."""
    return not any(
        unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(one) in ("R", "AL", "RLO", "LRO", "RLE", "LRE", "RLI", "LRI")
        for one in text
    )


@given(ANY)
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    assert harmless(clean(text))
    assert clean(clean(text)) == clean(text)


@given(ANY.filter(lambda text: "/" not in text))
def test_what_a_cgroup_is_called_is_harmless(name: str) -> None:
    for path in (f"/{name}", f"/a.slice/{name}.service", f"/lxc/{name}", f"/machine-{name}.scope"):
        for called in (cgroup.label(path), cgroup.unit(path), cgroup.container(path)):
            assert harmless(called)


def test_an_escape_in_systemds_own_spelling_is_harmless_too() -> None:
    assert harmless(cgroup.unit("/a\\x1b\\x5b31m.service"))


@given(ANY, ANY, ANY, ANY)
def test_names_of_a_strangers_recording_are_harmless(
    comm: str, unit: str, cmdline: str, name: str
) -> None:
    owner = Owner(1 << 32, comm, 7, unit, cmdline)
    told = Names(
        {5: Netns(5, name, (name,), True)}, {owner.key: owner}, {7: unit}, {(5, 6, 80): owner}
    )
    back = parse_names(json.loads(json.dumps(names_json(told))))
    for one in (back.owners[owner.key], back.listeners[5, 6, 80]):
        assert harmless(one.comm + one.unit + one.cmdline)
    assert harmless(back.netns[5].name + "".join(back.netns[5].addresses) + back.cgroups[7])


@pytest.mark.kernel
def test_a_living_process_in_a_cgroup_that_an_enemy_named() -> None:
    root = process.cgroup_root()
    if not root:
        pytest.skip("no cgroup v2 here")
    folder = f"{root}/".encode() + f"ctrace-{os.getpid()}{EVIL}".encode() + b"\xff.service"
    os.mkdir(folder)
    code = "open('/proc/self/comm', 'w').write('\\x1b[2J')\nprint(flush=True)\ninput()"
    try:
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            try:
                assert child.stdout
                child.stdout.readline()
                with open(folder + b"/cgroup.procs", "w") as file:
                    file.write(str(child.pid))
                path = cgroup.of_pid(child.pid)
                assert os.fsencode(path).endswith(folder.rpartition(b"/")[2])  # as it is
                owner = process.owner_of_pid(child.pid, os.stat(folder).st_ino)
            finally:
                child.kill()
    finally:
        while True:  # the kernel lets go of it a moment after the child has ended
            with contextlib.suppress(OSError):
                os.rmdir(folder)
            if not os.path.exists(folder):
                break
    assert owner is not None
    assert "EVIL" in owner.unit
    assert harmless(owner.comm + owner.unit + owner.cmdline)


@pytest.mark.kernel
def test_a_namespace_is_found_by_the_name_that_it_was_given() -> None:
    with Lab() as lab:
        node = lab.namespace("a")
        name = f"ctrace-{os.getpid()}-\x1b[31m\u202e"
        os.makedirs("/run/netns", exist_ok=True)
        point = f"/run/netns/{name}"
        with open(point, "x"):
            pass
        try:
            subprocess.run(["mount", "--bind", node.path, point], check=True)
            try:
                shown = {one.inum: one.name for one in netns.Finder().find()}[node.inum]
                assert harmless(shown)
                assert netns.resolve(name) == netns.resolve(shown) == node.inum
            finally:
                subprocess.run(["umount", point], check=True)
        finally:
            os.unlink(point)


def test_rules_that_a_stranger_names_like_ours_are_none_of_ours() -> None:
    """Who has a namespace of his own puts what he likes into the comments and names there."""
    evil = "ctrace:\x1b]0;owned\x07:tcp:80:to"
    saved = [
        '[1:60] -A INPUT -m comment --comment "ctrace:', '" -j ACCEPT',
        f'[1:60] -A INPUT -m comment --comment "{evil}" -j ACCEPT',
        '[1:60] -A x\x1b -m comment --comment "ctrace:server:tcp:80:to" -j ACCEPT',
        '[7:60] -A ufw-user.in -m comment --comment "ctrace:server:tcp:80:to" -j ACCEPT',
    ]  # fmt: skip
    text = "\n".join(["*filter", *saved, "COMMIT"])
    assert [rule.packets for rule in tagged_lines(text, "iptables-nft", "ip")] == [7]

    def rule(tag: str, table: str = "filter", chain: str = "INPUT") -> dict[str, Any]:
        body = {"family": "ip", "table": table, "chain": chain, "handle": 4, "comment": tag}
        return {"rule": body}

    ours = [
        "ctrace:server:tcp:80:to",
        "ctrace:drop-source:2001:db8::/32",
        "ctrace:limit-source:udp:53",
        "ctrace:jump",
    ]
    objects = [
        rule(evil),
        rule(ours[0], table='f; include "/etc/shadow"'),
        rule(ours[0], chain="c\nflush ruleset"),
        *map(rule, ours),
    ]
    assert [one.tag for one in tagged_rules(objects, set())] == ours
