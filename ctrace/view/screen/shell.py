"""The live screen without its keys: what it shows, when it refreshes, how it prompts.

Everything on the screen is :func:`ctrace.view.screen.frame.compose` of the feed's newest
snapshot and a :class:`~ctrace.view.screen.state.State`. The shell asks the feed a few times a
second, repaints only lines that changed, and never waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Optional

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import BindingType
from textual.filter import LineFilter
from textual.screen import Screen
from textual.widgets import Input

from ctrace.errors import CtraceError
from ctrace.live.filtering import filtered
from ctrace.live.protocol import Feed, Phase, Records, Travels
from ctrace.model.snapshot import Culprit, Snapshot
from ctrace.view import format as fmt
from ctrace.view.palette import PALETTES, Palette
from ctrace.view.screen import curves, parts
from ctrace.view.screen.advice import AdvicePane
from ctrace.view.screen.asked import END, Asked, Rates, row_of
from ctrace.view.screen.canvas import Painted, Spot
from ctrace.view.screen.detail import detail_lines
from ctrace.view.screen.frame import compose
from ctrace.view.screen.keys import KEYS, NARROWED, footer, help_lines
from ctrace.view.screen.stage import AsciiFilter, Prompt, Stage, Terminal, bindings
from ctrace.view.screen.state import State
from ctrace.view.screen.theme import NAMES, themes

LOOK: float = 0.1
"""Seconds between two looks at the feed; a look that finds nothing new costs microseconds."""
OURS = frozenset(key.action for key in KEYS)
TOAST = 6.0
"""Seconds that a message stays in place of the footer."""


def _believe_the_terminal() -> None:
    """Forget COLUMNS and LINES: the library would take them for the size, also after a resize."""
    if sys.stdout is not None and sys.stdout.isatty():
        for name in ("COLUMNS", "LINES"):
            os.environ.pop(name, None)


class Shell(App[None]):
    """Reads a feed, composes the screen, prompts for a line; the keys are added on top."""

    ENABLE_COMMAND_PALETTE = True
    COMMAND_PALETTE_BINDING = "ctrl+p"
    BINDINGS: ClassVar[list[BindingType]] = bindings()
    CSS = """
    Screen { layers: base prompt; overflow: hidden; }
    Stage { width: 100%; height: 100%; layer: base; }
    Prompt { dock: bottom; layer: prompt; height: 1; border: none; padding: 0 1; display: none;
             background: $panel; }
    Prompt:focus { border: none; }
    """
    TITLE = "ctrace"

    def __init__(
        self,
        feed: Feed,
        *,
        palette: Palette = PALETTES["dark"],
        ascii_only: bool = False,
        state: Optional[State] = None,
        advice: Optional[AdvicePane] = None,
        names: Optional[Callable[[Snapshot], Snapshot]] = None,
        count: Optional[int] = None,
    ) -> None:
        _believe_the_terminal()
        super().__init__(ansi_color=palette.background == "default", driver_class=Terminal)
        self.feed = feed
        self.palette = palette
        self.state = state or State()
        self.advice = advice or AdvicePane()
        self.record_to = "ctrace.data"
        self.names = names
        self.caption: Optional[Callable[[], str]] = None
        """A sentence above the footer that says what is being shown."""
        self._captioned = ""
        self.left = count
        """Snapshots until the screen closes itself; None: never."""
        self._ascii = AsciiFilter(enabled=ascii_only)
        self.painted = Painted([])
        self.snapshot: Optional[Snapshot] = None
        self._asked = Asked(feed)
        self._frozen = False
        self._subject: Optional[Culprit] = None
        self.rates = Rates()
        self.namespaces: set[str] = set()
        """Names and numbers of those that were seen, to choose from."""
        self._asking: Optional[Callable[[str], None]] = None
        self._question = self._left = ""
        self._message: tuple[str, float] = ("", 0.0)
        self._answer: Optional[str] = None
        """The last message that answered a key; others tell what happened by itself."""
        self._stage = Stage(self.strange)
        self._prompt = Prompt(id="prompt", select_on_focus=False)

    # -- the library's hooks ---------------------------------------------------------

    def run(self, **options: Any) -> None:
        """Run it. Where a signal's exception ends the loop, the terminal is put right as well, and
        the library's input thread ends: it would keep the process for ever."""
        try:
            super().run(**options)
        except BaseException:
            if (driver := self._driver) is not None:
                with contextlib.suppress(Exception):  # the terminal may be gone
                    driver.stop_application_mode()
                with contextlib.suppress(AttributeError):  # another driver has no such thread
                    driver.exit_event.set()  # type: ignore[attr-defined]
            raise

    def get_line_filters(self) -> Sequence[LineFilter]:
        """The library's own filters, then ASCII where the terminal wants it."""
        filters = super().get_line_filters()
        return [*filters, self._ascii] if self._ascii.enabled else filters

    def compose(self) -> ComposeResult:
        """The stage, and the prompt, which is hidden until something is asked."""
        yield self._stage
        yield self._prompt

    def on_mount(self) -> None:
        """Start looking at the feed."""
        for theme in themes():
            self.register_theme(theme)
        self._wear(self.palette)
        self._stage.focus()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            for name in (signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(name, self.exit)
        self.set_interval(LOOK, self.look)
        self.look()

    def on_resize(self, event: events.Resize) -> None:  # noqa: ARG002
        """The size decides what is shown, so everything is composed again."""
        self.paint()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:  # noqa: ARG002
        """The commands that the palette offers: every key by name."""
        for key in KEYS:
            if key.action in ("command_palette", "move", "page", "edge", "sort_digit"):
                continue
            if not key.serves(isinstance(self.feed, Travels)):
                continue
            title = (key.short or key.action.replace("_", " ")).capitalize()
            callback = getattr(self, f"action_{key.action}")
            yield SystemCommand(f"{title}  ({key.label})", key.text, callback)

    # -- painting --------------------------------------------------------------------

    def look(self) -> None:
        """Take the newest snapshot, if there is a newer one."""
        snapshot = self.feed.latest()
        changed = snapshot is not None and snapshot is not self._seen
        if snapshot is not None and changed:
            changed = self._asked.answered(snapshot, self.state) or not self._frozen
        if snapshot is not None and changed:
            self.state = self._asked.placed(self.state, self._seen, snapshot)
            self._seen = snapshot
            self.rates.take(snapshot)
            for table in snapshot.tables:
                self.namespaces |= {table.name, str(table.netns)}
            snapshot = self.names(snapshot) if self.names else snapshot
            self.snapshot = filtered(snapshot, self.state.filter)
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    self.exit()
        if self.snapshot is None and self.feed.phase.name == "failed":
            self.exit()  # whoever opened the feed says why, on a terminal that is sane again
            return
        phase, self._phase = self._phase, self.feed.phase
        changed = changed or phase.name != self._phase.name
        # before the first snapshot the whole screen tells what the feed is doing
        if self.snapshot and phase.name == self._phase.name and phase.text != self._phase.text:
            self._message = (self._phase.text, time.monotonic() + TOAST)
            changed = True
        news = self.advice.arrived()
        if news:
            self._message = (news, time.monotonic() + TOAST)
        caption = self.caption() if self.caption else ""
        captioned, self._captioned = caption != self._captioned, caption
        if news is not None or changed or captioned or self.snapshot is None or self._expired():
            self.paint()

    _seen: Optional[Snapshot] = None
    _phase = Phase()

    def _expired(self) -> bool:
        over = bool(self._message[0]) and time.monotonic() > self._message[1]
        self._message = ("", 0.0) if over else self._message
        return over

    def paint(self) -> None:
        """Compose the screen and show it."""
        width, height = self.size.width, self.size.height
        if width < 1 or height < 1:
            return
        self._asked.rows(self.state, height)
        lines: list[Text] = []
        spots: list[Spot] = []
        bottom = self._bottom(width, spots, height)
        if self.snapshot is None:
            lines = parts.waiting(self.feed.phase, width, height - len(bottom), self.palette)
        else:
            self.painted = compose(
                self.advice.amended(self.snapshot),
                width,
                max(1, height - len(bottom)),
                self.palette,
                self.state,
                note=self._note(),
                page=self._page,
            )
            self.state = self.painted.state
            lines = self.painted.lines
            spots = [*self.painted.spots, *spots]
        self.painted = Painted(
            [*parts.pad(lines, width, height - len(bottom)), *bottom], spots, self.state
        )
        self._stage.show(self.painted.lines)

    def _bottom(self, width: int, spots: list[Spot], height: int) -> list[Text]:
        travels = isinstance(self.feed, Travels)
        narrowed = self.state.mode == "top" and self.state.filter
        mode = NARROWED if narrowed else self.state.mode
        text, keys = footer(mode, width, self.palette, travels)
        last = [text]
        if self._message[0]:
            rows = parts.wrapped(fmt.clean(self._message[0]), width - 2, 3 if height > 12 else 1)
            last = [parts.line([(words, self.palette.strong)], width) for words in rows]
            for row in last:
                row.style = self.palette.band
        else:
            spots += [Spot(height - 1, start, end, "key", name) for start, end, name in keys]
        above = []
        if self.feed.phase.name == "failed" and self.snapshot is not None and height > 6:
            why = fmt.cut(fmt.clean(self.feed.phase.text), width - 2)
            above.append(parts.line([(why, self.palette.bad)], width))
        if self._captioned and height > 6:
            for words in parts.sentence(self._captioned, width - 4, 3 if width >= 70 else 5):
                above.append(
                    parts.line([("▐ ", self.palette.accent), (words, self.palette.strong)], width)
                )
        told = self.advice.reminder() if self.state.mode != "advice" and height > 6 else ""
        if told and told != self._message[0]:  # what a key was just answered is not said twice
            above.append(parts.line([(fmt.cut(told, width - 2), self.palette.warn)], width))
        if isinstance(self.feed, Travels) and self.snapshot is not None and height > 6:
            above.append(curves.timeline(self.feed.position, width, self.palette))
            below = len(last) + bool(self._prompt.display)
            spots.append(Spot(height - 1 - below, 0, width, "seek", ""))
        if self._prompt.display and height > 6:
            hint = "  Enter: go on   Esc: leave it "
            room = len(self._question) + len(hint) < width
            asked = parts.line(
                [(fmt.cut(self._question, width - 2), self.palette.accent)],
                width,
                [(hint, self.palette.dim)] if room else [],
            )
            asked.style = self.palette.band
            above.append(asked)
        return [*above, *last]

    def _note(self) -> list[parts.Piece]:
        p = self.palette
        if isinstance(self.feed, Records) and self.feed.recording:
            return [("● recording", p.bad)]
        if self._frozen or (isinstance(self.feed, Travels) and self.feed.position.paused):
            return [(" PAUSED ", p.alarm)]
        if self.feed.phase.name in ("ended", "failed") and not isinstance(self.feed, Travels):
            return [(" ENDED ", p.alarm)]
        return []

    def _page(self, width: int) -> Sequence[Text]:
        mode, p = self.state.mode, self.palette
        if mode == "help":
            return help_lines(width, p, isinstance(self.feed, Travels))
        if mode == "advice":
            return self.advice.lines(width, p)
        snapshot = self.snapshot
        if snapshot is None or self._subject is None:
            return []
        stale = ""
        for one in snapshot.culprits:
            if row_of(one) == row_of(self._subject):
                self._subject = one
                break
        else:
            stale = "no longer among the rows: these are the last numbers that were shown"
        return detail_lines(
            snapshot,
            self._subject,
            width,
            p,
            stale=stale,
            rates=self.rates.of(self._subject),
            advice=self.advice.section(self._subject, width, p),
        )

    def say(self, text: str) -> None:
        """Answer a key in place of the footer, for a few seconds or until the next one."""
        self._answer = text
        self._message = (text, time.monotonic() + TOAST)
        self.paint()

    async def run_action(self, action: Any, *where: Any, **options: Any) -> bool:
        """What a key does; first the answer to the one before is put away."""
        if self._answered():
            self.paint()
        return await super().run_action(action, *where, **options)

    def _answered(self) -> bool:
        """Put away the answer to an earlier key; whether there was one."""
        shown = self._answer is not None and self._message[0] == self._answer
        self._answer = None
        if shown:
            self._message = ("", 0.0)
        return shown

    def strange(self, key: str) -> None:
        """A key that none of ours is."""
        self.say(f"{fmt.clean(key)} does nothing here: ? lists the keys")

    def change(self, state: State) -> None:
        """Take on a new state; the feed is told when its view has changed."""
        old, self.state = self.state, state
        self._answered()
        self._asked.to_end = state.cursor == END
        if (old.group, old.order, old.filter) != (state.group, state.order, state.filter):
            self._asked.view(state, self.size.height)
            if self._seen is not None and old.filter != state.filter:
                self.snapshot = filtered(self._seen, state.filter)
        self.paint()

    def _wear(self, palette: Palette) -> None:
        self.palette = palette
        self.ansi_color = palette.background == "default"
        self.theme = NAMES[palette.name]
        self._stage.base = palette.text + palette.behind
        self._stage.refresh()
        self.paint()

    # -- questions ---------------------------------------------------------------------

    def ask(self, question: str, value: str, answer: Callable[[str], None], left: str = "") -> None:
        """Ask for one line in place of the footer; the question is shown above it. ``left`` is said
        when it is left unanswered."""
        self._asking, self._question, self._left = answer, question, left
        self._prompt.value = value
        self._prompt.cursor_position = len(value)
        self._prompt.display = True
        # At once, not when the library gets to it: what is typed next belongs to the answer.
        self.screen.set_focus(self._prompt)
        self.paint()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:  # noqa: ARG002
        """While something is asked, or the palette is open, letter keys type letters."""
        asked = self._prompt.display or len(self.screen_stack) > 1
        return not (asked and action in OURS)

    def action_cancel(self) -> None:
        """Leave the question unanswered."""
        self._put_away()
        if self._left:
            self.say(self._left)

    def _put_away(self) -> None:
        self._asking = None
        self._prompt.display = False
        self.screen.set_focus(self._stage)
        self.paint()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """An answer."""
        answer, self._asking = self._asking, None
        self._put_away()
        if answer is not None:
            try:
                answer(event.value.strip())
            except CtraceError as error:
                self.say(str(error))
