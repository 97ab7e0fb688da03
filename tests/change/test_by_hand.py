"""What is printed for a person's shell works when it is pasted there, in the right namespace."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.changes import PORT, STRICT, make_plan, rules_of
from kit.traffic import tcp_connections, tcp_server

from ctrace.change import apply, undo
from ctrace.change.shell_lines import undo_line
from ctrace.change.steps import UNDO, block
from ctrace.errors import CtraceError
from ctrace.host import commands, ctnetlink
from ctrace.host.netns import Namespace, find
from ctrace.lab import Lab, Node
from ctrace.plan.plan import Accept

XT_RULES = f"""*filter
:INPUT DROP [0:0]
:svc - [0:0]
-A INPUT -m comment --comment "not ctrace:mine" -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -j svc
-A svc -p tcp -m conntrack --ctstate NEW -m tcp --dport {PORT} -j ACCEPT
COMMIT
"""


def accepts(tool: str) -> tuple[Accept, ...]:
    """Accepts in two chains of a firewall of that kind, ICMP among them."""
    if tool == "nft":
        return tuple(
            Accept("nft", "inet", "fw", "in", 2, "input", "server", flow) for flow in ("to", "icmp")
        )
    return (
        Accept(tool, "ip", "filter", "INPUT", 2, "input", "server", "to"),
        Accept(tool, "ip", "filter", "svc", -1, "input", "server", "icmp"),
        Accept(tool, "ip6", "filter", "INPUT", -1, "input", "server", "to"),
    )


def bare_rules(node: Node) -> list[str]:
    """Rules without the tables and chains around them, which iptables makes and never removes."""
    lines = (line.strip() for line in rules_of(node).splitlines())
    return [
        line for line in lines if line and not re.match(r"(table|chain|type|[}:*]|COMMIT)", line)
    ]


def shell(line: str) -> None:
    """As pasted by a person whose shell is not in the namespace."""
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (line, done.stderr)
    assert not [line for line in done.stderr.splitlines() if not line.startswith("# Warning")]


def install(node: Node, firewall: str) -> None:
    """A strict firewall of that kind."""
    if firewall == "nft":
        node.run(["nft", "-f", "-"], stdin=STRICT)
    else:
        node.run([f"{firewall}-restore"], stdin=XT_RULES)
        node.run([f"{firewall.replace('ip', 'ip6', 1)}", "-P", "INPUT", "ACCEPT"])


@pytest.mark.kernel
@pytest.mark.parametrize("firewall", ["nft", "iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("backend", ["nft", "iptables-nft", "iptables-legacy"])
def test_undo_by_hand_leaves_nothing(lab: Lab, firewall: str, backend: str) -> None:
    node = lab.namespace("node")
    install(node, firewall)
    before = bare_rules(node)
    plan = make_plan(node, backend=backend, accepts=accepts(firewall))
    trial = apply.start(apply.prepare(plan), 60)
    during = rules_of(node)
    assert during.count("ctrace:server") > 4
    enter = commands.prefix(trial.prepared.namespace)
    shell(commands.inside(enter, undo_line(plan)))
    after = bare_rules(node)
    undo.undo(node.inum)
    assert after == before


@pytest.mark.kernel
@pytest.mark.parametrize("firewall", ["nft", "iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("backend", ["nft", "iptables-nft", "iptables-legacy"])
def test_a_block_that_is_pasted_works_alone_and_can_be_undone(
    lab: Lab, firewall: str, backend: str
) -> None:
    """In the namespace that it is for, from a shell that is elsewhere; its last line undoes it."""
    server, client = lab.namespace("server"), lab.namespace("client")
    lab.link(server, client)
    install(server, firewall)
    before = bare_rules(server)
    plan = make_plan(server, backend=backend, accepts=accepts(firewall))
    space = next(space for space in find() if space.inum == server.inum)
    text = block(plan, commands.prefix(space))
    *_, last = text.splitlines()
    assert "\t" not in text
    assert last.startswith(UNDO)
    address = server.addresses["client"][0]
    with tcp_server(server, PORT):
        shell(text)
        assert len(tcp_connections(client, (address, PORT), 3, timeout=60).flows) == 3
        assert not len(ctnetlink.dump(server.path)), "none of them is tracked"
        shell(text)  # once more, by mistake
        shell(last[len(UNDO) :])
        assert bare_rules(server) == before
        assert len(tcp_connections(client, (address, PORT), 3, timeout=60).flows) == 3
        assert len(ctnetlink.dump(server.path)), "tracked again"


@pytest.mark.kernel
@pytest.mark.parametrize("firewall", ["nft", "iptables-nft", "iptables-legacy"])
def test_a_block_that_is_pasted_elsewhere_untracks_nothing_without_its_accepts(
    lab: Lab, firewall: str
) -> None:
    """The shell is in another namespace, which has not got the chain."""
    server, other = lab.namespace("server"), lab.namespace("other")
    install(server, firewall)
    backend = firewall if firewall != "nft" else "iptables-nft"
    text = block(make_plan(server, backend=backend, accepts=accepts(firewall)))
    with pytest.raises(CtraceError):
        other.run(["bash", "-c", text])
    assert "notrack" not in rules_of(other).lower()


@pytest.mark.kernel
def test_the_prefix_leads_there(lab: Lab) -> None:
    """For a named namespace, one of a process, and the shell's own."""
    node = lab.namespace("node")
    asked = "readlink /proc/self/ns/net | tr -d a-z:[]"
    for namespace in (
        Namespace(node.inum, "", node.path),
        next(space for space in find() if space.inum == node.inum),
    ):
        line = commands.inside(commands.prefix(namespace), asked)
        said = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
        assert int(said.stdout) == node.inum, line
    mine = next(space for space in find() if space.inum == own_inode())
    assert commands.prefix(mine) == ()
    assert commands.inside((), asked) == asked


def own_inode() -> int:
    return os.stat("/proc/self/ns/net").st_ino


@given(st.lists(st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1)))
def test_any_command_arrives_whole(words: list[str]) -> None:
    """Through a prefix that only passes on, a command says what it says without it."""
    line = shlex.join(["printf", "%s|", *words])
    plain = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    through = commands.inside(("env", "-u", "NOTHING"), line)
    again = subprocess.run(["sh", "-c", through], capture_output=True, text=True, check=True)
    assert again.stdout == plain.stdout


def test_names_of_every_kind() -> None:
    assert commands.prefix(Namespace(1, "web", "/run/netns/web")) == ("ip", "netns", "exec", "web")
    assert commands.prefix(Namespace(1, "x", "/proc/77/ns/net")) == ("nsenter", "-t", "77", "-n")
    docker = commands.prefix(Namespace(1, "x", "/run/docker/netns/0a1b"))
    assert docker == ("nsenter", "--net=/run/docker/netns/0a1b")
