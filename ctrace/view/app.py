"""The live screen: a thin shell that turns keys into state and paints what follows from it.

Everything on the screen is :func:`ctrace.view.frame.compose` of the feed's newest
snapshot and a :class:`~ctrace.view.state.State`. The shell asks the feed a few times a
second, repaints only lines that changed, and never waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Optional

from rich.segment import Segment
from rich.text import Text
from textual import events
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.filter import LineFilter
from textual.geometry import Region
from textual.screen import Screen
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Input

from ctrace.errors import CtraceError
from ctrace.model.snapshot import SORTS, Culprit, Snapshot, Table
from ctrace.view import format as fmt
from ctrace.view import parts
from ctrace.view.app_advice import AdvicePane
from ctrace.view.app_travel import parse_jump
from ctrace.view.detail import detail_lines
from ctrace.view.feed import Feed, Records, Travels
from ctrace.view.filtering import filtered, parse
from ctrace.view.frame import Painted, Spot, compose, culprits_of, identity, tables_of
from ctrace.view.keys import KEYS, footer, help_lines
from ctrace.view.palette import PALETTES, Palette
from ctrace.view.state import State
from ctrace.view.theme import NAMES, themes

LOOK: float = 0.1
"""Seconds between two looks at the feed; a look that finds nothing new costs microseconds."""
TOAST = 6.0
"""Seconds that a message stays in place of the footer."""


class AsciiFilter(LineFilter):
    """Everything that leaves for the terminal, in ASCII: also the library's own parts."""

    def apply(self, segments: list[Segment], background: Any) -> list[Segment]:  # noqa: ARG002
        """Cell for cell, so nothing moves."""
        return [
            segment
            if segment.text.isascii()
            else Segment(fmt.ascii_only(segment.text), segment.style, segment.control)
            for segment in segments
        ]


class Stage(Widget):
    """The whole screen as lines; repaints the lines that differ from what is shown."""

    can_focus = True

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Text] = []
        self.base = PALETTES["dark"].text

    def show(self, lines: list[Text]) -> None:
        """Paint these lines."""
        old, self.lines = self.lines, lines
        if len(old) != len(lines):
            self.refresh()
            return
        width = self.size.width
        changed = [
            Region(0, y, width, 1)
            for y, (one, two) in enumerate(zip(old, lines, strict=True))
            if one.plain != two.plain or one.spans != two.spans or one.style != two.style
        ]
        if changed:
            self.refresh(*changed)

    def render_line(self, y: int) -> Strip:
        """One line, in the screen's own colours where it names none."""
        width = self.size.width
        if y >= len(self.lines):
            return Strip.blank(width, self.base)
        line = self.lines[y]
        segments = Segment.apply_style(line.render(self.app.console), self.base)
        return Strip(segments).adjust_cell_length(width, self.base)


class Prompt(Input):
    """One line of input in place of the footer."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "app.cancel", show=False)]


def bindings() -> list[BindingType]:
    """The keys as the library wants them."""
    out: list[BindingType] = []
    for key in KEYS:
        for name in key.keys:
            action = key.action
            if action == "sort_digit":
                action = f"sort_digit({name})"
            elif action in ("move", "page", "edge"):
                action = f"{action}({1 if name in ('down', 'pagedown', 'end') else -1})"
            priority = name in ("tab", "ctrl+c")
            out.append(Binding(name, action, key.text, show=False, priority=priority))
    return out


class TopApp(App[None]):
    """``ctrace top`` and ``ctrace replay`` over any feed of snapshots."""

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
        record_to: str = "ctrace.data",
        names: Optional[Callable[[Snapshot], Snapshot]] = None,
        count: Optional[int] = None,
        caption: Optional[Callable[[], str]] = None,
    ) -> None:
        super().__init__(ansi_color=palette.background == "default")
        self.feed = feed
        self.palette = palette
        self.state = state or State()
        self.advice = advice or AdvicePane()
        self.record_to = record_to
        self.names = names
        self.caption = caption
        """A sentence above the footer: what is being shown."""
        self._captioned = ""
        self.left = count
        """Snapshots until the screen closes itself; None: never."""
        self._ascii = AsciiFilter(enabled=ascii_only)
        self.painted = Painted([])
        self.snapshot: Optional[Snapshot] = None
        self._frozen = False
        self._subject: Optional[Culprit] = None
        self._asking: Optional[Callable[[str], None]] = None
        self._message: tuple[str, float] = ("", 0.0)
        self._stage = Stage()
        self._prompt = Prompt(id="prompt", select_on_focus=False)

    # -- the library's hooks ---------------------------------------------------------

    def get_line_filters(self) -> Sequence[LineFilter]:
        """The library's own filters, then ASCII where the terminal wants it."""
        filters = super().get_line_filters()
        return [*filters, self._ascii] if self._ascii.enabled else filters

    def compose(self) -> ComposeResult:
        """The stage, and the prompt that is hidden until something is asked."""
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
        """The size decides what is shown, so everything is composed anew."""
        self.paint()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:  # noqa: ARG002
        """What the palette offers: every key by name."""
        for key in KEYS:
            if key.action in ("command_palette", "move", "page", "edge", "sort_digit"):
                continue
            if key.travel and not isinstance(self.feed, Travels):
                continue
            title = (key.short or key.action.replace("_", " ")).capitalize()
            callback = getattr(self, f"action_{key.action}")
            yield SystemCommand(f"{title}  ({key.label})", key.text, callback)

    # -- painting --------------------------------------------------------------------

    def look(self) -> None:
        """Take the newest snapshot, if there is a newer one."""
        snapshot = None if self._frozen else self.feed.latest()
        changed = snapshot is not None and snapshot is not self._seen
        if changed and snapshot is not None:
            self._seen = snapshot
            snapshot = self.names(snapshot) if self.names else snapshot
            self.snapshot = filtered(snapshot, self.state.filter)
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    self.exit()
        if self.snapshot is None and self.feed.phase.name == "failed":
            self.exit()  # whoever opened the feed says why, on a terminal that is sane again
            return
        if (news := self.advice.arrived()) and self.advice.said:
            self._message = (self.advice.said, time.monotonic() + TOAST)
        told = self.caption() if self.caption else ""
        captioned, self._captioned = told != self._captioned, told
        if news or changed or captioned or self.snapshot is None or self._expired():
            self.paint()

    _seen: Optional[Snapshot] = None

    def _expired(self) -> bool:
        if self._message[0] and time.monotonic() > self._message[1]:
            self._message = ("", 0.0)
            return True
        return False

    def paint(self) -> None:
        """Compose the screen and show it."""
        width, height = self.size.width, self.size.height
        if width < 1 or height < 1:
            return
        lines: list[Text] = []
        spots: list[Spot] = []
        bottom = self._bottom(width, spots, height)
        if self.snapshot is None or self.feed.phase.name == "failed":
            lines = parts.waiting(self.feed.phase, width, height - len(bottom), self.palette)
        else:
            self.painted = compose(
                self.snapshot,
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
        text, keys = footer(self.state.mode, width, self.palette, travels)
        if self._message[0]:
            words = fmt.cut(fmt.clean(self._message[0]), width - 2)
            text = parts.line([(words, self.palette.strong)], width)
            text.style = self.palette.band
        else:
            spots += [Spot(height - 1, start, end, "key", name) for start, end, name in keys]
        above = []
        if self._captioned and height > 6:
            for words in parts.sentence(self._captioned, width - 4, 2):
                above.append(parts.line([("▐ ", self.palette.accent), (words, self.palette.strong)],
                                        width))  # fmt: skip
        if isinstance(self.feed, Travels) and self.snapshot is not None and height > 6:
            above.append(parts.timeline(self.feed.position, width, self.palette))
        return [*above, text]

    def _note(self) -> list[parts.Piece]:
        p = self.palette
        if isinstance(self.feed, Records) and self.feed.recording:
            return [("● recording", p.bad)]
        if self._frozen or (isinstance(self.feed, Travels) and self.feed.position.paused):
            return [(" PAUSED ", p.alarm)]
        if self.feed.phase.name == "ended" and not isinstance(self.feed, Travels):
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
            if identity(one) == self.state.subject:
                self._subject = one
                break
        else:
            stale = "not among the first now: these are the last numbers that were shown"
        return detail_lines(snapshot, self._subject, width, p, stale=stale)

    def say(self, text: str) -> None:
        """Show one line in place of the footer for a few seconds."""
        self._message = (text, time.monotonic() + TOAST)
        self.paint()

    def change(self, state: State) -> None:
        """Take on a new state; the feed is told when its view is another one."""
        old, self.state = self.state, state
        if (old.group, old.sort, old.filter) != (state.group, state.sort, state.filter):
            self.feed.set_view(state.group, state.sort, state.filter)
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

    # -- what the keys do --------------------------------------------------------------

    def action_quit(self) -> None:  # type: ignore[override]
        """Leave; the feed is closed by whoever opened it."""
        self.exit()

    def action_help(self) -> None:
        """The help page, or back from it."""
        self.change(self.state.to("help"))

    def action_up(self) -> None:
        """One step back: from a page, then from a filter."""
        self.change(self.state.up())

    def action_pause(self) -> None:
        """Stand still or go on. A live feed goes on counting behind a standing screen."""
        if isinstance(self.feed, Travels):
            self.feed.pause(not self.feed.position.paused)
        else:
            self._frozen = not self._frozen
        self.look()
        self.paint()

    def action_drill(self) -> None:
        """What Enter means depends on where the cursor is."""
        snapshot, state = self.snapshot, self.state
        if snapshot is None or state.is_page:
            return
        if state.mode == "namespaces":
            found = tables_of(snapshot)
            if found:
                self._one_namespace(found[min(state.cursor, len(found) - 1)])
            return
        rows: Sequence[Any] = culprits_of(snapshot, state)
        if state.mode == "victims" or state.pane == "victims":
            rows = snapshot.victims
        if not rows:
            return
        row = rows[min(state.cursor, len(rows) - 1)]
        if isinstance(row, Culprit):
            self._subject = row
            self.change(replace(state.to("detail"), subject=identity(row)))
        else:
            self.change(replace(state.to("top"), mode="top", filter=f"{row.proto}/{row.port}"))

    def _one_namespace(self, table: Table) -> None:
        self.change(replace(self.state.up(), mode="top", filter=f"netns={table.name}"))

    def action_advice(self) -> None:
        """The advice page; asks for advice in the background."""
        state = self.state.to("advice")
        if state.mode == "advice" and self.snapshot is not None:
            self.advice.ask(self.snapshot)
        self.change(state)

    def action_group(self) -> None:
        """Group by the next thing."""
        self.change(replace(self.state.next_group(), mode="top"))

    def action_group_back(self) -> None:
        """Group by the thing before."""
        self.change(replace(self.state.next_group(-1), mode="top"))

    def action_sort(self) -> None:
        """Sort by the next column."""
        self.change(self.state.next_sort())

    def action_sort_back(self) -> None:
        """Sort by the column before."""
        self.change(self.state.next_sort(-1))

    def action_sort_digit(self, digit: int) -> None:
        """Sort by the column of that number."""
        self.change(self.state.sorted_by(SORTS[digit - 1]))

    def action_reverse(self) -> None:
        """Turn the order round."""
        self.change(replace(self.state, reverse=not self.state.reverse))

    def action_victims(self) -> None:
        """All victims, or back."""
        self.change(self.state.to("victims"))

    def action_namespaces(self) -> None:
        """All namespaces, or back."""
        self.change(self.state.to("namespaces"))

    def action_pane(self) -> None:
        """The cursor into the other table."""
        if self._prompt.display:
            return
        pane = "victims" if self.state.pane == "culprits" else "culprits"
        self.change(replace(self.state, mode="top", pane=pane, cursor=0, held=("", 0)))

    def action_light(self) -> None:
        """The next palette."""
        names = list(PALETTES)
        self._wear(PALETTES[names[(names.index(self.palette.name) + 1) % len(names)]])
        self.say(f"colours: {self.palette.name}")

    def action_move(self, step: int) -> None:
        """The cursor, or the page, one line on."""
        self._scroll(step)

    def action_page(self, step: int) -> None:
        """A screenful on."""
        self._scroll(step * max(1, self.size.height // 2))

    def action_edge(self, step: int) -> None:
        """To the first or the last."""
        self._scroll(step * 1_000_000)

    def _scroll(self, step: int) -> None:
        state = self.state
        if state.is_page:
            self.change(replace(state, scroll=max(0, state.scroll + step)))
        else:
            self.change(replace(state, cursor=max(0, state.cursor + step), held=("", 0)))

    def action_copy(self) -> None:
        """Put the key or the rules on the clipboard (OSC 52, through ssh as well)."""
        text = self.advice.copyable() if self.state.mode == "advice" else self.state.subject[0]
        if text:
            self.copy_to_clipboard(text)
            self.say("copied, if the terminal allows it")

    # -- questions ---------------------------------------------------------------------

    def ask(self, question: str, value: str, answer: Callable[[str], None]) -> None:
        """Ask for one line in place of the footer."""
        self._asking = answer
        self._prompt.placeholder = question
        self._prompt.value = value
        self._prompt.cursor_position = len(value)
        self._prompt.display = True
        self._prompt.focus()

    def action_cancel(self) -> None:
        """Put the question away."""
        self._asking = None
        self._prompt.display = False
        self._stage.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """An answer."""
        answer, self._asking = self._asking, None
        self.action_cancel()
        if answer is not None:
            try:
                answer(event.value.strip())
            except CtraceError as error:
                self.say(str(error))

    def action_filter(self) -> None:
        """Ask for a filter."""
        self.ask("filter: dport=53, src=10.0.0.0/8, proto=udp, or any text; empty for all",
                 self.state.filter, self._filtered)  # fmt: skip

    def _filtered(self, text: str) -> None:
        parse(text)  # raises what is then shown to the person
        back = (
            self.state if self.state.mode in ("top", "victims") else replace(self.state, mode="top")
        )
        self.change(replace(back, filter=text, cursor=0, held=("", 0)))

    def action_no_filter(self) -> None:
        """Show everything again."""
        self._filtered("")

    def action_record(self) -> None:
        """Begin or end a recording."""
        feed = self.feed
        if not isinstance(feed, Records):
            self.say("this is a recording already")
        elif feed.recording:
            self.say(f"recorded to {feed.stop_recording()}")
        else:
            self.ask("record to file", self.record_to, self._record)

    def _record(self, path: str) -> None:
        if path and isinstance(self.feed, Records):
            self.feed.record(path)
            self.say(f"recording to {path}; r ends it")

    def action_apply(self) -> None:
        """Apply, keep or take back, after a typed confirmation."""
        if self.state.mode != "advice":
            return
        try:
            question, words = self.advice.offer()
        except CtraceError as error:
            self.say(str(error))
            return
        self.ask(f"{question}; anything else changes nothing", "",
                 lambda text: self._confirmed(text, words))  # fmt: skip

    def _confirmed(self, text: str, words: tuple[str, ...]) -> None:
        if text in words:
            self.advice.act(text)
            self.say("working")
        else:
            self.say("nothing was changed")

    # -- travel ------------------------------------------------------------------------

    def _travel(self) -> Optional[Travels]:
        if isinstance(self.feed, Travels):
            return self.feed
        self.say("only a replay can travel in time")
        return None

    def action_step(self) -> None:
        """One step on."""
        if (feed := self._travel()) is not None:
            feed.step(1)

    def action_step_back(self) -> None:
        """One step back in time."""
        if (feed := self._travel()) is not None:
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
        speed = min(1024.0, max(1 / 64, speed))
        feed.set_speed(speed)
        self.say(f"{speed:g} times as fast")

    def action_jump(self) -> None:
        """Ask where to."""
        if self._travel() is not None:
            self.ask("jump to 10:03:07, by +30 or -2m, or to 50%", "", self._jump)

    def _jump(self, text: str) -> None:
        if text and (feed := self._travel()) is not None:
            feed.seek(parse_jump(text, feed.position))

    # -- mouse -------------------------------------------------------------------------

    def on_click(self, event: events.Click) -> None:
        """A click on a row, a column's head, a key, or the time line."""
        if self._prompt.display and event.y == self.size.height - 1:
            return
        if isinstance(self.feed, Travels) and event.screen_y == self.size.height - 2:
            position = self.feed.position
            share = event.screen_x / max(1, self.size.width)
            self.feed.seek(position.start + share * (position.end - position.start))
            return
        for spot in self.painted.spots:
            if spot.y == event.screen_y and spot.start <= event.screen_x < spot.end:
                self._clicked(spot, event.chain)
                return

    def _clicked(self, spot: Spot, chain: int) -> None:
        if spot.action == "sort":
            self.change(self.state.sorted_by(spot.value))
        elif spot.action == "key":
            getattr(self, f"action_{spot.value}")()
        elif spot.action == "row":
            pane, _, index = spot.value.partition(":")
            if self.state.mode == "top":
                self.state = replace(self.state, pane=pane)
            self.change(replace(self.state, cursor=int(index), held=("", 0)))
            if chain >= 2:
                self.action_drill()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """The wheel moves as the arrows do, three at a time."""
        event.stop()
        self._scroll(3)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """The other way."""
        event.stop()
        self._scroll(-3)
