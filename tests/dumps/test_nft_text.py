"""``nft list ruleset`` read as text: the same chains as nft's own JSON of the same rules gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrace.dumps.nft.tables import to_json
from ctrace.lab import Lab
from ctrace.ruleset import nft
from ctrace.ruleset.model import Chain

RULES = Path(__file__).parent / "rules.nft"
SAMPLE = """\
table inet fw {
    set banned {
        type ipv4_addr
        flags interval
        elements = { 10.0.0.0/8, 192.0.2.1-192.0.2.9,
                 203.0.113.5 }
    }

    chain input {
        type filter hook input priority filter - 5; policy drop;
        ip saddr @banned drop # handle 4
        tcp dport { 22, 80-90 } ct state new counter packets 3 bytes 180 accept comment "a } b"
        ip saddr 10.1.1.1 strange thing 5 accept
    }
}
"""


def told(text: str) -> dict[Any, Any]:
    """What is compared: all that decides, and how often a rule was met."""

    def rules(chain: Chain) -> list[Any]:
        return [
            (
                [(m.key, m.values, m.negate) for m in rule.matches], rule.verdict,
                [(use.kind, use.port, use.bits) for use in rule.uses], rule.position, rule.packets,
            )
            for rule in chain.rules
        ]  # fmt: skip

    return {
        chain.key: (chain.hook, chain.priority, chain.policy, chain.type, rules(chain))
        for chain in nft.parse(nft.objects_of(text))
    }


@pytest.mark.kernel
def test_text_tells_what_json_does() -> None:
    with Lab() as lab:
        one = lab.namespace("ruled", track=True)
        one.run(["nft", "-f", str(RULES)])
        text, oracle = (
            one.run(["nft", "list", "ruleset"]),
            one.run(["nft", "-j", "list", "ruleset"]),
        )
    mine, its = told(json.dumps(to_json(text))), told(oracle)
    assert mine.keys() == its.keys()
    assert sum(len(chain[-1]) for chain in its.values()) > 45
    for key, chain in its.items():
        assert mine[key] == chain, key


def test_a_line_is_read_as_it_stands() -> None:
    (chain,) = nft.parse(to_json(SAMPLE)["nftables"])
    assert (chain.hook, chain.priority, chain.policy) == ("input", -5, "drop")
    first, second, third = chain.rules
    assert len(first.matches[-1].values) == 3
    assert second.packets == 3
    assert second.verdict is not None
    assert second.verdict.kind == "accept"
    # What is not understood may do anything: the accept behind it is not taken for sure.
    assert third.verdict is not None
    assert third.verdict.kind == "unknown"


@given(st.integers(0, len(SAMPLE)), st.text(max_size=12), st.integers(0, 40))
def test_broken_text_never_fails(at: int, junk: str, gone: int) -> None:
    nft.parse(to_json(SAMPLE[:at] + junk + SAMPLE[at + gone :])["nftables"])
