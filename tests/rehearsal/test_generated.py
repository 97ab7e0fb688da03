"""Rule sets by lot, each held against real traffic before and after: what is called safe is.

The oracle is the traffic itself: connections in both families, large segments through a narrow
link, the host's own checks, and doors that a stranger could open.
Every fifth is for a UDP service. ``REHEARSAL_SEED`` and ``REHEARSAL_SETS`` choose other rule sets,
and how many; ``scripts/rulesets`` counts how many are refused, and of those how many needlessly.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from kit.rulesets.cases import RULES, SAFE
from kit.rulesets.kinds import KINDS, ROLES
from kit.rulesets.net import Net, build, install, measure, put, reset, seen, take_away, verdict_on
from kit.rulesets.services import LONGEST, WAIT

from ctrace.advice.roles import subject

pytestmark = pytest.mark.kernel
SEED = int(os.environ.get("REHEARSAL_SEED", "8063"))
SETS = int(os.environ.get("REHEARSAL_SETS", "10"))


@pytest.fixture(scope="module")
def one_net() -> Iterator[Net]:
    made = build()
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("number", range(SETS))
def test_what_is_called_safe_changes_nothing(one_net: Net, number: int) -> None:
    rng = random.Random(SEED * 100_003 + number)
    kind, role = list(KINDS)[number % len(KINDS)], ROLES[rng.randrange(3)]
    proto = "udp" if number % 5 == 4 else "tcp"
    setup = KINDS[kind](rng, role, proto)
    told = f"REHEARSAL_SEED={SEED} number {number} ({kind}, {role}, {proto}): {setup}"
    net = one_net
    for patience in (1.0, LONGEST / WAIT):  # a busy machine is slow: once more before it counts
        reset(net)
        install(net, setup)
        before = measure(net, role, proto, patience=patience)
        if not before.works[4]:
            return  # it does not let the service live in the first place
        about = replace(
            subject(seen(net, proto), net.local, (32768, 60999), True, ()), roles=(role,)
        )
        judgement = verdict_on(about, net.h.path)
        if judgement.verdict not in (SAFE, RULES):
            assert judgement.reasons, told
            take_away(net)
            return
        put(net, judgement.lever)
        harm = measure(net, role, proto, patience=patience).worse_than(before)
        take_away(net)
        if not harm:
            return
    assert not harm, f"{told}\n{judgement.verdict}: {judgement.reasons}\n{judgement.lever}"
