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
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
from kit.advice_cases import RULES, SAFE
from kit.advice_net import (
    CLOSED,
    FAMILIES,
    HIGH,
    LOCAL,
    LONGEST,
    PORT,
    STRANGER,
    WAIT,
    Address,
    Net,
    ask,
    echo,
    forget_paths,
    install,
    put,
    reset,
    seen,
    verdict_on,
)
from kit.tool_structures import GATE, NODE, STRUCTURES, VIP, Structure

from ctrace.advice.roles import subject

pytestmark = pytest.mark.kernel
CHOSEN = os.environ.get("TOOL_STRUCTURES", "")
LOOK = WAIT / 2


@dataclass(frozen=True)
class Use:
    """One thing that somebody does."""

    who: str
    target: Address
    role: str = ""
    """Of the service's: its role on the host."""
    what: bytes = b"w"
    source: Address | None = None
    proto: str = "tcp"


def uses(net: Net) -> Iterator[Use]:
    """All that goes on around the host."""
    for f in FAMILIES:
        at = {name: addresses[f] for name, addresses in net.addresses.items()}
        inside = net.h.addresses["s"][f == 6]
        for proto in ("tcp", "udp"):
            use = partial(Use, proto=proto)
            yield use("c", (at["h"], PORT), "server")
            yield use("s", (inside, PORT), "server")
            yield use("h", (at["c"], PORT), "client")
            yield use("h", (at["s"], PORT), "client")
            yield use("c", (at["s"], PORT), "forward")
            yield use("s", (at["c"], PORT), "forward")
            # By which of its own addresses a host calls itself is its own business.
            yield use("h", (LOCAL[f], PORT), "loopback", b"s")
            yield use("h", (at["h"], PORT), "loopback", b"s")
        # Large segments through the narrow link need its errors.
        yield Use("c", (at["h"], PORT), what=b"d")
        yield Use("h", (at["c"], PORT), what=b"u")
        yield Use("c", (at["s"], PORT), what=b"d")
        for who, to, port in (("c", at["h"], CLOSED), ("c", at["h"], 7063), ("c", at["s"], CLOSED),
                              ("s", inside, CLOSED), ("s", inside, 7063)):  # fmt: skip
            yield Use(who, (to, port))
        yield Use("c", (at["h"], PORT), source=(STRANGER[f], 0))
        for port in (CLOSED, HIGH):
            yield Use("c", (at["h"], port), source=(STRANGER[f], PORT))
        yield Use("c", (at["s"], CLOSED), source=(STRANGER[f], PORT))
        yield Use("s", (inside, CLOSED), source=(at["s"], PORT))
    for who in "chs":
        yield Use(who, (VIP, 80))
        yield Use(who, (GATE if who == "s" else net.h.addresses["r2"][0], NODE))


def answers(net: Net, wanted: Iterable[Use], wait: float) -> dict[Use, bytes]:
    """All at once, with nothing remembered of earlier ones."""
    net.h.run(["conntrack", "-F"], check=False)
    forget_paths(net)

    def once(use: Use) -> bytes:
        node = {"c": net.c, "h": net.h, "s": net.s}[use.who]
        if use.proto == "udp":
            return echo(node, use.target, wait=wait)
        return ask(node, use.target, use.what, source=use.source, wait=wait)

    wanted = list(wanted)
    with ThreadPoolExecutor(len(wanted)) as pool:
        return dict(zip(wanted, pool.map(once, wanted), strict=True))


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
