"""The rules as nft text and as iptables text are for the same packets, whatever the lever.

Both texts are read here by the packet formats (RFC 791, 792, 4443, 8200) and by what nft(8) and
iptables-extensions(8) say of a match, into the same fields.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ctrace.plan.plan import PROTOS, ROLES, Notrack, alone
from ctrace.ruleset import notrack_iptables, notrack_nft

Rule = tuple[tuple[str, str], ...]
"""The fields of a packet that a rule asks for, sorted, with its family, hook and comment."""
Form = Callable[[Notrack], set[Rule]]
PEERS = ("10.0.0.1", "10.0.0.2", "192.0.2.7", "fd00::1", "2001:db8::7")
ICMP_HEADER, ADDRESSES_END = 8, {"ip": 20, "ip6": 40}
PROTOCOL_AT = {"ip": 9, "ip6": 6}
"""Bytes into an IP header; the ports come behind a header without options."""

levers = st.builds(
    Notrack,
    proto=st.sampled_from(PROTOS),
    port=st.integers(1, 65535),
    roles=st.lists(st.sampled_from(ROLES), unique=True, min_size=1).map(tuple),
    ephemeral=st.tuples(st.integers(1, 32767), st.integers(32768, 65535)),
    icmp=st.booleans(),
    peers=st.lists(st.sampled_from(PEERS), unique=True).map(tuple),
)


def quoted(family: str, at: int, bits: int, value: int) -> tuple[str, str]:
    """Which field of the packet that an ICMP error quotes begins ``at`` so many bytes."""
    header = ICMP_HEADER + ADDRESSES_END[family]
    found = {
        (ICMP_HEADER + PROTOCOL_AT[family], 8): "quoted protocol",
        (header, 16): "quoted sport",
        (header + 2, 16): "quoted dport",
    }[at, bits]
    return found, str(value)


# ---- nftables ------------------------------------------------------------------------------

_WORD = re.compile(r'@th,\d+,\d+ \d+|\{[^}]*\}|"[^"]*"|!=|[^\s{}"]+')
HOOKS = {"prerouting": "in", "output": "out"}
THROUGH = {"iifname": "received through", "oifname": "sent through"}


def by_nft(lever: Notrack) -> set[Rule]:
    found: set[Rule] = set()
    hook = ""
    for line in notrack_nft.script(alone(lever), None).splitlines():
        if at := re.search(r"type filter hook (\w+) priority raw - 10;", line):
            hook = HOOKS[at[1]]
        elif "notrack" in line:
            found.update(rules_of(hook, line.strip(), lever.proto))
    return found


def rules_of(hook: str, line: str, proto: str) -> Iterator[Rule]:
    """A rule for each family, peer and type: sets taken apart."""
    match, rest = line.split(" meta l4proto @armed counter notrack comment ")
    words = _WORD.findall(match)
    choices: list[list[tuple[str, str]]] = [[("hook", hook)], [("comment", rest.strip('"'))]]
    families = ["ip", "ip6"]
    while words:
        word = words.pop(0)
        if word in ("ip", "ip6"):
            families, side = [word], words.pop(0)
            choices.append([(side, one) for one in members(words.pop(0))])
        elif word in ("icmp", "icmpv6"):
            families = ["ip" if word == "icmp" else "ip6"]
            assert words.pop(0) == "type"
            choices.append([(word, one) for one in members(words.pop(0))])
        elif word.startswith("@th,"):
            where, value = word.split(" ")
            at, bits = (int(n) for n in where.split(",")[1:])
            choices.append([quoted(families[0], at // 8, bits, int(value))])
        elif word == proto:
            choices.append([(f"{proto} {words.pop(0)}", words.pop(0))])
        elif word in THROUGH:
            no = words.pop(0) if words[0] == "!=" else ""
            choices.append([(THROUGH[word], no + words.pop(0).strip('"'))])
        else:
            assert [word, *words[:2]] == ["fib", "daddr", "type"], line
            negated = words[2] == "!="
            assert words[2 + negated] == "local"
            choices.append([("to this host", str(not negated))])
            del words[: 3 + negated]
    for fields in product([("family", family) for family in families], *choices):
        yield tuple(sorted(fields))


def members(text: str) -> list[str]:
    return [one.strip() for one in text.strip("{}").split(",")]


# ---- iptables ------------------------------------------------------------------------------

CHAINS = {"PREROUTING": "in", "OUTPUT": "out"}
U32 = {
    "ip": r"0>>22&0x3C@14&0xFF=(\d+)&&0>>22&0x3C@28(>>16|&0xFFFF)=(\d+)",
    "ip6": r"51&0xFF=(\d+)&&88(>>16|&0xFFFF)=(\d+)",
}
"""A word of 4 bytes is read; ``0>>22&0x3C@`` goes on behind an IPv4 header of any length."""


def by_iptables(lever: Notrack) -> set[Rule]:
    found: set[Rule] = set()
    for family in ("ip", "ip6"):
        lines = notrack_iptables.restore(alone(lever), family).splitlines()
        jumps = [shlex.split(line) for line in lines if line.startswith("-I")]
        hooks = {words[-1]: CHAINS[words[1]] for words in jumps}
        for line in lines:
            if line.startswith("-A"):
                found.add(rule_of(family, hooks, shlex.split(line)))
    return found


def rule_of(family: str, hooks: dict[str, str], words: list[str]) -> Rule:
    assert words[-3:] == ["-j", "CT", "--notrack"]
    fields = [("family", family), ("hook", hooks[words[1]])]
    rest, proto, negated = words[2:-3], "", False
    while rest:
        option = rest.pop(0)
        if option == "!":
            negated = True
            continue
        value = rest.pop(0)
        if option == "-p":
            proto = value
        elif option in ("-s", "-d"):
            fields.append(("saddr" if option == "-s" else "daddr", value))
        elif option in ("--sport", "--dport"):
            fields.append((f"{proto} {option[2:]}", value.replace(":", "-")))
        elif option in ("-i", "-o"):
            through = THROUGH[f"{option[1]}ifname"]
            fields.append((through, "!=" * negated + value))
        elif option == "--comment":
            fields.append(("comment", value))
        elif option == "--dst-type":
            assert value == "LOCAL"
            fields.append(("to this host", str(not negated)))
        elif option in ("--icmp-type", "--icmpv6-type"):
            fields.append((option[2:].partition("-")[0], value))
        elif option == "--u32":
            fields += by_u32(family, value)
        else:
            assert option == "-m", words
            assert not negated
            continue
        negated = False
    return tuple(sorted(fields))


def by_u32(family: str, text: str) -> Iterator[tuple[str, str]]:
    asked = re.fullmatch(U32[family], text)
    assert asked, text
    outer = 40 if family == "ip6" else 0
    yield quoted(family, (51 if outer else 14) + 3 - outer, 8, int(asked[1]))
    second = 2 if asked[2] == "&0xFFFF" else 0
    yield quoted(family, (88 if outer else 28) + second - outer, 16, int(asked[3]))


# ---- both ----------------------------------------------------------------------------------


@given(levers)
@example(Notrack("tcp", 8063, ROLES, peers=PEERS))
@example(Notrack("udp", 53, ROLES, peers=("fd00::1",), icmp=False))
def test_both_forms_are_for_the_same_packets(lever: Notrack) -> None:
    assert by_nft(lever) == by_iptables(lever)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("form", [by_nft, by_iptables])
def test_a_role_is_untracked_in_both_directions(form: Form, role: str) -> None:
    for proto in PROTOS:
        rules = [dict(rule) for rule in form(Notrack(proto, 8063, (role,), icmp=False))]
        for family in ("ip", "ip6"):
            mine = [rule for rule in rules if rule["family"] == family]
            assert any(rule.get(f"{proto} dport") == "8063" for rule in mine)
            assert any(rule.get(f"{proto} sport") == "8063" for rule in mine)
            assert all(rule["comment"].startswith(f"ctrace:{role}:{proto}:8063:") for rule in mine)


@pytest.mark.parametrize("role", ["server", "client", "forward"])
@pytest.mark.parametrize("form", [by_nft, by_iptables])
def test_errors_about_a_role_are_untracked_where_the_lever_says_so(form: Form, role: str) -> None:
    for icmp in (True, False):
        rules = [dict(rule) for rule in form(Notrack("tcp", 8063, (role,), icmp=icmp))]
        errors = [rule for rule in rules if "quoted protocol" in rule]
        assert bool(errors) is icmp
        assert {rule["quoted protocol"] for rule in errors} <= {"6"}
        assert len({rule["family"] for rule in errors}) == 2 * icmp
