"""A port that a translation draws by lot is no difference, also where two draws give the same."""

from __future__ import annotations

import pytest

from ctrace.record import TCP
from ctrace.rehearsal import compare
from ctrace.rehearsal.compare import BREAKS
from ctrace.rehearsal.conditions.needs import flags_in
from ctrace.rehearsal.play import OPENING, Run, Talk
from ctrace.rehearsal.stage import Outcome

HOST, OTHER, OUTSIDE = b"\x0a\0\0\1", b"\x0a\0\0\2", b"\x0a\0\0\3"
CALL = Talk("client", TCP, HOST, 600, OTHER, 8063, 0, 2)


def run(source: bytes, port: int, at: bytes = OTHER) -> list[Run]:
    """One SYN, as it leaves."""
    made = Run(CALL)
    made.steps.append(OPENING[TCP][0])
    made.outcomes.append(Outcome("out", 2, 0, 0, TCP, source, at, port, 8063, b"\x02"))
    return [made]


def nobody(*_: object) -> bool:
    """Hears the mark."""
    return False


@pytest.mark.parametrize("second", [628, 900], ids=["the same twice", "another"])
def test_a_drawn_port_is_not_compared(second: int) -> None:
    found = compare.runs(run(HOST, 628), run(HOST, 600), run(HOST, second),
                         hears_mark=nobody, drawn=True)  # fmt: skip
    assert not found


@pytest.mark.parametrize("after", [run(OUTSIDE, 600), run(HOST, 600, HOST)])
def test_addresses_are_compared_beside_it(after: list[Run]) -> None:
    found = compare.runs(run(HOST, 628), after, run(HOST, 900),
                         hears_mark=nobody, drawn=True)  # fmt: skip
    assert [(one.kind, one.name) for one in found] == [(BREAKS, "SYN")]


def test_a_port_that_a_rule_names_is_compared() -> None:
    found = compare.runs(run(HOST, 628), run(HOST, 600), run(HOST, 628),
                         hears_mark=nobody)  # fmt: skip
    assert [one.how for one in found] == ["translated"]


@pytest.mark.parametrize(
    ("match", "read"),
    [
        ("-p tcp -m tcp --tcp-flags RST RST", True),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,PSH,ACK,URG FIN,PSH,URG", True),
        ("-p tcp -m tcp --tcp-flags ACK,URG URG", True),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", False),
        ("-p tcp -m tcp --tcp-flags SYN,RST SYN", False),
        ("-p tcp -m tcp --tcp-flags FIN,SYN FIN,SYN", False),
        ("-p tcp -m tcp --dport 22", False),
    ],
)
def test_rules_that_tell_one_segment_from_another_by_its_flags(match: str, read: bool) -> None:
    """A rule for SYNs says the same of all other segments."""
    assert flags_in(f"-A INPUT {match} -j DROP") == read
