"""The live screen: its keys and its mouse, over the shell that paints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from textual import events

from ctrace.errors import CtraceError, UsageError
from ctrace.live.filtering import check, scope_of
from ctrace.live.protocol import Records, Travels
from ctrace.model.snapshot import SORTS, Culprit, Table
from ctrace.view import format as fmt
from ctrace.view.palette import PALETTES
from ctrace.view.screen.asked import END
from ctrace.view.screen.canvas import Spot, identity
from ctrace.view.screen.frame import culprits_of, tables_of
from ctrace.view.screen.state import State
from ctrace.view.screen.travel import TravelKeys

ADVICE_OLD = 30.0
"""Seconds for which the page about one culprit is content with existing advice."""


SORTED = {
    "held": "entries held",
    "new": "new entries per second",
    "life": "how long connections live",
    "residence": "time in the table",
    "drops": "drops per second",
}


class TopApp(TravelKeys):
    """``ctrace top`` and ``ctrace replay`` over any feed of snapshots."""

    def action_leave(self) -> None:
        """Leave, also from a question."""
        self.exit()

    def action_quit(self) -> None:  # type: ignore[override]
        """Leave; the feed is closed by whoever opened it."""
        self.exit()

    def action_help(self) -> None:
        """The help page, or back from it."""
        self.change(self.state.to("help"))

    def action_up(self) -> None:
        """One step back: from a page to its list, from some flows to those before."""
        if self.state.mode == "top" and not self.state.trail:
            self.say("this is the first screen: q quits")
            return
        mode = self.state.mode
        ended = mode in ("advice", "detail") and self.advice.give_up()
        undone = mode == "advice" and self.advice.give_up_applying()
        self.change(self.state.up())
        if undone:
            self.say("given up: what was being applied is not put in place, or is taken back")
        elif ended:
            self.say("the advice in the making was given up: a asks for it again")

    def action_pause(self) -> None:
        """Stand still or go on. A live feed goes on counting behind a standing screen."""
        if isinstance(self.feed, Travels):
            self.feed.pause(not self.feed.position.paused)
        else:
            self._frozen = not self._frozen
        self.look()
        self.paint()

    def action_drill(self) -> None:
        """What Enter does depends on where the cursor is."""
        snapshot, state = self.snapshot, self.state
        rows = self._rows()
        if snapshot is None or not rows:
            leads = ": Esc leads back to the rows" if state.is_page else ""
            self.say(f"no row to open here{leads}")
            return
        row = rows[min(state.cursor, len(rows) - 1)]
        if isinstance(row, Table):
            self._one_namespace(row)
        elif isinstance(row, Culprit):
            self._subject = row
            self.advice.ask(snapshot, old=ADVICE_OLD)
            self.change(replace(state.to("detail"), subject=identity(row)))
        else:
            self._narrow(f"{row.proto}/{row.port}" if row.port else f"proto={row.proto}")

    def _narrow(self, *words: str) -> None:
        """Show flows that pass these words, too; Esc leads back."""
        kept = [word for word in self.state.filter.split() if word not in words]
        self.change(replace(self.state.narrowed(" ".join([*kept, *words])), mode="top"))

    def _one_namespace(self, table: Table) -> None:
        tables = self.snapshot.tables if self.snapshot else ()
        alone = sum(other.name == table.name for other in tables) == 1
        self._narrow(f"netns={table.name if alone else table.netns}")

    def action_advice(self) -> None:
        """The advice page; asks for advice in the background."""
        state = self.state.to("advice")
        if state.mode == "advice" and self.snapshot is not None:
            self.advice.ask(self.snapshot)
        self.change(state)

    def action_unfold(self) -> None:
        """Rules and commands of the advice, or none."""
        if self.state.mode != "advice":
            self.say("nothing to unfold here: a asks for advice, x on its page shows its rules")
            return
        self.advice.folded = not self.advice.folded
        self.say("rules and commands folded" if self.advice.folded else "rules and commands shown")

    def action_group(self) -> None:
        """Group by the next thing."""
        self._grouped(1)

    def action_group_back(self) -> None:
        """Group by the thing before."""
        self._grouped(-1)

    def _grouped(self, step: int) -> None:
        """Change the grouping; groupings that the filter can't be applied to are skipped, with a
        message."""
        state, said = self.state.next_group(step), ""
        while (refusal := scope_of(state.filter).refusal(state.group)) and (
            state.group != self.state.group
        ):
            state, said = state.next_group(step), said or refusal
        self.change(replace(state, mode="top"))
        if said:
            self.say(said.partition(":")[0])

    def action_sort(self) -> None:
        """Sort by the next column."""
        self._sort(self.state.next_sort())

    def action_sort_back(self) -> None:
        """Sort by the column before."""
        self._sort(self.state.next_sort(-1))

    def action_sort_digit(self, digit: int) -> None:
        """Sort by the column of that number."""
        self._sort(self.state.sorted_by(SORTS[digit - 1]))

    def action_reverse(self) -> None:
        """Turn the order round."""
        self._sort(replace(self.state, reverse=not self.state.reverse))

    def _sort(self, state: State) -> None:
        """Sort otherwise, and say how where the column has no room here."""
        if self.state.mode != "top":
            self.say("only culprits can be sorted: Esc leads back to them")
            return
        self.change(state)
        if not any(spot.value == state.sort for spot in self.painted.spots):
            self.say(f"sorted by {SORTED[state.sort]}{', least first' if state.reverse else ''}")

    def action_victims(self) -> None:
        """All victims, or back."""
        self.change(self.state.to("victims"))

    def action_namespaces(self) -> None:
        """All namespaces, or back."""
        self.change(self.state.to("namespaces"))

    def action_pane(self) -> None:
        """The cursor into the other table."""
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
        self._scroll(step * END)

    def _scroll(self, step: int) -> None:
        state = self.state
        if state.is_page:
            self.change(replace(state, scroll=max(0, state.scroll + step)))
            end = "the page ends here" if step > 0 else "the page begins here"
        else:
            self.change(replace(state, cursor=min(END, max(0, state.cursor + step)), held=("", 0)))
            end = f"this is the {'last' if step > 0 else 'first'} row"
            end = end if self._rows() else "no row to move to"
        if (state.scroll, state.cursor) == (self.state.scroll, self.state.cursor):
            self.say(end)

    def action_copy(self) -> None:
        """Put the key or the rules on the clipboard (OSC 52, through ssh as well)."""
        if self.state.mode == "advice":
            text = self.advice.copyable()
        elif self.state.mode == "detail":
            remedy = self.advice.about(self._subject) if self._subject is not None else None
            text = remedy.rules if remedy is not None else ""
            text = text or self.state.subject[0]
        else:
            text = self._under_cursor()
        if not text:
            self.say("nothing to copy here: no rules and no row under the cursor")
            return
        self.copy_to_clipboard(text)
        first = fmt.cut(fmt.clean(text.splitlines()[0]), 40)
        self.say(f"copied {first}, if the terminal allows it")

    def _rows(self) -> Sequence[Any]:
        """The rows that the cursor moves over."""
        snapshot, state = self.snapshot, self.state
        if snapshot is None or state.is_page:
            return ()
        if state.mode == "namespaces":
            return tables_of(snapshot)
        if state.mode == "victims" or state.pane == "victims":
            return snapshot.victims
        return culprits_of(snapshot, state)

    def _under_cursor(self) -> str:
        rows = self._rows()
        return identity(rows[min(self.state.cursor, len(rows) - 1)])[0] if rows else ""

    def action_filter(self) -> None:
        """Ask for a filter."""
        there = self.state.filter
        question = "filter: dport=53, src=10.0.0.0/8, or any text"
        # What is typed next is another word.
        self.ask(question, f"{there} " if there else "", self._filtered)

    def _filtered(self, text: str) -> None:
        check(self.state.group, text)  # raises what is then shown to the person
        for word in text.replace(",", " ").split():
            name, _, value = word.partition("=")
            if name.lower() == "netns" and value not in self.namespaces:
                raise UsageError(f"no namespace {fmt.clean(value)[:40]!r} was seen: n lists them")
        self.change(self.state.narrowed(text))

    def action_no_filter(self) -> None:
        """Show everything again."""
        if not self.state.filter:
            self.say("no filter to clear")
            return
        self.change(replace(self.state.narrowed(""), trail=()))

    def action_record(self) -> None:
        """Begin or end a recording."""
        feed = self.feed
        if not isinstance(feed, Records):
            self.say("this is a recording already")
        elif feed.recording:
            path = feed.stop_recording()
            self.say(f"recorded to {path}; ctrace report {path} tells what happened")
        else:
            self.ask("record from here to the file", self.record_to, self._record)

    def _record(self, path: str) -> None:
        if path and isinstance(self.feed, Records):
            self.feed.record(path)
            self.say(f"recording to {path}; r ends it")

    def action_apply(self) -> None:
        """Apply, keep or take back, after a typed confirmation."""
        if isinstance(self.feed, Travels):
            self.say("nothing can be applied here: ctrace advise FILE --plan makes a plan")
            return
        if self.state.mode != "advice" and not self.advice.on_trial:
            self.say("nothing to apply here: a asks for advice, p on its page applies it on trial")
            return
        try:
            question, words = self.advice.offer()
        except CtraceError as error:
            self.say(str(error))
            return
        self.ask(question, "", lambda text: self._confirmed(text, words), "nothing was changed")

    def _confirmed(self, text: str, words: tuple[str, ...]) -> None:
        if text.lower() in words:
            self.say(self.advice.act(text.lower()))
        else:
            self.say("nothing was changed")

    # -- mouse -------------------------------------------------------------------------

    def on_click(self, event: events.Click) -> None:
        """A click on a row, a column's head, a key, or the time line."""
        if self._prompt.display and event.y == self.size.height - 1:
            return
        for spot in self.painted.spots:
            if spot.y == event.screen_y and spot.start <= event.screen_x < spot.end:
                self._clicked(spot, event)
                return

    def _clicked(self, spot: Spot, event: events.Click) -> None:
        if spot.action == "sort":
            self._sort(self.state.sorted_by(spot.value))
        elif spot.action == "key":
            getattr(self, f"action_{spot.value}")()
        elif spot.action == "row":
            pane, _, index = spot.value.partition(":")
            if self.state.mode == "top":
                self.state = replace(self.state, pane=pane)
            self.change(replace(self.state, cursor=int(index), held=("", 0)))
            if event.chain >= 2:
                self.action_drill()
        elif spot.action == "seek" and isinstance(self.feed, Travels):
            position = self.feed.position
            share = event.screen_x / max(1, self.size.width)
            self.feed.seek(position.start + share * (position.end - position.start))

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """The wheel moves as the arrows do, three at a time."""
        event.stop()
        self._scroll(3)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """The other way."""
        event.stop()
        self._scroll(-3)
