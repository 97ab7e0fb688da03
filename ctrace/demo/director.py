"""What happens when, and the sentences that tell it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Optional

from ctrace.demo.scene import TIME_WAIT, Scene
from ctrace.errors import CtraceError
from ctrace.live.adviser import LiveAdviser
from ctrace.live.feed import LiveFeed
from ctrace.model.snapshot import Snapshot
from ctrace.view import format as fmt

RATE: Final = 400.0
"""Connections a second once the traffic is switched over."""
ATTACHED, CALM, FULL, SHOWN, ADVISED, EMPTIED = 60.0, 7.0, 240.0, 11.0, 12.0, 75.0
"""Seconds: at most until it is watched; of calm; at most until full, which a busy host is slow to
make it; to look at it; at the advice; at most to recover: the kernel collects what has expired once
a minute at least."""
LOGGED: Final = 5.0
"""Seconds, at most, until the service's log has the first refusals: it writes once a second."""
PACE: Final = 1.0
"""How long the pauses are, in parts of what a reader needs; the incident takes its own time."""


@dataclass(frozen=True)
class Beat:
    """A moment of the play."""

    name: str
    """``calm``, ``switched``, ``full``, ``advice``, ``applied``, ``recovered`` or ``end``."""
    text: str
    """What the narrator says."""


class Director:
    """Runs the scene in a thread; the screen shows :attr:`text`.

    With ``auto`` it plays the whole incident through; otherwise it lets the table fill
    and leaves the rest to the person at the keys.
    """

    def __init__(self, scene: Scene, feed: LiveFeed, adviser: LiveAdviser, *, auto: bool) -> None:
        self.scene = scene
        self.feed = feed
        self.adviser = adviser
        self.auto = auto
        self.text = "building the scene"
        self.on_beat: Callable[[Beat], None] = lambda _: None
        self.failed = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Stop at the next breath."""
        self._stop.set()
        self._thread.join(10)

    @property
    def over(self) -> bool:
        """Whether the play has ended."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Until the end of the play, or for so long."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            for beat in self._play():
                self.text = beat.text
                self.on_beat(beat)
                if self._stop.is_set():
                    return
        except CtraceError as error:
            self.failed = str(error)
            self.text = f"the demo had to stop: {error}"

    def _play(self) -> Iterator[Beat]:
        scene = self.scene
        yield Beat(
            "calm",
            f"A new host: connection tracking on, {fmt.count(scene.room)} places in its "
            f"table, metrics and look-ups going out. {scene.what()}.",
        )
        self._until(lambda _: True, ATTACHED)
        scene.begin()
        self._breathe(CALM)
        scene.traffic(RATE)
        yield Beat(
            "switched",
            f"Traffic is switched over: {RATE:.0f} connections a second to port 8063, each "
            "a few milliseconds long. Watch TABLE fill up all the same.",
        )
        if not self._until(lambda seen: seen.totals.drop > 5, FULL):
            raise CtraceError(f"the table did not fill in {FULL:.0f} s: try on a host less busy")
        self._until(lambda _: any(self._refused()), LOGGED)
        yield Beat("full", self._refusals())
        self._breathe(SHOWN / 2)
        yield Beat("full", self._refusals())
        if not self.auto:
            yield from self._leave_it()
            return
        self._breathe(SHOWN / 2)
        yield Beat(
            "advice",
            "What helps? ctrace copies this host's firewall into another namespace and "
            "tries there whether these connections fare the same untracked.",
        )
        advice = self.adviser.advise(self._newest())
        self._breathe(ADVISED)
        said = self.adviser.act(advice, "apply")
        yield Beat(
            "applied",
            f"Applied in the demo's namespace, {said.split(':')[0]}. New connections are no "
            f"longer tracked; old entries expire in {TIME_WAIT} s, and go up to a minute later.",
        )
        self._until(lambda seen: seen.rates.drop == 0 and _fill(seen) < 0.3, EMPTIED)
        self._breathe(3)
        if not self.adviser.on_trial:
            raise CtraceError(self.adviser.status())
        if self._newest().rates.insert > RATE / 2:
            raise CtraceError("connections are tracked again: somebody removed the rules")
        yield Beat("recovered", self._recovery())
        self._breathe(8)
        yield Beat(
            "end",
            "Everything of this demo is gone when it ends: no rule, no namespace, no "
            "setting stays. On a real host: sudo ctrace top",
        )
        self._breathe(5)

    def _leave_it(self) -> Iterator[Beat]:
        while not self._stop.is_set():
            yield Beat(
                "yours",
                f"{self._log()} The keys are yours: Enter tells all of a row, "
                "a what helps, p there applies it here, q leaves.",
            )
            self._breathe(2)

    def _refusals(self) -> str:
        return (
            f"The table is full. {self._log()} Nothing there points at port 8063: "
            "the WHY line and the first culprit do."
        )

    def _log(self) -> str:
        refused = self._refused()
        if not any(refused):
            served = self.scene.api.last["served"]
            return f"shop-api's log: no errors, {served} requests served last second."
        return (
            f"shop-api's log: {refused[0]}x 'sendto: operation not permitted' (metrics), "
            f"{refused[1]}x the same (DNS) last second."
        )

    def _refused(self) -> tuple[int, int]:
        """Metrics and look-ups that the service could not send in the last second."""
        did = self.scene.api.last
        return did["metrics EPERM"], did["lookups EPERM"]

    def _recovery(self) -> str:
        did, front = self.scene.api.last, self.scene.front.last
        errors = did["metrics EPERM"] + did["lookups EPERM"]
        seen = self._newest()
        return (
            f"Fill {fmt.share(_fill(seen))}, {errors} refusals last second, "
            f"{front['answered']} connections a second answered, none of them in the table."
        )

    def _newest(self) -> Snapshot:
        snapshot = self.feed.latest()
        if snapshot is None:
            raise CtraceError("nothing was observed")
        return snapshot

    def _breathe(self, seconds: float) -> None:
        self._stop.wait(seconds * PACE)

    def _until(self, enough: Callable[[Snapshot], bool], most: float) -> bool:
        """Wait ``most`` seconds for a snapshot that is enough. False: none came in that time."""
        deadline = time.monotonic() + most
        while not self._stop.wait(0.2) and time.monotonic() < deadline:
            if self.feed.error is not None:
                raise CtraceError(f"capture ended: {self.feed.error}")
            snapshot = self.feed.latest()
            if snapshot is not None and enough(snapshot):
                return True
        return self._stop.is_set()


class SmallAdviser(LiveAdviser):
    """Advice on the demo's table, whose limit is not the host's: what would change that is left
    out, for here the commands would lower it."""

    def advise(self, snapshot: Snapshot, stop: Optional[threading.Event] = None) -> Any:
        """As always, without a larger table."""
        advice = super().advise(snapshot, stop)
        rest = tuple(one for one in advice.alternatives if one.id != "larger-table")
        return replace(advice, alternatives=rest)


def _fill(snapshot: Snapshot) -> float:
    return max((table.fill for table in snapshot.tables), default=0.0)


def play(
    scene: Scene,
    hooks: Optional[str],
    *,
    auto: bool,
    show: Callable[[LiveFeed, LiveAdviser, Director], Any],
) -> None:
    """Wire scene, capture, model and director together, and let ``show`` show it."""
    from ctrace.capture import open_live
    from ctrace.demo.scene import SmallTable
    from ctrace.filters import Filter

    wanted = Filter(netns=scene.host.inum)
    feed = LiveFeed(
        lambda: SmallTable(open_live(wanted, hooks=hooks, seed=False, sample=True), scene)
    )
    adviser = LiveAdviser(feed) if scene.lowers else SmallAdviser(feed)
    director = Director(scene, feed, adviser, auto=auto)
    try:
        show(feed, adviser, director)
    finally:
        director.close()
        try:
            adviser.close()
        finally:
            feed.close()
    if feed.error is not None:
        raise feed.error
