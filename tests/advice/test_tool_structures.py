"""Rules in the structures of common tools: what is allowed there changes no use of anything.

Every use that the network has is tried before and under the rules that the verdict comes with: of
the service in each role, of other services, of published ports and cluster addresses, of
a stranger's doors. The answers, and whom each server saw, must be the same. What is known to be
harmless must be allowed.

Six tools stand for the others. ``TOOL_STRUCTURES=all`` looks at all of them, ``=NAME`` at those
whose name has it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from kit.rulesets.cases import RULES, SAFE
from kit.rulesets.net import Net, install, put, reset, seen, verdict_on
from kit.rulesets.services import LONGEST, WAIT
from kit.rulesets.tool.structures import STRUCTURES, Structure
from kit.rulesets.uses import answers, uses

from ctrace.advice.roles import subject

pytestmark = pytest.mark.kernel
CHOSEN = os.environ.get("TOOL_STRUCTURES", "")
LOOK = WAIT / 2


def changed(net: Net, structure: Structure, wait: float) -> tuple[str, tuple[str, ...], list[str]]:
    """The verdict, its reasons, and what is not as it was under the rules that it comes with."""
    reset(net)
    install(net, structure.setup)
    every = list(uses(net))
    mine = [use for use in every if use.role in structure.roles and use.proto == structure.proto]
    before = answers(net, every, wait)
    lives = any(any(answers(net, mine, each).values()) for each in (WAIT, LONGEST))
    assert lives, "the service does not work in the first place"
    about = subject(seen(net, structure.proto), net.local, (32768, 60999), True, ())
    assert about.roles == structure.roles
    judgement = verdict_on(about, net.h.path)
    found = []
    if judgement.verdict in (SAFE, RULES):
        put(net, judgement.lever)
        after = answers(net, every, wait)
        found = [f"{use}: {before[use]!r}, then {after[use]!r}" for use in every
                 if before[use] != after[use]]  # fmt: skip
    return judgement.verdict, judgement.reasons, found


def chosen() -> Iterator[object]:
    for one in STRUCTURES:
        if one.common if not CHOSEN else CHOSEN in ("all", *one.tool.split(" ")):
            marks = () if one.common else (pytest.mark.slow,)
            yield pytest.param(one, id=one.tool, marks=marks)


@pytest.mark.parametrize("structure", [*chosen()])
def test_what_is_allowed_changes_no_use(net: Net, structure: Structure) -> None:
    for wait in (LOOK, LONGEST):  # a busy machine is slow: once more before it counts
        verdict, reasons, found = changed(net, structure, wait)
        if not found:
            break
    assert not found, "\n".join([verdict, *reasons, *found])
    if structure.harmless:
        assert verdict in (SAFE, RULES), "\n".join(reasons)
