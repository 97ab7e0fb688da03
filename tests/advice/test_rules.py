"""Generated rules: kernels take them, they are idempotent, expire by themselves, and go away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from kit.rulesets.net import Net, ask, entries, forget_paths, install, put, reset

from ctrace.change import shell_lines
from ctrace.errors import UsageError
from ctrace.lab import Lab, Node
from ctrace.plan.plan import FLOWS, ROLES, TOOLS, Accept, CtTimeout, Lever, Notrack, Plan, alone
from ctrace.plan.terms import Term
from ctrace.ruleset import notrack_iptables, notrack_nft
from ctrace.ruleset.reader import dump, fingerprint, load, raw_before_defrag, read

PEERS = ("10.0.0.1", "10.0.0.2", "fd00::1")
NARROWED: tuple[tuple[Term, ...], ...] = (
    (),
    (Term("saddr", ("10.0.0.0/8", "fd00::/8")), Term("iif", ("eth0", "br-lan"))),
    (
        Term("daddr", ("10.0.0.1/32",), negate=True),
        Term("mark", ("0x1/0xff",)),
        Term("iif", ("v*",)),
    ),
    (Term("type", ("daddr local",)), Term("sport", ("1024-65535",)), Term("family", ("ip",))),
    (Term("iif", ("eth0",)), Term("later", ("tcp",))),
)
UNTOUCHED = "table inet fw { chain in { type filter hook input priority 0;\n"
UNTOUCHED += "tcp dport 1 counter\ntcp dport 2 counter\n}\n}\n"


def plan(*levers: Lever, backend: str = "nft") -> Plan:
    return alone(*levers, backend=backend)


def accepts(tool: str, families: tuple[str, ...]) -> tuple[Accept, ...]:
    table, chain = ("fw", "in") if tool == "nft" else ("filter", "INPUT")
    return tuple(
        Accept(tool, family, table, chain, position, "input", role, flow, terms)
        for family in families
        for position in (-1, 0, 1)
        for role in ROLES
        for flow in FLOWS
        for terms in NARROWED
    )


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Lab() as lab:
        yield lab.namespace("rules")


@pytest.mark.kernel
@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("peers", [(), PEERS], ids=["any", "peers"])
def test_nft_takes_every_role_and_forgets_it(
    node: Node, proto: str, peers: tuple[str, ...]
) -> None:
    node.run(["nft", "flush", "ruleset"])
    node.run(["nft", "-f", "-"], stdin=UNTOUCHED)
    before = node.run(["nft", "list", "ruleset"])
    states = {"tcp": (("time_wait", 5), ("close", 2)), "udp": (("replied", 5),)}
    made = plan(
        Notrack(
            proto, 8063, ROLES, peers=peers, accepts=accepts("nft", ("inet",)), shared=bool(peers)
        ),
        CtTimeout(proto, 8063, ROLES, states[proto]),
    )
    script = notrack_nft.script(made, 60)
    node.run(["nft", "-c", "-f", "-"], stdin=script)
    node.run(["nft", "-f", "-"], stdin=script)
    once = node.run(["nft", "list", "table", "inet", "ctrace"])
    assert once.count("notrack") == script.count("notrack")
    assert "expires" in once
    node.run(["nft", "-f", "-"], stdin=notrack_nft.confirm())
    assert "expires" not in node.run(["nft", "list", "table", "inet", "ctrace"])
    node.run(["nft", "-f", "-"], stdin=notrack_nft.remove_table())
    node.run(["nft", "flush", "ruleset"])
    node.run(["nft", "-f", "-"], stdin=UNTOUCHED)
    node.run(["nft", "-f", "-"], stdin=notrack_nft.script(plan(made.levers[1]), None))
    node.run(["nft", "-f", "-"], stdin=notrack_nft.remove_table())
    assert node.run(["nft", "list", "ruleset"]) == before


@pytest.mark.kernel
@pytest.mark.parametrize("tool", TOOLS[1:])
@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_iptables_takes_every_role_and_forgets_it(node: Node, tool: str, family: str) -> None:
    restore = notrack_iptables.restore_argv(tool, family)
    command = restore[0].removesuffix("-restore")
    for port in ("1", "2"):
        node.run([command, "-A", "INPUT", "-p", "tcp", "--dport", port])
    before, print_before = _saved(node, command), fingerprint(node.path)
    made = plan(
        Notrack("tcp", 8063, ROLES, peers=PEERS, accepts=accepts(tool, (family,))), backend=tool
    )
    until = datetime.now(timezone.utc) + timedelta(minutes=1)
    node.run(restore, stdin=notrack_iptables.restore(made, family, until))
    once = _saved(node, command)
    node.run(restore, stdin=notrack_iptables.restore(made, family, until, jumps=False))
    assert _saved(node, command) == once
    node.run(restore, stdin=notrack_iptables.accepts(made, tool, family))
    assert fingerprint(node.path) == print_before
    node.run(restore, stdin=notrack_iptables.accepts(made, tool, family, remove=True))
    node.run(restore, stdin=notrack_iptables.remove())
    after = [line for line in _saved(node, command) if line not in _EMPTY_RAW]
    assert after == [line for line in before if line not in _EMPTY_RAW]
    assert fingerprint(node.path) == print_before
    node.run([command, "-F"])


_EMPTY_RAW = ("*raw", ":PREROUTING ACCEPT", ":OUTPUT ACCEPT", "COMMIT")


def _saved(node: Node, command: str) -> list[str]:
    text = node.run([f"{command}-save"])
    return [line.split(" [")[0] for line in text.splitlines() if line and line[0] != "#"]


@pytest.mark.parametrize(
    ("file", "text", "families"),
    [
        ("etc/modprobe.d/x.conf", "# no\noptions iptable_raw raw_before_defrag=1\n", ["ip"]),
        ("lib/modprobe.d/y.conf", "options ip6table_raw a=2 raw_before_defrag=Y\n", ["ip6"]),
        ("etc/modprobe.d/z.conf", "#options iptable_raw raw_before_defrag=1\n", []),
        ("etc/modprobe.d/z.conf", "options iptable_raw raw_before_defrag=0\n", []),
        ("proc/cmdline", "ro iptable_raw.raw_before_defrag=1 quiet", ["ip"]),
        ("proc/cmdline", "ro quiet", []),
    ],
)
def test_raw_before_defrag_is_asked_for(
    tmp_path: Path, file: str, text: str, families: list[str]
) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    found = [f for f in ("ip", "ip6") if raw_before_defrag(f, False, f"{tmp_path}/")]
    assert found == families


def test_iptables_cannot_hold_a_timeout_policy() -> None:
    with pytest.raises(UsageError):
        notrack_iptables.restore(plan(CtTimeout("tcp", 80, ("server",), (("close", 2),))), "ip")


@pytest.mark.kernel
def test_rules_on_trial_stop_by_themselves(net: Net) -> None:
    reset(net)
    install(net, [("nft", UNTOUCHED.replace("tcp dport 1 counter", "ct state new counter"))])
    put(net, Notrack("tcp", 8063, ("server",)), seconds=1)
    target = (net.addresses["h"][4], 8063)
    deadline = time.monotonic() + 60
    while not entries(net):
        assert ask(net.c, target, wait=5)
        assert time.monotonic() < deadline, "the rules outlived their timer"
        time.sleep(0.05)
    assert "notrack" in net.h.run(["nft", "list", "table", "inet", "ctrace"])


@pytest.mark.kernel
@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_iptables_rules_free_the_table_and_keep_path_mtu(net: Net, variant: str) -> None:
    """The form for hosts without nft: own chains, with the u32 form of the ICMP rules."""
    reset(net)
    tail = "-A INPUT -m conntrack --ctstate INVALID -j DROP\n-A INPUT -p {} -j ACCEPT\n"
    tail += "-A INPUT -p tcp --dport 8063 -j ACCEPT\nCOMMIT\n"
    made = plan(Notrack("tcp", 8063, ("server",)), backend=f"iptables-{variant}")
    for family, icmp in (("ip", "icmp"), ("ip6", "ipv6-icmp")):
        restore = notrack_iptables.restore_argv(made.backend, family)
        net.h.run(restore, stdin="*filter\n" + tail.format(icmp))
        net.h.run(restore, stdin=notrack_iptables.restore(made, family))
    net.h.run(["conntrack", "-F"], check=False)
    forget_paths(net)
    for version in (4, 6):
        assert ask(net.c, (net.addresses["h"][version], 8063), b"d", wait=5)
    assert not entries(net)


@pytest.mark.kernel
def test_the_exact_flush_leaves_other_entries(net: Net) -> None:
    reset(net)
    install(net, [("nft", UNTOUCHED.replace("tcp dport 1 counter", "ct state new counter"))])
    for family in (4, 6):
        for port in (8063, 9063):
            assert ask(net.c, (net.addresses["h"][family], port), wait=5)
    made = plan(Notrack("tcp", 8063, ("server",), addresses=net.local))
    assert entries(net)
    for command in shell_lines.flush_commands(made):
        net.h.run(list(command), check=False)
    assert not entries(net)
    assert len(entries(net, 9063)) == 2


@pytest.mark.kernel
def test_a_recorded_ruleset_reads_like_the_live_one(net: Net) -> None:
    reset(net)
    install(net, [("nft", UNTOUCHED)])
    assert load(dump(net.h.path)) == read(net.h.path)
