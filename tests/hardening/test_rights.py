"""What a verb can do with few capabilities, and what it says without them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from kit import traffic

import ctrace
from ctrace import interpreter
from ctrace.cli import VERBS, cli, rights
from ctrace.lab import Lab, Node

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.kernel]


def with_only(capabilities: str, *arguments: str) -> list[str]:
    sets = f"-all{capabilities}"
    return ["setpriv", f"--bounding-set={sets}", f"--inh-caps={sets}",
            *interpreter.module("ctrace", *arguments)]  # fmt: skip


def test_netlink_in_its_own_namespace_needs_net_admin_alone() -> None:
    with Lab() as lab:
        a, b = lab.namespace("a", track=True), lab.namespace("b")
        lab.link(a, b)
        argv = with_only(",+net_admin", "trace", "--hooks", "netlink", "--count", "20",
                         "--kinds", "insert", "--duration", "120")  # fmt: skip
        tracing = a.start(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert tracing.stderr is not None
        said = b""
        while b"listening with" not in said:
            line = tracing.stderr.readline()
            assert line, said
            said += line
        traffic.udp_flows(a, (b.addresses["a"][0], 9), 20)
        out, rest = tracing.communicate(timeout=240)
        said += rest
    assert tracing.returncode == 0, said
    inserts = [line for line in out.decode().splitlines() if " insert " in line]
    assert len(inserts) == 20
    assert all(a.addresses["b"][0] in line for line in inserts)


def test_root_of_a_user_namespace_sees_its_own_network() -> None:
    """As in rootless containers: it has every right, but over its own namespaces alone."""
    script = """
        ip link set lo up
        nft 'add table t; add chain t c { type filter hook output priority 0; }'
        nft add rule t c ct state new accept
        for port in $(seq 9001 9020); do echo x >/dev/udp/127.0.0.1/$port; done
        conntrack -C; "$@"
    """
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "bash", "-c", script, "bash",
         *interpreter.module("ctrace", "top", "0.1", "--once", "-o", "json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    held, _, told = done.stdout.partition("\n")
    answer = json.loads(told)
    assert answer["hooks"]["family"] == "netlink"
    assert int(held) >= 20
    assert int(held) in [table["count"] for table in answer["tables"]]


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


OWN = ("--netns", "/proc/self/ns/net")
ONE = ("CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN", "CAP_SYSLOG")
"""What one namespace takes."""


def told(node: Node, held: set[str], verb: str) -> tuple[int, str]:
    """Exit status and remarks of a verb that has these capabilities, and no addresses of the
    kernel's functions from an earlier run that had more."""
    sets = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in sorted(held))
    argv = [verb, *OWN, *(("--duration", "1") if verb == "trace" else ())]
    hidden = "mkdir -p /var/cache/ctrace; mount -t tmpfs none /var/cache/ctrace; exec "
    done = node.start(
        ["unshare", "-m", "sh", "-c", hidden + shlex.join(with_only(sets, *argv))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    said = done.communicate(timeout=120)[1].decode()
    return done.returncode, said


def test_each_right_is_needed_and_named_when_it_alone_is_missing() -> None:
    cases = [(verb, lost) for verb in ("trace", "applied") for lost in ("", *rights.RIGHTS[verb])]
    with Lab() as lab, ThreadPoolExecutor(3) as pool:
        node = lab.namespace("a", track=True)
        found = {
            (verb, lost): pool.submit(told, node, set(rights.RIGHTS[verb]) - {lost}, verb)
            for verb, lost in cases
        }
        one = pool.submit(told, node, set(ONE), "trace")
        for (verb, lost), done in found.items():
            status, said = done.result()
            named = set(re.findall(r"CAP_[A-Z_]+", said))
            held = set(rights.RIGHTS[verb]) - {lost}
            assert not named & held, said
            assert lost in named or not lost, (verb, lost, said)
            assert status == (1 if (verb, lost) == ("applied", "CAP_NET_ADMIN") else 0), said
        status, said = one.result()
        assert status == 0
        assert "no better hooks" not in said
        assert "listening with" in said


def test_the_units_have_the_rights_that_their_verbs_take() -> None:
    for unit, verb in (("metrics", "metrics"), ("recorder", "record")):
        text = (
            Path(ctrace.__file__)
            .parent.joinpath("share/systemd", f"ctrace-{unit}.service")
            .read_text()
        )
        line = re.search(r"^CapabilityBoundingSet=(.*)$", text, re.M)
        assert line
        assert set(line[1].split()) == set(rights.RIGHTS[verb])


def test_the_page_says_what_each_verb_takes() -> None:
    page = (Path(__file__).parents[2] / "docs/hooks.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if re.match(r"\| (verb|`[a-z]+`.*) \|.*\|.*\|.*\|.*\|.*\|$", line)
    ]
    head = next(at for at, row in enumerate(rows) if row[0] == "verb")
    told = {
        verb: {name for name, mark in zip(rows[head][1:], row[1:]) if mark == "yes"}
        for row in rows[head + 1 :]
        for verb in re.findall(r"`([a-z]+)`", row[0])
    }
    assert told == {verb: set(rights.RIGHTS[verb]) for verb in VERBS}


def test_help_says_what_a_verb_takes() -> None:
    for verb in VERBS:
        told = " ".join(CliRunner().invoke(cli, [verb, "--help"]).output.split())
        assert rights.sentence(verb) in told, verb
