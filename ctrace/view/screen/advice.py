"""The advice page: made in the background, shown when it comes, applied only by typed words."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Optional, Protocol, Union

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from ctrace.errors import CtraceError
from ctrace.model import snapshot as model
from ctrace.model.snapshot import Culprit, Snapshot
from ctrace.view import format as fmt
from ctrace.view.palette import Palette
from ctrace.view.screen.parts import Piece, blank, folded, line, wrapped

DOING: Final = {"apply": "applying", "keep": "keeping", "undo": "taking back"}
"""The words of an offer, as what is done while they are carried out."""


@dataclass(frozen=True)
class Remedy:
    """The advice about one service in one namespace."""

    text: str
    """The verdict and what it frees, in a sentence."""
    good: bool = False
    """Whether the rules are safe to apply."""
    reasons: tuple[str, ...] = ()
    rules: str = ""
    """To copy; empty where there is nothing that could be advised."""
    others: tuple[str, ...] = ()
    """Further remedies, with their commands."""


class Adviser(Protocol):
    """The source of advice. The page is given one, because a view fetches nothing itself."""

    def advise(self, snapshot: Snapshot, stop: threading.Event) -> Any:
        """Makes the advice; may take seconds (it reads rulesets). Raises CtraceError, also once
        ``stop`` is set."""

    def lines(self, advice: Any, width: int, folded: bool) -> Sequence[Text]:
        """The advice in words, for a width; ``folded`` without its rules and commands."""

    def rules(self, advice: Any) -> str:
        """The rules to copy."""

    def about(self, advice: Any, proto: str, port: int, netns: int) -> Optional[Remedy]:
        """The advice about a service; None when it was not judged."""

    @property
    def on_trial(self) -> bool:
        """Whether a change is in place that reverts by itself unless it is kept."""

    @property
    def untracked(self) -> frozenset[tuple[int, str, int]]:
        """(namespace, protocol, port) of the services that a change made here keeps untracked."""

    def status(self) -> str:
        """What has been applied, and whether it may still revert; empty when nothing has."""

    def offer(self, advice: Any) -> tuple[str, tuple[str, ...]]:
        """A question and the words that answer it. Raises CtraceError with the reason when there is
        none."""

    def act(self, advice: Any, word: str, stop: threading.Event) -> str:
        """Do what was typed, and say what was done. Raises CtraceError. Nothing of what is being
        applied stays once ``stop`` is set."""


class AdvicePane:
    """The state of the advice page."""

    def __init__(self, adviser: Optional[Adviser] = None) -> None:
        self.adviser = adviser
        self._advice: Any = None
        self._error = ""
        self._asked_at = 0.0
        self._making: Optional[threading.Thread] = None
        self._began = 0.0
        self._stop = threading.Event()
        self._offered: Any = None
        """The advice that the last question was about: newer advice may have come since."""
        self._acting: Optional[threading.Thread] = None
        self._not_wanted = threading.Event()
        self._doing = ""
        self._acted_at = 0.0
        self._news: deque[str] = deque()
        self._tried = False
        """Whether something was on trial when that was last looked at."""
        self.folded = True
        """Whether rules and commands are left out of the page."""
        self._made: tuple[tuple[Any, int, bool], Sequence[Text]] = ((None, 0, True), ())

    def ask(self, snapshot: Snapshot, *, old: float = 0.0) -> None:
        """Start making advice from this snapshot, unless something is under way.

        Advice that is at most ``old`` seconds older than the snapshot is good enough.
        """
        if self.adviser is None or _alive(self._making):
            return
        if self._advice is not None and 0 <= snapshot.ts / 1e9 - self._asked_at < old:
            return
        adviser, stop = self.adviser, threading.Event()
        when, self._stop, self._error = snapshot.ts / 1e9, stop, ""

        def make() -> str:
            self._advice, self._asked_at = adviser.advise(snapshot, stop), when
            return ""

        self._began = time.monotonic()
        self._making = self._begin(make)

    def give_up(self) -> bool:
        """End the making of advice; whether any was being made."""
        going_on = _alive(self._making)
        self._stop.set()
        return going_on

    def give_up_applying(self) -> bool:
        """Let nothing stay of what is being applied; whether anything was."""
        going_on = _alive(self._acting) and self._doing == DOING["apply"]
        if going_on:
            self._not_wanted.set()
            self._doing = "giving up what was being applied"
        return going_on

    def act(self, word: str) -> str:
        """Carry out a typed word on the offered advice, in the background. Returns the status line.

        It does not wait for advice that is being made: a trial has a deadline.
        """
        if self.adviser is None or _alive(self._acting):
            return "nothing was changed: what was asked for before is still under way"
        adviser, advice = self.adviser, self._offered
        self._doing, self._acted_at = DOING.get(word, word), time.monotonic()
        stop = self._not_wanted = threading.Event()
        self._acting = self._begin(lambda: adviser.act(advice, word, stop), told=True)
        return self._under_way()

    @property
    def on_trial(self) -> bool:
        """Whether a change is in place and not kept yet."""
        return self.adviser is not None and self.adviser.on_trial

    def reminder(self) -> str:
        """What is under way or on trial, shown on every page; empty when nothing is."""
        if _alive(self._acting):
            return self._under_way()
        return self.adviser.status() if self.adviser is not None and self.on_trial else ""

    def amended(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot without remedies that the advice refuses or that are in place already. A
        remedy in place needs time to show its effect."""
        if self.adviser is None:
            return snapshot
        untracked, why = self.adviser.untracked, snapshot.why
        if self._advice is not None:
            why = tuple(self._allowed(cause) for cause in why)
        if untracked:
            why = tuple(_amended(cause, untracked) for cause in why)
        return snapshot if why is snapshot.why else replace(snapshot, why=why)

    def _allowed(self, cause: model.Cause) -> model.Cause:
        """The cause without NOTRACK where that was judged and is not safe."""
        if all(one.id != "notrack" for one in cause.remedies) or cause.port is None:
            return cause
        assert self.adviser is not None
        judged = self.adviser.about(self._advice, cause.proto, cause.port, cause.netns)
        if judged is None or judged.good:
            return cause
        left = tuple(one for one in cause.remedies if one.id != "notrack")
        return replace(cause, remedies=left)

    def _begin(self, work: Callable[[], str], *, told: bool = False) -> threading.Thread:
        thread = threading.Thread(target=self._work, args=(work, told), daemon=True)
        thread.start()
        return thread

    def _work(self, work: Callable[[], str], told: bool) -> None:
        said = ""
        try:
            said, self._error = work(), ""
        except CtraceError as error:
            self._error = str(error)
        except Exception as error:  # a screen must survive what its page could not make
            self._error = f"{type(error).__name__}: {error}"
        self._news.append(said or (self._error if told else ""))

    def arrived(self) -> Optional[str]:
        """A sentence on the outcome since the last call; empty if the page shows it, None without
        one."""
        tried, self._tried = self._tried, self.on_trial
        if self._news:
            return self._news.popleft()
        if tried and not self._tried and self.adviser is not None and not _alive(self._acting):
            return self.adviser.status()  # its guard took it back, or its time was over
        return None

    def lines(self, width: int, palette: Palette) -> Sequence[Text]:
        """The page."""
        p = palette
        made = self._advice is not None
        when = f"  from {fmt.clock(self._asked_at)}" if made else ""
        out = [line([("ADVICE", p.accent), (when, p.dim)], width)]
        out[0].style = p.band
        if self.adviser is None:
            return [*out, line([("no advice can be given here", p.dim)], width)]
        going_on = self._under_way() if _alive(self._acting) else self.adviser.status()
        if _alive(self._acting) and self._doing == DOING["apply"]:
            going_on += ". Esc ends it, and nothing of it stays"
        for text, style in ((going_on, p.warn), (self._error, p.bad)):
            if text:
                words = wrapped(fmt.clean(text), width - 3, 4)
                out += [line([(one, style)], width) for one in words]
        if made:
            return [*out, *self._body(width, p)]
        if not self._error:
            out.append(blank(width))
            out += [
                line([(words, p.dim)], width) for words in wrapped(self._working(), width - 3, 3)
            ]
        return out

    def _body(self, width: int, palette: Palette) -> list[Text]:
        assert self.adviser is not None
        want = (self._advice, width, self.folded)
        if self._made[0] != want:
            self._made = want, self.adviser.lines(self._advice, width - 2, self.folded)
        out: list[Text] = []
        if self.folded:
            keys = "x shows the rules and commands, y copies the rules, p applies them on trial"
            out += [line([(words, palette.dim)], width) for words in wrapped(keys, width - 2, 2)]
        for one in self._made[1]:
            out += _dressed(one, width, palette)
        return out

    def about(self, culprit: Culprit) -> Optional[Remedy]:
        """What to do about one culprit; None when it is unknown (yet)."""
        if self.adviser is None or self._advice is None or culprit.port is None:
            return None
        return self.adviser.about(self._advice, culprit.proto, culprit.port, culprit.netns)

    def section(self, culprit: Culprit, width: int, palette: Palette) -> list[Text]:
        """The same as lines of the page about that culprit."""
        remedy = self.about(culprit)
        if remedy is not None:
            return remedy_lines(remedy, width, palette)
        words = wrapped(self._silence(culprit), width - 3, 3)
        said = [line([(one, palette.dim)], width) for one in words]
        return [_head(width, palette), *said, blank(width)]

    def _silence(self, culprit: Culprit) -> str:
        if self.adviser is None:
            return "no advice can be given here"
        if culprit.port is None:
            return "advice is by service: press g until rows have a port, or a for all of it"
        if self._advice is None:
            return self._error or self._working()
        return "none: it holds too little of the table to need a rule"

    def _working(self) -> str:
        words = "reading the rules and trying out what helps"
        if not _alive(self._making):
            return words
        so_far = fmt.duration(int(time.monotonic() - self._began))
        return f"{words}: {so_far} so far. It goes on while you look at other pages; Esc ends it"

    def _under_way(self) -> str:
        return f"{self._doing}: {fmt.duration(int(time.monotonic() - self._acted_at))} so far"

    def copyable(self) -> str:
        """The rules as text."""
        if self.adviser is None or self._advice is None:
            return ""
        return self.adviser.rules(self._advice)

    def offer(self) -> tuple[str, tuple[str, ...]]:
        """The question to ask before anything is done. Raises CtraceError with the reason when
        there is none."""
        if self.adviser is None:
            raise CtraceError("no advice can be given here")
        if self._advice is None:
            raise CtraceError("no advice yet")
        self._offered = self._advice
        return self.adviser.offer(self._offered)


def _amended(cause: model.Cause, untracked: frozenset[tuple[int, str, int]]) -> model.Cause:
    if (cause.netns, cause.proto, cause.port) in untracked:
        return replace(cause, remedies=(_waiting("it"),))
    parts = [
        _waiting(f"{proto}/{port}")
        for netns, proto, port in sorted(untracked)
        if cause.port is None and netns == cause.netns and cause.proto in ("", proto)
    ]
    return replace(cause, remedies=(*parts, *cause.remedies)) if parts else cause


def _waiting(what: str) -> model.Remedy:
    text = f"{what} is untracked now: entries from before go up to a minute after their timeout"
    return model.Remedy("look", text)


def _alive(thread: Optional[threading.Thread]) -> bool:
    return thread is not None and thread.is_alive()


def remedy_lines(remedy: Remedy, width: int, palette: Palette) -> list[Text]:
    """What to do about one service, with its rules to copy."""
    p = palette
    style = p.good if remedy.good else p.warn
    out = [_head(width, p)]
    out += [line([(words, style)], width) for words in wrapped(remedy.text, width - 2, 3)]
    for reason in remedy.reasons:
        words = wrapped(fmt.prose(reason), width - 4, 4)
        out += [
            line([("  " if row else "- ", p.text), (one, p.text)], width)
            for row, one in enumerate(words)
        ]
    if remedy.rules:
        out.append(line([("y copies these rules:", p.dim)], width))
        for raw in remedy.rules.rstrip().expandtabs(2).splitlines():
            out += [line([(words, p.strong)], width) for words in folded("  " + raw, width - 2)]
    for other in remedy.others:
        out += [line([(one, p.dim)], width) for one in wrapped(fmt.clean(other), width - 2, 3)]
    return [*out, blank(width)]


def _head(width: int, palette: Palette) -> Text:
    text = line([("ADVICE", palette.accent)], width)
    text.style = palette.band
    return text


def _dressed(text: Text, width: int, palette: Palette) -> list[Text]:
    """A line of the advice in the screen's colours; one that is too long goes on below."""
    plain = text.plain.rstrip()
    if cell_len(plain) > width - 2:
        return [line([(words, palette.dim)], width) for words in folded(plain, width - 2)]
    pieces: list[Piece] = []
    at = 0
    for span in text.spans:
        pieces += [
            (plain[at : span.start], palette.text),
            (plain[span.start : span.end], _meaning(span.style, palette)),
        ]
        at = span.end
    return [line([*pieces, (plain[at:], palette.text)], width)]


def _meaning(style: Union[str, Style], palette: Palette) -> Style:
    """The palette's style for one of the terminal's colours."""
    one = Style.parse(style) if isinstance(style, str) else style
    if one.color is not None:
        named = {1: palette.bad, 2: palette.good, 3: palette.warn}
        return named.get(one.color.number or 0, palette.text)
    return palette.strong if one.bold else palette.dim if one.dim else palette.text
