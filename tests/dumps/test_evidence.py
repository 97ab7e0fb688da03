"""What texts told, as it stands in a recording: whole, and harmless where it was changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.examples import examples

from ctrace.dumps.opened import open_any
from ctrace.recording.format.evidence import FACT, log_of, parse, redacted
from ctrace.view.report.evidence import imported, sentences

TEXT = """\
Jul 29 11:02:03 gw kernel: nf_conntrack: table full in netns 4026532999, dropping packet
Jul 29 11:02:09 gw kernel: net_ratelimit: 12 callbacks suppressed
# date +%s
1722250923
# cat /proc/net/nf_conntrack
tcp 6 28 TIME_WAIT src=192.0.2.1 dst=192.0.2.2 sport=1 dport=80 src=192.0.2.2 dst=192.0.2.1 \
sport=80 dport=1 use=2
udp 17 9 src=192.0.2.1 dst=192.0.2.2 sport=1 dport=53 src=192.0.2.2 dst=10.0.0.1 sport=53 dport=1
tcp 6 28 TIME_WAIT src=192.0.2.1 dst=192.0.2.2
# lsmod
nf_conntrack 105702 2 xt_CT,xt_conntrack
# sysctl -a
net.netfilter.nf_conntrack_max = 9
net.netfilter.nf_conntrack_count = 2
net.netfilter.nf_conntrack_tcp_timeout_time_wait = 120
# conntrack -S
cpu=0 found=1 insert_failed=0 drop=12 early_drop=0
# iptables -S
-P INPUT DROP
# conntrack -E -o timestamp
[1722250924.1] [NEW] udp 17 30 src=192.0.2.1 dst=192.0.2.2 sport=7 dport=53 [UNREPLIED] \
src=192.0.2.2 dst=192.0.2.1 sport=53 dport=7
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("evidence") / "text"
    path.write_text(TEXT)
    with open_any([str(path)]) as recording:  # type: ignore[attr-defined]
        found: dict[str, Any] = json.loads(recording.header.facts[FACT])
    return found


def test_all_that_was_told_has_its_form(stored: dict[str, Any]) -> None:
    assert parse({FACT: json.dumps(stored)}) == stored
    heads = {head for head, _ in sentences(stored)}
    assert heads == {"Full", "Kernel", "Table", "Read", "Holds", "States", "Time left", "Status",
                     "Events", "Modules", "Rules", "May help", "Not read"}  # fmt: skip


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 1 << 70) | st.floats() | st.text(max_size=9)
    | st.sampled_from(["\x1b[31m", "\u202e", "gw"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["entries", "left", "at", "full", "hosts", "netns", "\x1b"]), inner,
        max_size=3),
    max_leaves=6,
)  # fmt: skip


@examples(150)
@given(st.data())
def test_changed_evidence_is_told_as_far_as_it_goes(
    stored: dict[str, Any], data: st.DataObject
) -> None:
    """A part anywhere in it is replaced by another value, or left out."""
    whole = json.loads(json.dumps(stored))
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = whole
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = data.draw(st.sampled_from(list(keys)))
            inside = place[key]
            if not (isinstance(inside, (dict, list)) and inside) or data.draw(st.booleans()):
                break
            place = inside
        if isinstance(place, dict) and data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(ANY)
        if not whole:
            return
    facts = {FACT: json.dumps(whole)}
    read = parse(facts)
    assert read is not None
    log_of(read)
    redacted(facts)
    told = [text for _, text in sentences(read)] + list(imported(read, "x", 1))
    assert not any(mark in text for mark in "\x1b\u202e" for text in told)
