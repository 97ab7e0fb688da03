"""The composition of what is held: shares of a sample, with their error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, Optional, Union, overload

import numpy as np
import numpy.typing as npt

from ctrace.model.keys.columns import CLOSE, TIME_WAIT
from ctrace.model.snapshot import Composition, Percentiles
from ctrace.record import PROTO_NUMBERS, TCP, TCP_STATES, UDP, Status

FEW: Final = 10
"""Looks. With fewer, shares are not reported."""
ENOUGH: Final = 400
"""Looks beyond which older ones add less precision than they cost in freshness."""
FRESH_NS: Final = 2_500_000_000
"""ns. Only looks newer than this show the remaining time, because it falls by a second each
second."""
STEPS: Final = 41
"""Quantiles that describe how long entries have waited: a resolution of 2.5 %."""

ONCE: Final = 2.0
"""Seconds: packets within so short a time are one exchange (a UDP flow that lasts longer becomes
ASSURED, nf_conntrack_udp_packet)."""

UNACKNOWLEDGED: Final = 300
"""Seconds that entries of several states have while data waits for its ACK, or is sent again
(nf_conntrack_tcp_timeout_unacknowledged, _max_retrans): no state's own."""
CHANGED: Final = 0.02
"""Part of what is held that looks do not stand for, below which they all count."""
MOST: Final = 0.6
"""Share of the entries in a state that must have the same timeout for it to be reported."""
ALL: Final = slice(None)


class Looks:
    """Rows of :data:`ctrace.model.sample.ROW`, newest first.

    A row is wide, and few of its columns are asked for: each is gathered when it is, and once.
    """

    def __init__(
        self, of: Union[npt.NDArray[np.void], Looks], chosen: Union[slice, npt.NDArray[Any]] = ALL
    ) -> None:
        """Of these the ``chosen``: a slice, numbers or a mask."""
        self._of, self._rows = of, np.arange(len(of))[chosen]
        self._columns: dict[str, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, chosen: str) -> npt.NDArray[Any]: ...

    @overload
    def __getitem__(self, chosen: Union[slice, npt.NDArray[Any]]) -> Looks: ...

    def __getitem__(
        self, chosen: Union[str, slice, npt.NDArray[Any]]
    ) -> Union[npt.NDArray[Any], Looks]:
        if not isinstance(chosen, str):
            return Looks(self, chosen)
        if chosen not in self._columns:
            self._columns[chosen] = self._of[chosen][self._rows]
        return self._columns[chosen]


def error(share: float, n: int) -> float:
    """Two standard errors of a share of ``n`` looks; not 0 even if it is all or none of a few."""
    likely = (share * n + 2) / (n + 4)
    return 2 * math.sqrt(likely * (1 - likely) / (n + 4))


def compose(
    looks: Looks, held: int, older: int, until: int, unlike: Callable[[Looks], float]
) -> Composition:
    """The composition of what a key holds at ``until`` (ns).

    ``older`` of its entries are from before the start. The dump at the start speaks for what is
    held only while nearly all of it is that old. ``unlike`` gives the share of the held
    entries that the looks do not represent.
    """
    if older < 0.9 * held:
        looks = looks[~looks["older"]]
    looks, rest = _best(looks[:ENOUGH], held, unlike)
    n = len(looks)
    if not held or n < min(FEW, held):
        return Composition()
    tcp = looks["proto"] == TCP
    ended = closed(looks)
    assured = looks["status"] & np.uint16(int(Status.ASSURED)) != 0
    unreplied = looks["status"] & np.uint16(int(Status.SEEN_REPLY)) == 0
    shares = [_share(which, n, rest) for which in (assured, unreplied)]
    shares.append(_share(ended[tcp], int(tcp.sum()), rest) if tcp.any() else (None, None))
    names, counts = np.unique(looks["state"][tcp], return_counts=True)
    states = [
        (TCP_STATES[name], count)
        for name, count in zip(names.tolist(), counts.tolist())
        if name < len(TCP_STATES)
    ]
    # a reset's timeout is another one: where some wait out TIME_WAIT, these tell of it alone
    waits = tcp & (looks["state"] == TIME_WAIT)
    first = (waits if np.count_nonzero(waits) >= FEW else ended) | (unreplied & ~tcp)
    others = ~(ended | (unreplied & ~tcp))
    left = looks["left"][~np.isnan(looks["left"]) & (looks["ts"] >= until - FRESH_NS)]
    left = left if left.size >= min(FEW, held) else left[:0]
    p50, p90, p99 = np.quantile(left, (0.5, 0.9, 0.99)).tolist() if left.size else (None,) * 3
    return Composition(
        n=n,
        assured=shares[0][0],
        assured_error=shares[0][1],
        unreplied=shares[1][0],
        unreplied_error=shares[1][1],
        closed=shares[2][0],
        closed_error=shares[2][1],
        states=tuple(sorted(states, key=lambda item: -item[1])),
        zones=_zones(looks),
        left=Percentiles(p50, p90, p99, int(left.size)),
        waited=_evenly(looks["idle"][first]),
        idle=_evenly(looks["idle"][others]),
        once=_once(looks),
        other_timeout=_other(looks),
    )


def _zones(looks: Looks) -> tuple[tuple[str, int], ...]:
    """How many are in each zone, most first; none where all are in the default one."""
    if not looks["zone"].any():
        return ()
    names, counts = np.unique(looks["zone"], return_counts=True)
    found = zip(map(str, names.tolist()), counts.tolist())
    return tuple(sorted(found, key=lambda item: -item[1]))


def _once(looks: Looks) -> Optional[float]:
    """The share that had one exchange, of those whose insert was seen a while ago."""
    old = looks[(looks["age"] >= 2 * ONCE) & ~np.isnan(looks["idle"])]
    if len(old) < 2 * FEW:
        return None
    return float(np.count_nonzero(old["age"] - old["idle"] <= ONCE)) / len(old)


def _other(looks: Looks) -> Optional[float]:
    """The share whose timeout differs from the setting's, of those with a known remaining time."""
    known = looks[~np.isnan(looks["left"])]
    return float(known["other"].mean()) if len(known) >= FEW else None


def by_settings(made_of: Composition) -> bool:
    """Whether most of it has the settings' timeouts, as far as looks show: otherwise no setting
    shortens its stay."""
    return (made_of.other_timeout or 0.0) < 0.5


def _evenly(seconds: npt.NDArray[np.float32]) -> tuple[float, ...]:
    """Quantiles at even steps; none if there are too few values."""
    known = np.sort(seconds[~np.isnan(seconds)])
    if len(known) < FEW:
        return ()
    at = np.linspace(0, len(known) - 1, min(STEPS, len(known))).round().astype(int)
    return tuple(known[at].tolist())


def closed(looks: Looks) -> npt.NDArray[np.bool_]:
    """Which are TCP connections that wait out TIME_WAIT or CLOSE."""
    state = looks["state"]
    found: npt.NDArray[np.bool_] = (state == TIME_WAIT) | (state == CLOSE)
    found &= looks["proto"] == TCP
    return found


def _best(looks: Looks, held: int, unlike: Callable[[Looks], float]) -> tuple[Looks, float]:
    """The looks that tell most of what is held now, and which part of it they do not stand for.

    Of a key that changes, fewer looks that are fresh tell more than many old ones.
    """
    rest = unlike(looks) if held and len(looks) else 0.0
    some, found = looks, error(0.5, len(looks)) + rest
    while rest > CHANGED and len(some) >= 4 * FEW:
        some = some[: len(some) // 2]
        part = unlike(some)
        if error(0.5, len(some)) + part < found:
            looks, rest, found = some, part, error(0.5, len(some)) + part
    return looks, rest


def _share(
    which: npt.NDArray[np.bool_], n: int, rest: float
) -> tuple[Optional[float], Optional[float]]:
    share = float(np.count_nonzero(which)) / n
    return share, min(1.0, error(share, n) + rest * max(share, 1 - share))


def timeouts(looks: Looks) -> dict[str, float]:
    """The timeout that most entries of a TCP state have, by the state, and of other protocols, by
    the setting; where enough of them tell."""
    known = looks[looks["timeout"] > 0]
    assured = known["status"] & np.uint16(int(Status.ASSURED)) != 0
    udp, tcp = known["proto"] == UDP, known["proto"] == TCP
    kinds = {
        "udp_timeout_stream": udp & assured,
        "udp_timeout": udp & ~assured,
        "icmp_timeout": known["proto"] == PROTO_NUMBERS["icmp"],
        "icmpv6_timeout": known["proto"] == PROTO_NUMBERS["icmpv6"],
    } | {
        TCP_STATES[state]: tcp & (known["state"] == state) & (known["timeout"] != UNACKNOWLEDGED)
        for state in np.unique(known["state"][tcp]).tolist()
        if state < len(TCP_STATES)
    }
    of = {name: _most_have(known["timeout"][mine]) for name, mine in kinds.items()}
    return {name: seconds for name, seconds in of.items() if seconds is not None}


def _most_have(seconds: npt.NDArray[np.float32]) -> Optional[float]:
    """What most of these are; None where they are few, or differ."""
    values, counts = np.unique(seconds, return_counts=True)
    most = int(counts.argmax()) if len(counts) else 0
    alone = len(counts) and counts[most] >= max(2 * FEW, MOST * counts.sum())
    return float(values[most]) if alone else None
