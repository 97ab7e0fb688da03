"""The keys that travel in a recording."""

from __future__ import annotations

from typing import Optional

from ctrace.live.jump import parse_jump
from ctrace.live.protocol import FASTEST, SLOWEST, Travels
from ctrace.view.screen.shell import Shell


class TravelKeys(Shell):
    """Step, jump, faster and slower, from burst to burst of drops."""

    def _travel(self) -> Optional[Travels]:
        if isinstance(self.feed, Travels):
            return self.feed
        self.say("only a replay can travel in time")
        return None

    def action_step(self) -> None:
        """One step on."""
        if (feed := self._travel()) is not None:
            if feed.position.share >= 1:
                self.say("the recording ends here")
            feed.step(1)

    def action_step_back(self) -> None:
        """One step back in time."""
        if (feed := self._travel()) is not None:
            if feed.position.share <= 0:
                self.say("the recording begins here")
            feed.step(-1)

    def action_next_drop(self) -> None:
        """To the next burst of drops."""
        if (feed := self._travel()) is not None and not feed.next_drop():
            self.say("no drops after this")

    def action_prev_drop(self) -> None:
        """To the burst of drops before."""
        if (feed := self._travel()) is not None and not feed.prev_drop():
            self.say("no drops before this")

    def action_faster(self) -> None:
        """Twice as fast."""
        if (feed := self._travel()) is not None:
            self._at_speed(feed, feed.position.speed * 2)

    def action_slower(self) -> None:
        """Half as fast."""
        if (feed := self._travel()) is not None:
            self._at_speed(feed, feed.position.speed / 2)

    def _at_speed(self, feed: Travels, speed: float) -> None:
        speed = min(FASTEST, max(SLOWEST, speed))
        feed.set_speed(speed)
        self.say(f"{speed:g} times as fast")

    def action_jump(self) -> None:
        """Ask where to."""
        if self._travel() is not None:
            self.ask("jump to: 10:03:07 (UTC), +30, -2m or 50%", "", self._jump)

    def _jump(self, text: str) -> None:
        if text and (feed := self._travel()) is not None:
            feed.seek(parse_jump(text, feed.position))
