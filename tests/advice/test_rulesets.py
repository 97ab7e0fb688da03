"""Verdicts against what really happens: real traffic under each ruleset, before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from queue import SimpleQueue

import pytest
from kit.rulesets.cases import CASES, RULES, SAFE, Case
from kit.rulesets.net import (
    Net,
    build,
    entries,
    install,
    measure,
    put,
    reset,
    seen,
    take_away,
    verdict_on,
)
from kit.rulesets.services import LONGEST, WAIT
from kit.turns import stay

from ctrace.advice.hazards import Judgement
from ctrace.advice.roles import roles, subject
from ctrace.ruleset.reader import fingerprint

pytestmark = [pytest.mark.kernel, pytest.mark.slow]
GOOD = (SAFE, RULES)
AT_ONCE = 4
"""Networks in use at the same time: most of a case is waiting for what must not come."""


@dataclass
class Row:
    """One ruleset: what was said, and what was measured."""

    case: Case
    judgement: Judgement
    worked: bool
    role_seen: bool
    bare: list[str]
    """Harm done by NOTRACK without the accepts and the ICMP rules."""
    kept: int
    """Entries of the port that it did not prevent."""
    harm: list[str] | None
    """Harm done by the rules that the tool gives; None where it gives none."""
    left: int
    """Entries of the port under these rules."""
    same_print: bool
    """Whether the ruleset's fingerprint is unchanged under and after ctrace's rules."""

    @property
    def as_expected(self) -> bool:
        as_said = (
            self.judgement.verdict == self.case.verdict
            and bool(self.bare) == self.case.breaks
            and (self.kept > 0 or not self.case.stays)
        )
        return self.worked and as_said and not self.harm and bool(self.left) == self.case.stays


def run(net: Net, case: Case) -> Row:
    """A case, and once more with patience if it surprises: a busy machine is slow, too."""
    row = attempt(net, case)
    return row if row.as_expected else attempt(net, case, LONGEST / WAIT)


def attempt(net: Net, case: Case, patience: float = 1.0) -> Row:
    reset(net)
    install(net, case.setup)
    before = measure(net, case.role, case.proto, patience=patience)
    about = subject(seen(net, case.proto), net.local, (32768, 60999), True, ())
    role_seen = case.role in roles(seen(net, case.proto), net.local)
    if not role_seen:
        about = replace(about, roles=(case.role,))
    judgement = verdict_on(about, net.h.path)
    prints = {fingerprint(net.h.path)}
    put(net, replace(judgement.lever, accepts=(), icmp=False))
    bare = measure(net, case.role, case.proto, patience=patience).worse_than(before)
    kept = held(net, case.proto, judgement)
    take_away(net)
    harm, left = None, 0
    if judgement.verdict in GOOD:
        put(net, judgement.lever)
        harm = measure(net, case.role, case.proto, patience=patience).worse_than(before)
        prints.add(fingerprint(net.h.path))
        left = held(net, case.proto, judgement)
    take_away(net)
    prints.add(fingerprint(net.h.path))
    return Row(
        case, judgement, bool(before.works[4]), role_seen, bare, kept, harm, left, len(prints) == 1
    )


def held(net: Net, proto: str, judgement: Judgement) -> int:
    """Entries that the service has in the lever's roles, either way round."""
    own = "loopback" in judgement.lever.roles
    return sum(
        entry.dport == 8063 or entry.src in net.local
        for entry in entries(net)
        if entry.proto == proto and (own or entry.src != entry.dst)
    )


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[Callable[[Case], Row]]:
    """The cases that were asked for, run side by side in networks of their own."""
    chosen = [
        item.callspec.params["case"]
        for item in request.session.items
        if item.nodeid.startswith(request.node.nodeid) and hasattr(item, "callspec")
    ]
    nets = [build() for _ in range(min(AT_ONCE, len(chosen) or 1))]
    free: SimpleQueue[Net] = SimpleQueue()
    for net in nets:
        free.put(net)

    def work(case: Case) -> Row:
        net = free.get()
        try:
            return run(net, case)
        finally:
            free.put(net)

    try:
        with ThreadPoolExecutor(len(nets)) as pool:
            jobs: dict[str, Future[Row]] = {case.name: pool.submit(work, case) for case in chosen}
            done = stay()  # nobody may change the machine before the last case is over
            pool.submit(lambda: (wait(jobs.values()), done()))
            yield lambda case: jobs[case.name].result()
    finally:
        for net in nets:
            net.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict_and_reality(rows: Callable[[Case], Row], case: Case) -> None:
    row = rows(case)
    said = "\n".join(row.judgement.reasons)
    assert row.worked, "the service did not work in the first place: the case proves nothing"
    assert row.judgement.verdict == case.verdict, said
    assert case.reason in said
    assert "untracked already" not in said
    assert bool(row.bare) == case.breaks, f"bare NOTRACK: {row.bare}\n{said}"
    assert row.kept or not case.stays, "NOTRACK took effect"
    assert not row.harm, said
    assert bool(row.left) == bool(row.judgement.remarks) == case.stays
    assert row.same_print
    assert row.role_seen or "half" in case.name


def test_the_table_of_verdicts(
    rows: Callable[[Case], Row], capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """What the suite shows: every verdict beside what was measured."""
    names = {item.name for item in request.session.items}
    if not all(f"test_verdict_and_reality[{case.name}]" in names for case in CASES):
        pytest.skip("only some of the rulesets were asked for")
    table = [rows(case) for case in CASES]
    lines = [f"{'RULESET':44} {'ROLE':9} {'VERDICT':16} {'ACCEPTS':>7}  BARE NOTRACK / WITH RULES"]
    for row in table:
        bare = ", ".join(row.bare) or "harmless"
        ours = "-" if row.harm is None else ", ".join(row.harm) or f"works, {row.left} entries"
        lines.append(
            f"{row.case.name:44} {row.case.role:9} {row.judgement.verdict:16} "
            f"{len(row.judgement.lever.accepts):7}  {bare} / {ours}"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert len(table) >= 40
    assert not [row.case.name for row in table if row.harm], "said safe, and did harm"
    missed = [r.case.name for r in table if r.bare and not r.judgement.reasons]
    assert not missed, "harm that no reason foretold"
