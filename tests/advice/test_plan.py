"""Plans: they survive the trip through JSON, and nothing but their fields gets through."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kit.examples import examples

from ctrace.change import shell_lines
from ctrace.dropping import Drop
from ctrace.errors import CtraceError, UsageError
from ctrace.lab import Lab
from ctrace.plan.plan import (
    FLOWS,
    HOOKS,
    POLICY_STATES,
    ROLES,
    Accept,
    CtTimeout,
    Lever,
    Notrack,
    Plan,
    from_json,
    to_json,
)
from ctrace.plan.terms import FIELDS, Term
from ctrace.ruleset import notrack_iptables, notrack_nft

ports = st.integers(1, 65535)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,20}", fullmatch=True).filter(
    lambda name: name != "ctrace"
)
some_roles = st.lists(st.sampled_from(ROLES), min_size=1, max_size=4, unique=True).map(tuple)
addresses = st.lists(
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str).filter(lambda a: "%" not in a),
    max_size=4,
).map(tuple)


prefixes = st.tuples(st.ip_addresses(), st.integers(0, 32)).map(
    lambda pair: str(ip_network(f"{pair[0]}/{pair[1]}", strict=False))
)
VALUES: dict[str, st.SearchStrategy[str]] = {
    "saddr": prefixes,
    "daddr": prefixes,
    "iif": st.sampled_from(["eth0", "br-lan", "wg0.7"]),
    "oif": st.sampled_from(["eth0", "veth*"]),
    "set": st.sampled_from(
        ["ip saddr @friends", "ip6 saddr . th dport @friends6", "src,dst @both"]
    ),
    "uid": st.integers(0, 2**32 - 1).map(str),
    "gid": st.integers(0, 2**32 - 1).map(lambda n: f"{n}-{2**32 - 1}"),
    "mark": st.integers(0, 2**32 - 1).map(lambda n: f"{n:#x}/0xffffffff"),
    "sport": st.integers(0, 65535).map(lambda n: f"{n}-65535"),
    "dport": st.integers(0, 65535).map(lambda n: f"0-{n}"),
    "type": st.sampled_from(["saddr local", "daddr local"]),
    "family": st.sampled_from(["ip", "ip6"]),
    "later": st.just("tcp"),
}


@st.composite
def terms(draw: st.DrawFn) -> Term:
    field = draw(st.sampled_from(FIELDS))
    negate = draw(st.booleans())
    several = field in ("saddr", "daddr", "uid", "gid") and not negate
    found = draw(st.lists(VALUES[field], min_size=1, max_size=3 if several else 1))
    return Term(field, tuple(found), negate)


@st.composite
def accepts(draw: st.DrawFn, among: tuple[str, ...]) -> Accept:
    tool, family = draw(
        st.sampled_from(
            [("nft", "ip"), ("nft", "ip6"), ("nft", "inet"), ("iptables-nft", "ip"),
             ("iptables-nft", "ip6"), ("iptables-legacy", "ip"), ("iptables-legacy", "ip6")]
        )
    )  # fmt: skip
    role, flow = draw(st.sampled_from(among)), draw(st.sampled_from(FLOWS))
    return Accept(
        tool, family, draw(names), draw(names), draw(st.integers(-1, 5000)),
        draw(st.sampled_from(HOOKS)), role, flow, tuple(draw(st.lists(terms(), max_size=4))),
    )  # fmt: skip


def outside(address: str) -> bool:
    return not ip_address(address).is_loopback


@st.composite
def levers(draw: st.DrawFn) -> Lever:
    proto, port, roles = draw(st.sampled_from(["tcp", "udp"])), draw(ports), draw(some_roles)
    kind = draw(st.sampled_from(["drop", "ct-timeout", "notrack"]))
    sources = draw(addresses.map(lambda found: tuple(a for a in found if outside(a))))
    if kind == "drop" and sources and draw(st.booleans()):
        return Drop(sources=sources)
    if kind == "drop":
        return Drop(proto, port, (), draw(st.integers(0, 1_000_000)), draw(st.booleans()))
    if kind == "ct-timeout":
        states = draw(st.lists(st.sampled_from(POLICY_STATES[proto]), min_size=1, unique=True))
        policy = tuple((state, draw(st.integers(1, 432000))) for state in states)
        return CtTimeout(proto, port, roles, policy)
    low = draw(ports)
    return Notrack(
        proto, port, roles, (low, draw(st.integers(low, 65535))), draw(st.booleans()),
        draw(addresses), draw(addresses), tuple(draw(st.lists(accepts(roles), max_size=3))),
        draw(st.booleans()),
    )  # fmt: skip


def plan_of(found: list[Lever]) -> Plan:
    return Plan(1795380000, "host-1", 4026531840, "init", "ab" * 32, "nft", tuple(found))


plans = st.lists(
    levers(), min_size=1, max_size=3, unique_by=lambda lever: (lever.kind, lever.proto, lever.port)
).map(plan_of)


@given(plans)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert from_json(to_json(plan)) == plan


@given(plans)
def test_rules_are_made_of_known_words_only(plan: Plan) -> None:
    script = notrack_nft.script(plan, 60)
    assert script.count("table inet ctrace {") == 1
    assert not any(word in script for word in ("$", "`", "'", "\\", "\x1b", "include"))
    for command in shell_lines.flush_commands(plan):
        assert command[:2] == ("conntrack", "-D")
        assert not any(set(word) & set(" ;$`'\"\n|&<>") for word in command)


BASE: dict[str, Any] = json.loads(
    to_json(
        plan_of(
            [
                Notrack(
                    "tcp", 8063, ("server",), peers=("10.0.0.1",),
                    accepts=(Accept("nft", "inet", "fw", "in", 3, "input", "server", "to",
                                    (Term("saddr", ("10.0.0.0/8",)), Term("iif", ("eth0",)))),),
                ),
                CtTimeout("tcp", 8063, ("server",), (("time_wait", 5),)),
                Drop("tcp", 8063, rate=50),
                Drop(sources=("192.0.2.9", "2001:db8::9")),
            ]
        )
    )
)  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a document."""
    found = [path] if path else []
    if isinstance(node, dict):
        for key, value in node.items():
            found += places(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            found += places(value, (*path, i))
    return found


def changed(path: tuple[Any, ...], value: Any) -> str:
    document = json.loads(json.dumps(BASE))
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return json.dumps(document)


HOSTILE: tuple[Any, ...] = (
    "80; drop", "$(reboot)", "`id`", "in\n}\ntable inet x {", "a b", "../../etc/passwd",
    '" accept comment "', "x" * 300, "\x1b[2J", "ip saddr 0.0.0.0/0", 0, -2, 65536, 1 << 70,
    1.5, float("nan"), None, True, [], {}, [[]], ["server", "server"], [[1, 2, 3]],
    {"$ref": "x"}, "fe80::1%eth0; reboot", "eth*", 'eth0"', "10.0.0.1/99",
)  # fmt: skip


@pytest.mark.parametrize("path", places(BASE), ids=str)
def test_hostile_values_are_refused_or_harmless(path: tuple[Any, ...]) -> None:
    for value in HOSTILE:
        said, plan = "", None
        try:
            plan = from_json(changed(path, value))
        except UsageError as error:
            said = str(error)
        assert "\n" not in said
        assert "\x1b" not in said
        assert len(said) < 300
        shown = path in (("host",), ("netns_name",))
        # A wildcard is what a rule may say of interfaces by itself.
        wild = value == "eth*" and "terms" in path
        if plan is not None and isinstance(value, str) and len(value) > 3 and not (shown or wild):
            assert value not in notrack_nft.script(plan, None)


@given(st.one_of(st.text(), st.binary().map(lambda raw: raw.decode("latin-1"))))
def test_any_text_is_a_plan_or_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_json(text)
    assert "\n" not in str(caught.value)


@given(st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
))  # fmt: skip
def test_any_json_is_a_plan_or_one_line(document: Any) -> None:
    with pytest.raises(UsageError):
        from_json(json.dumps(document))


@pytest.mark.parametrize(
    "text",
    [
        '{"version": 1, "version": 1}',
        "[" * 100_000,
        " " * (2 << 20),
        json.dumps({**BASE, "extra": 1}),
        json.dumps({**BASE, "levers": []}),
        json.dumps({**BASE, "levers": [BASE["levers"][0]] * 2}),
        json.dumps({**BASE, "levers": BASE["levers"] * 40}),
        json.dumps({**BASE, "version": 2}),
        json.dumps({**BASE, "levers": [{**BASE["levers"][3], "sources": []}]}),
        json.dumps({**BASE, "levers": [{**BASE["levers"][3], "rate": 5}]}),
        json.dumps({**BASE, "levers": [{**BASE["levers"][3], "proto": "tcp", "port": 80}]}),
        json.dumps({**BASE, "levers": [{**BASE["levers"][3], "sources": ["127.0.0.1"]}]}),
    ],
    ids=[
        "duplicate key",
        "deep",
        "large",
        "extra",
        "none",
        "twice",
        "many",
        "newer",
        "drops nothing",
        "limits a source",
        "drops two things",
        "drops this host",
    ],
)
def test_what_is_not_a_plan(text: str) -> None:
    with pytest.raises(UsageError):
        from_json(text)


def test_a_plan_of_another_version_says_so() -> None:
    with pytest.raises(UsageError, match=r"is 2, of another ctrace: this one reads version 1"):
        from_json(json.dumps({**BASE, "version": 2}))


# ---- fuzzed: shell, nft and iptables syntax in every text of a plan --------------------

JUNK = st.text(alphabet=";{}()|&<>$`'\"\\#*!%@,=+~^? \t\n\r\0\x1b\u2028\u0660abA019.:/_-",
               min_size=1, max_size=24)  # fmt: skip


def value_at(path: tuple[Any, ...]) -> Any:
    node: Any = BASE
    for key in path:
        node = node[key]
    return node


TEXTS = [path for path in places(BASE) if isinstance(value_at(path), str)]
PLAIN = re.compile(r"[A-Za-z0-9_.:/-]+")
"""What a word of a rule may be made of: no white space, no quotes, nothing that ends a word."""
LINE = re.compile(r'[A-Za-z0-9_.:/@&=,<>()|!*{}";\[\] \t-]*')
"""All that the rules that ctrace writes are made of."""


@st.composite
def tampered(draw: st.DrawFn) -> tuple[tuple[Any, ...], str]:
    """A text of the plan with junk before, after, inside, or instead of it."""
    path, junk = draw(st.sampled_from(TEXTS)), draw(JUNK)
    old = value_at(path)
    at = draw(st.integers(0, len(old)))
    return path, draw(st.sampled_from([junk, old + junk, junk + old, old[:at] + junk + old[at:]]))


@examples(600)
@given(tampered())
@example((("levers", 0, "accepts", 0, "terms", 1, "values", 0), "eth0*"))
def test_junk_in_a_text_is_refused_or_plain(case: tuple[tuple[Any, ...], str]) -> None:
    path, value = case
    said, plan = "", None
    try:
        plan = from_json(changed(path, value))
    except UsageError as error:
        said = str(error)
    if plan is None:
        assert len(said.splitlines()) == 1
        assert said.isprintable()
        return
    if path in (("host",), ("netns_name",)):  # shown, and never part of a command
        assert value.isprintable()
    else:
        any_rest = path[-2:-1] == ("values",)  # of a device: eth* is each that begins so
        assert PLAIN.fullmatch(value.removesuffix("*") if any_rest else value)
    only = replace(plan, levers=tuple(x for x in plan.levers if isinstance(x, Notrack)))
    # What a shell line has besides, all of it our own: quotes, sed's expressions.
    undo = re.sub(r"[\\'#$]", "", shell_lines.undo_line(plan))
    texts = [notrack_nft.script(plan, 60), undo]
    for family in ("ip", "ip6"):
        texts += [notrack_iptables.restore(only, family)]
        texts += [notrack_iptables.accepts(only, tool, family)
                  for tool in ("iptables-nft", "iptables-legacy")]  # fmt: skip
    for text in texts:
        assert all(LINE.fullmatch(line) for line in text.split("\n"))
        assert text.count('"') % 2 == 0


@pytest.mark.kernel
@pytest.mark.slow
def test_no_plan_file_reaches_beyond_its_own_rules() -> None:
    """What survives the reader is loaded for real: nothing of others is changed or gone."""
    fw = "table inet fw {\n\tchain in {\n\t\ttype filter hook input priority 0; policy accept;\n"
    fw += '\t\tiifname "lo" accept\n'
    fw += "".join(f"\t\ttcp dport {port} drop\n" for port in (22, 23, 24)) + "\t}\n}\n"
    with Lab() as lab:
        node = lab.namespace("fuzzed")
        node.run(["nft", "-f", "-"], stdin=fw)
        before = node.run(["nft", "list", "ruleset"])
        loaded = 0

        @examples(150)
        @given(tampered())
        def load(case: tuple[tuple[Any, ...], str]) -> None:
            nonlocal loaded
            try:
                plan = from_json(changed(*case))
            except UsageError:
                return
            script = notrack_nft.script(plan, 60)
            try:
                node.run(["nft", "-f", "-"], stdin=script)
            except CtraceError:  # a table, chain or rule that is not there
                assert node.run(["nft", "list", "ruleset"]) == before
                return
            loaded += 1
            after = node.run(["nft", "list", "ruleset"])
            node.run(["nft", "delete", "table", "inet", "ctrace"])
            ours = re.compile(r'^\t\t[^\n]* accept comment "ctrace:server:tcp:8063:to"\n', re.M)
            others = re.sub(r"table inet ctrace \{\n.*?^\}\n", "", after, flags=re.M | re.S)
            assert ours.sub("", others) == before
            node.run(["nft", "-f", "-"], stdin="flush ruleset\n" + fw)

        load()
        assert loaded, "not one plan was loaded: this proves nothing"
