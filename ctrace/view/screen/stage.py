"""What the live screen is made of: lines that repaint where they changed, one prompt, and the
terminal, which may go away first."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar, TextIO

from rich.segment import Segment
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.drivers.linux_driver import LinuxDriver
from textual.events import Key
from textual.filter import LineFilter
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Input

from ctrace.view import format as fmt
from ctrace.view.palette import PALETTES
from ctrace.view.screen.keys import KEYS


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
    """The whole screen as lines; repaints only lines that changed."""

    can_focus = True

    def __init__(self, strange: Callable[[str], None]) -> None:
        super().__init__()
        self.strange = strange
        """Told the name of a key that does nothing."""
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
            for y, (one, two) in enumerate(zip(old, lines))
            if one.plain != two.plain or one.spans != two.spans or one.style != two.style
        ]
        if changed:
            self.refresh(*changed)

    def on_key(self, event: Key) -> None:
        """A key that is not bound: those that are never come here."""
        self.strange(event.character if event.is_printable and event.character else event.key)

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
    """The keys in the form that the library wants.

    All are handled before the focused widget sees them, so that a key which opens the prompt has
    done so when the next one is looked at, however fast they come.
    """
    out: list[BindingType] = []
    for key in KEYS:
        for name in key.keys:
            action = key.action
            if action == "sort_digit":
                action = f"sort_digit({name})"
            elif action in ("move", "page", "edge"):
                action = f"{action}({1 if name in ('down', 'pagedown', 'end') else -1})"
            elif name == "ctrl+c":
                action = "leave"
            out.append(Binding(name, action, key.text, show=False, priority=True))
    return out


class _Lasting:
    """Takes what a terminal no longer does, from the first write that it refuses."""

    def __init__(self, file: TextIO, told: Callable[[], object]) -> None:
        """``told`` is called at that write."""
        self._file = file
        self._told = told
        self.fileno = file.fileno

    def write(self, text: str) -> None:
        """Write it, if there is still a terminal."""
        self._try(self._file.write, text)

    def flush(self) -> None:
        """Send what is left, if there is still a terminal."""
        self._try(self._file.flush)

    def _try(self, call: Any, *text: str) -> None:
        try:
            call(*text)
        except OSError:
            # Python keeps the refused text and writes it again at exit, which would fail then.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            self._told()


class Terminal(LinuxDriver):
    """The library's own, but for its thread of output: that would end with the terminal, and who
    fills its queue then, as the end of the screen does, would wait for ever. The screen ends with
    its terminal, also where no signal tells that it has gone."""

    def __init__(self, *where: Any, **options: Any) -> None:
        super().__init__(*where, **options)
        self._file: Any = _Lasting(self._file, lambda: self._app.call_later(self._app.exit))
