"""Drops that somebody asks for: what is taken, what they would have dropped, what is planned."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctrace.advice.advise import advise
from ctrace.advice.asked import Views, include
from ctrace.advice.facts import Facts
from ctrace.advice.in_place import in_place
from ctrace.advice.result import Advice
from ctrace.batch import HookInfo
from ctrace.change import carry
from ctrace.dropping import KINDS, Drop, parse
from ctrace.errors import CtraceError, UsageError
from ctrace.host import caller, ctnetlink
from ctrace.model import remedies
from ctrace.model.snapshot import Cause, Culprit, Snapshot, Table
from ctrace.plan.plan import Notrack, from_json, to_json
from ctrace.record import RECORD, address_bytes
from ctrace.ruleset.installed import Rule
from ctrace.ruleset.model import Ruleset
from ctrace.view.format import prose
from ctrace.view.report.advice import advice_text

SECONDS = 10.0
FACTS = Facts(ruleset=Ruleset(fingerprint="0" * 64), addresses=("192.0.2.10", "127.0.0.1"))
SERVICE = Culprit("tcp/80", proto="tcp", port=80, netns=1, direction="in", held=900, inserts=1100)
FLOOD = replace(SERVICE, key="flood", src="198.51.100.7", held=800, inserts=1000)
QUIET = replace(SERVICE, key="quiet", src="198.51.100.8", held=100, inserts=100)


def snapshot(*culprits: Culprit, tables: int = 1) -> Snapshot:
    made = tuple(Table(n + 1, f"net{n + 1}", 1000, 100_000, 1024) for n in range(tables))
    return Snapshot(
        ts=1795380000 * 10**9, host="web", interval_s=1.0, uptime_s=SECONDS,
        hooks=HookInfo("fentry"), group="service", sort="held", tables=made,
        culprits=culprits, culprits_total=len(culprits),
    )  # fmt: skip


def ask(*drops: Drop, service: Culprit = SERVICE, pairs: tuple[Culprit, ...] = (FLOOD, QUIET),
        about: Facts = FACTS, tables: int = 1) -> Advice:  # fmt: skip
    services = snapshot(service, tables=tables)
    sources = snapshot(*(replace(one, proto="", port=None) for one in pairs))
    views = Views(services, snapshot(*pairs), sources)
    plain = advise(services, views.pairs, {})
    return include(plain, drops, views, {1: about, 2: about})


def given(**values: str) -> dict[str, tuple[str, ...]]:
    return {kind: tuple(values.get(kind.replace("-", "_"), "").split()) for kind in KINDS}


def test_options_are_drops() -> None:
    found = parse(
        given(drop_source="192.0.2.7 2001:DB8:0::7 192.0.2.7/32 10.1.2.3/8", drop_service="udp/53",
              limit_source="tcp/80=50", limit_service="tcp/443=500")
    )  # fmt: skip
    assert found == (
        Drop(sources=("192.0.2.7", "2001:db8::7", "10.0.0.0/8")),
        Drop("udp", 53),
        Drop("tcp", 80, rate=50),
        Drop("tcp", 443, rate=500, each=False),
    )
    assert [str(one) for one in found] == [
        "drop-source 192.0.2.7, 2001:db8::7, 10.0.0.0/8", "drop-service udp/53",
        "limit-source tcp/80", "limit-service tcp/443",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"drop_source": "web1"}, {"drop_source": "127.0.0.1"}, {"drop_source": "fe80::1%eth0"},
        {"drop_source": "0.0.0.0/0"}, {"drop_source": "192.0.2.0/33"}, {"drop_source": "::/0"},
        {"drop_source": "126.0.0.0/7"}, {"drop_service": "tcp/0"}, {"drop_service": "tcp/80=5"},
        {"limit_source": "tcp/80"}, {"limit_source": "tcp/80=0"}, {"limit_source": "sctp/80=5"},
        {"limit_service": "tcp/65536=5"}, {"limit_service": "tcp/80=9999999"},
        {"limit_service": "tcp/80=5", "limit_source": "tcp/80=5"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_drop_is_refused_in_one_line(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(given(**wrong))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("drop", "dropped"),
    [
        # 1000 in ten seconds: 200 pass at 20 a second, and 20 more at once.
        (Drop("tcp", 80, rate=20), 1000 - 220),
        (Drop("tcp", 80, rate=20, each=False), 1100 - 220),
        (Drop("tcp", 80, rate=1), (1000 - 15) + (100 - 15)),
        (Drop("tcp", 80, rate=200), 0),
        (Drop("tcp", 80), 1100),
        (Drop(sources=("198.51.100.7",)), 1000),
        (Drop(sources=("198.51.100.0/24", "2001:db8::/32")), 1100),
    ],
    ids=str,
)
def test_what_it_would_have_dropped_for_sure(drop: Drop, dropped: int) -> None:
    advice = ask(drop)
    (asked,) = advice.asked
    assert asked.dropped == dropped
    (plan,) = advice.plans
    assert plan.levers == (drop,)
    assert from_json(to_json(plan)) == plan
    text = advice_text(advice, 200)
    assert prose(str(drop)) in text
    assert prose(asked.text) in text
    assert (f"at least {dropped:,}" in asked.text) == bool(drop.rate and dropped)


def test_a_hosts_own_connections_are_not_limited() -> None:
    mine = replace(FLOOD, key="mine", src="127.0.0.1", direction="loopback")
    mixed = replace(SERVICE, direction="mixed")
    for each in (True, False):
        advice = ask(Drop("tcp", 80, rate=5, each=each), service=mixed, pairs=(mine, QUIET))
        assert (advice.asked[0].seen, advice.asked[0].dropped) == (100, 45)
    (asked,) = ask(Drop("tcp", 80), service=mixed, pairs=(mine, QUIET)).asked
    assert asked.dropped == 1100, "what goes over loopback is dropped with the service"
    calls = replace(SERVICE, direction="out")
    (asked,) = ask(Drop("tcp", 80), service=calls, pairs=()).asked
    assert asked.dropped == 0, "calls to other hosts' port are not"


def test_one_moment_tells_no_rate() -> None:
    views = Views(*(replace(snapshot(one), hooks=HookInfo("dump", changes=False))
                    for one in (SERVICE, FLOOD, FLOOD)))  # fmt: skip
    plain = advise(views.services, views.pairs, {})
    (asked,) = include(plain, (Drop("tcp", 80, rate=5),), views, {1: FACTS}).asked
    assert asked.dropped is None
    assert "does not tell how many come a second" in asked.text


def test_a_plan_keeps_what_is_applied_and_takes_a_source_more() -> None:
    applied = (Drop(sources=("203.0.113.1",)), Notrack("tcp", 8063, ("server",)))
    advice = ask(Drop(sources=("198.51.100.7",)), about=replace(FACTS, applied=applied))
    (plan,) = advice.plans
    assert plan.levers == (Drop(sources=("203.0.113.1", "198.51.100.7")), applied[1])


def test_what_cannot_be_planned_is_refused() -> None:
    limit = Drop("tcp", 80, rate=5)
    with pytest.raises(CtraceError, match="needs nft"):
        ask(limit, about=replace(FACTS, has_nft=False))
    with pytest.raises(CtraceError, match="not known"):
        ask(limit, about=Facts())
    with pytest.raises(UsageError, match="itself"):
        ask(Drop(sources=("192.0.2.0/28",)))
    with pytest.raises(CtraceError, match="name the namespace"):
        ask(Drop("tcp", 81), tables=2)
    assert ask(limit, tables=2).plans[0].netns == 1, "the one that saw it"


def test_a_remedy_names_the_option_that_plans_it() -> None:
    """Beside the cause, only where apply could put it in place, and as advise takes it."""
    helps = (remedies.limit(SERVICE, 900), remedies.drop_source("198.51.100.7", 1, 800),
             remedies.drop_service(SERVICE, 900))  # fmt: skip
    why = (Cause("syn-flood", "a flood", netns=1, remedies=helps),)
    services = replace(snapshot(SERVICE), why=why)
    text = advice_text(advise(services, None, {1: FACTS}), 200)
    for one in helps:
        assert f"on trial: sudo ctrace advise {one.option} --plan plan.json" in text
        kind, value = one.option[2:].split(" ")
        (drop,) = parse(given(**{kind.replace("-", "_"): value}))
        assert f"{one.commands[0]}".count(" counter drop") in (1, 2)
        assert str(drop).startswith(kind)
    bare = advise(services, None, {1: replace(FACTS, has_nft=False)})
    assert "on trial" not in advice_text(bare, 200)


def test_drops_that_are_applied_are_in_place() -> None:
    rules = tuple(
        Rule("nft", "inet", "ctrace", chain, f"ctrace:{tag}", packets=packets)
        for chain, tag, packets in (
            ("pre", "drop-source:198.51.100.0/24", 7),
            ("pre", "drop-service:tcp:80", 5),
            ("output", "drop-service:tcp:80", 1),
        )
    )
    found = list(in_place(Ruleset(fingerprint="0" * 64, ours=rules), None))
    assert [str(one) for one in found] == [
        "drop-source 198.51.100.0/24 is in place already, by ctrace; 7 packets so far",
        "drop-service tcp/80 is in place already, by ctrace; 6 packets so far",
    ]
    assert not any(one.covers("tcp", 80, ()) for one in found)


def test_by_which_connection_of_ssh_one_came(tmp_path: Path) -> None:
    """sudo left it out of the environment; a shell above it has it."""
    for pid, parent, environ in (
        (40, 30, b"PATH=/bin"),
        (30, 20, b"SHELL=/bin/sh\0SSH_CONNECTION=2001:db8::7 50000 192.0.2.1 2222\0A=b"),
        (20, 1, b"SSH_CONNECTION=192.0.2.9 50000 192.0.2.1 22"),
        (50, 1, b"SSH_CONNECTION=odd"),
        (70, 1, b"SSH_CONNECTION=UNKNOWN 65535 UNKNOWN 65535"),
    ):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "environ").write_bytes(environ)
        (tmp_path / str(pid) / "status").write_text(f"Name:\tx\nPPid:\t{parent}\n")
    assert caller.connected(str(tmp_path), 40) == ("2001:db8::7", 2222, 50000)
    assert caller.connected(str(tmp_path), 50) is None
    assert caller.connected(str(tmp_path), 60) is None
    assert caller.connected(str(tmp_path), 70) is None, "sshd without a socket"


def test_a_drop_of_ones_own_connection_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.stat("/proc/self/ns/net").st_ino
    monkeypatch.setattr(carry, "connected", lambda: caller.Connected("198.51.100.9", 22))

    def said(drop: Drop, netns: int = here) -> list[str]:
        (plan,) = ask(drop).plans
        return list(carry.cuts_caller(replace(plan, netns=netns)))

    mine, others = Drop(sources=("198.51.100.0/24",)), Drop(sources=("198.51.100.7",))
    assert ["198.51.100.9" in one for one in said(mine)] == [True]
    assert said(others) == said(Drop("tcp", 80)) == said(mine, here + 1) == []
    assert ["port 22" in one for one in said(Drop("tcp", 22))] == [True]


def test_a_drop_sees_ones_own_connection_before_it_is_translated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = os.stat("/proc/self/ns/net").st_ino
    moved = np.zeros(1, RECORD)
    moved["src"] = np.frombuffer(address_bytes("198.51.100.9"), np.uint8)
    moved["sport"], moved["dport"], moved["reply_sport"] = 40001, 2222, 22
    monkeypatch.setattr(carry, "connected", lambda: caller.Connected("198.51.100.9", 22, 40001))
    monkeypatch.setattr(ctnetlink, "dump", lambda _: moved)

    def warned(port: int) -> bool:
        (plan,) = ask(Drop("tcp", port)).plans
        return bool([*carry.cuts_caller(replace(plan, netns=here))])

    assert warned(2222)
    assert not warned(22)
