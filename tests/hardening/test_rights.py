"""What a verb can do with few capabilities, and what it says without them."""

from __future__ import annotations

import os
import subprocess

import pytest
from click.testing import CliRunner

from ctrace import interpreter
from ctrace.cli import VERBS, cli, rights
from ctrace.lab import Lab, traffic

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.kernel,
]


def with_only(capabilities: str, *arguments: str) -> list[str]:
    sets = f"-all{capabilities}"
    return ["setpriv", f"--bounding-set={sets}", f"--inh-caps={sets}",
            *interpreter.module("ctrace", *arguments)]  # fmt: skip


def test_netlink_in_its_own_namespace_needs_net_admin_alone() -> None:
    with Lab() as lab:
        a, b = lab.namespace("a", track=True), lab.namespace("b")
        lab.link(a, b)
        argv = with_only(",+net_admin", "trace", "--hooks", "netlink", "--count", "20",
                         "--kinds", "insert", "--duration", "60")  # fmt: skip
        tracing = a.start(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        first = 20_000
        while tracing.poll() is None and first < 60_000:  # until it listens
            traffic.udp_flows(a, (b.addresses["a"][0], 9), 20, first_port=first)
            first += 20
        out, said = tracing.communicate(timeout=120)
    assert tracing.returncode == 0, said
    inserts = [line for line in out.decode().splitlines() if " insert " in line]
    assert len(inserts) == 20
    assert all(a.addresses["b"][0] in line for line in inserts)


def test_without_it_the_message_names_what_is_missing() -> None:
    with Lab() as lab:
        node = lab.namespace("a", track=True)
        done = node.start(
            with_only("", "trace", "--hooks", "netlink", "--duration", "1"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        said = done.communicate(timeout=120)[1].decode()
    assert done.returncode == 1
    assert "CAP_NET_ADMIN" in said
    assert len(said.strip().splitlines()) == 1


LIVE = ",+bpf,+perfmon,+net_admin,+sys_admin,+sys_ptrace,+syslog,+dac_read_search"
NONE = [
    ("trace", "--duration", "1"), ("record", "--duration", "1", "-o", "/nowhere/x", "-q"),
    ("top", "--once"), ("perf", "--duration", "1"), ("advise",), ("applied",), ("undo",),
    ("demo",),
]  # fmt: skip


def test_each_verb_names_what_it_lacks() -> None:
    """Without any right: one line that names each that the verb takes, and exit status 1."""
    with Lab() as lab:
        node = lab.namespace("a", track=True)
        running = [
            (argv, node.start(with_only("", *argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE))
            for argv in NONE
        ]
        for argv, one in running:
            said = one.communicate(timeout=120)[1].decode()
            assert one.returncode == 1, (argv, said)
            last = said.strip().splitlines()[-1]
            for name in rights.RIGHTS[argv[0]]:
                assert name in last, (argv, said)


def test_the_rights_of_the_units_are_enough_to_look() -> None:
    with Lab() as lab:
        node = lab.namespace("a", track=True)
        for argv in (("trace", "--duration", "1"), ("perf", "--duration", "1")):
            one = node.start(with_only(LIVE, *argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            said = one.communicate(timeout=120)[1].decode()
            assert one.returncode == 0, (argv, said)
    named = {f"CAP_{word[1:].upper()}" for word in LIVE.split(",") if word}
    assert named == set(rights.RIGHTS["trace"])


def test_help_says_what_a_verb_takes() -> None:
    for verb in VERBS:
        told = " ".join(CliRunner().invoke(cli, [verb, "--help"]).output.split())
        assert rights.sentence(verb) in told, verb
