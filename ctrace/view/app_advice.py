"""The advice page: asked for in the background, shown when it comes, applied only by name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from rich.text import Text

from ctrace.errors import CtraceError
from ctrace.model.snapshot import Snapshot
from ctrace.view import format as fmt
from ctrace.view.palette import Palette
from ctrace.view.parts import blank, line, wrapped


@dataclass(frozen=True)
class Adviser:
    """What the page needs of the advice: handed in, so that the view fetches nothing."""

    advise: Callable[[Snapshot], Any]
    """Makes the advice; may take seconds (it reads the ruleset)."""
    text: Callable[[Any, int], str]
    """The advice in words, for a width."""
    rules: Callable[[Any], str]
    """The commands or rules to copy."""
    apply: Optional[Callable[[Any], str]] = None
    """Applies the plan and says what was done; None where nothing can be applied."""
    why_not: str = "apply it with: ctrace advise --plan plan.json, then: ctrace apply plan.json"
    word: str = "apply"
    """What has to be typed."""


class AdvicePane:
    """The state of the advice page."""

    def __init__(self, adviser: Optional[Adviser] = None) -> None:
        self.adviser = adviser
        self._advice: Any = None
        self._error = ""
        self._asked_at: float = 0.0
        self._thread: Optional[threading.Thread] = None
        self._news = False

    def ask(self, snapshot: Snapshot, subject: tuple[str, int]) -> None:  # noqa: ARG002
        """Begin to make advice from this snapshot, unless it is being made."""
        if self.adviser is None or (self._thread is not None and self._thread.is_alive()):
            return
        self._asked_at = snapshot.ts / 1e9
        self._thread = threading.Thread(target=self._work, args=(snapshot,), daemon=True)
        self._thread.start()

    def _work(self, snapshot: Snapshot) -> None:
        assert self.adviser is not None
        try:
            self._advice, self._error = self.adviser.advise(snapshot), ""
        except CtraceError as error:
            self._error = str(error)
        except Exception as error:  # a screen must survive what its page could not make
            self._error = f"{type(error).__name__}: {error}"
        self._news = True

    def arrived(self) -> bool:
        """Whether something has come since the last call."""
        news, self._news = self._news, False
        return news

    def lines(self, width: int, palette: Palette) -> Sequence[Text]:
        """The page."""
        p = palette
        when = f"  from {fmt.clock(self._asked_at)}" if self._advice is not None else ""
        head = line([("ADVICE", p.accent), (when, p.dim)], width)
        head.style = p.band
        if self.adviser is None:
            return [head, line([("no advice can be given here", p.dim)], width)]
        if self._error:
            words = wrapped(fmt.clean(self._error), width - 4, 4)
            return [head, *(line([(one, p.warn)], width) for one in words)]
        if self._advice is None:
            reading = "reading the ruleset and weighing the flows"
            return [head, blank(width), line([(reading, p.dim)], width)]
        return [head, *self._body(self.adviser.text(self._advice, width - 2), width, p)]

    @staticmethod
    def _body(text: str, width: int, palette: Palette) -> list[Text]:
        out = []
        for raw in text.splitlines():
            # A line in capitals is a title, one that is set in is a rule or its evidence.
            words = fmt.clean(raw.rstrip())
            title = words[:1].isalpha() and words.split(" ")[0].isupper()
            style = (
                palette.accent if title else palette.dim if words[:4] == "    " else palette.text
            )
            out.append(line([(words, style)], width))
        return out

    def copyable(self) -> str:
        """The rules as text."""
        if self.adviser is None or self._advice is None:
            return ""
        return self.adviser.rules(self._advice)

    def confirmation(self) -> str:
        """The word that has to be typed; empty when nothing can be applied."""
        if self.adviser is None or self._advice is None or self.adviser.apply is None:
            return ""
        return self.adviser.word

    def why_not(self) -> str:
        """Why nothing can be applied from here, and what to do."""
        if self.adviser is None:
            return "no advice can be given here"
        return "no advice yet" if self._advice is None else self.adviser.why_not

    def apply(self) -> str:
        """Apply, and say what was done."""
        if self.adviser is None or self.adviser.apply is None or self._advice is None:
            return self.why_not()
        return self.adviser.apply(self._advice)
