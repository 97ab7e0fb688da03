"""All that goes on around the host of :mod:`kit.rulesets.net`, and who answers it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from kit.rulesets.net import Net, ask, echo, forget_paths
from kit.rulesets.services import CLOSED, FAMILIES, HIGH, LOCAL, PORT, STRANGER, Address
from kit.rulesets.tool.words import GATE, NODE, VIP


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
