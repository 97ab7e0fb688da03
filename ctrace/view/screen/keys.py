"""The keys: one list for the bindings, the footer, the help page and the README."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from ctrace.view.palette import Palette
from ctrace.view.screen.parts import blank, line, wrapped


@dataclass(frozen=True)
class Key:
    """One thing that a key does."""

    keys: tuple[str, ...]
    """As the terminal library names them; the first is the one that is shown."""
    action: str
    """Method ``action_<name>`` of the application."""
    short: str
    """In the footer; empty for keys that only the help page shows."""
    text: str
    """On the help page."""
    shown: str = ""
    """How the key is written, where that differs from its name."""
    modes: tuple[str, ...] = ()
    """Where the footer shows it; empty: in ``top``, ``victims`` and ``namespaces``."""
    travel: bool = False
    """Only in a replay."""
    live: bool = False
    """Not in a replay."""

    def serves(self, travels: bool) -> bool:
        """Whether it does something in a replay (``travels``), or on a live host."""
        return not self.live if travels else not self.travel

    @property
    def names(self) -> str:
        """All its keys as a person reads them."""
        digits = self.shown if "-" in self.shown else ""
        return digits or " ".join(PRINTED.get(name, name) for name in self.keys)

    @property
    def label(self) -> str:
        """The key as a person reads it."""
        return self.shown or self.keys[0]


PAGES: Final = ("detail", "advice", "help")
ROWS: Final = ("top", "victims", "namespaces")
NARROWED: Final = "narrowed"
"""The mode ``top`` with a filter."""
ALL: Final = (*ROWS, NARROWED, *PAGES)

KEYS: Final = (
    Key(("q", "ctrl+c"), "quit", "quit", "quit", modes=ALL),
    Key(("question_mark", "h", "f1"), "help", "help", "help: every key and every word", "?", ALL),
    Key(
        ("escape", "backspace"),
        "up",
        "back",
        "one step back: from a page to its list, from a filter to the one before",
        "Esc",
        ("victims", "namespaces", NARROWED, *PAGES),
    ),
    Key(("space",), "pause", "pause", "pause, or go on: nothing is lost meanwhile", "space", ALL),
    Key(("enter",), "drill", "drill", "everything about the row under the cursor", "Enter"),
    Key(
        ("a",),
        "advice",
        "advice",
        "what helps, with rules, hazards and undo",
        modes=("top", "victims", "namespaces", "detail"),
    ),
    Key(
        ("g",),
        "group",
        "group",
        "group by who holds most, source and service, source, destination, service, pod, ...",
    ),
    Key(("G",), "group_back", "", "the same, backwards"),
    Key(
        ("slash",),
        "filter",
        "filter",
        "show only matching flows: dport=53, src=10.0.0.0/8, proto=udp, or any text",
        "/",
    ),
    Key(("ctrl+l",), "no_filter", "", "clear the filter", "Ctrl-L"),
    Key(("s", "greater_than_sign"), "sort", "sort", "sort by the next column"),
    Key(("less_than_sign",), "sort_back", "", "sort by the previous column", "<"),
    Key(("S",), "reverse", "", "reverse the order"),
    Key(
        ("1", "2", "3", "4", "5"),
        "sort_digit",
        "",
        "sort by held, new, life, time in the table, drops",
        "1-5",
    ),
    Key(
        ("v",),
        "victims",
        "victims",
        "everyone who was refused or evicted",
        modes=("top", "namespaces"),
    ),
    Key(
        ("n",),
        "namespaces",
        "netns",
        "every namespace's table; Enter shows one alone",
        modes=("top", "victims"),
    ),
    Key(("tab",), "pane", "", "the other table", "Tab"),
    Key(
        ("r",),
        "record",
        "record",
        "start recording to a file, or stop",
        modes=("top", "detail"),
        live=True,
    ),
    Key(
        ("y",),
        "copy",
        "copy",
        "copy the rules of the advice; without any, the row's key",
        modes=("detail", "advice"),
    ),
    Key(
        ("p",),
        "apply",
        "apply",
        "apply a plan: asks for a typed confirmation",
        modes=("advice",),
        live=True,
    ),
    Key(
        ("x",),
        "unfold",
        "rules",
        "the rules and commands of the advice in full, or folded",
        modes=("advice",),
    ),
    Key(("T",), "step_back", "", "one step back in time", travel=True),
    Key(("t",), "step", "step", "one step forward in time", travel=True, modes=ALL),
    Key(("j",), "jump", "jump", "jump: 10:03:07, +30, -2m or 50%", travel=True, modes=ALL),
    Key(
        ("right_square_bracket",),
        "next_drop",
        "next drop",
        "to the next burst of drops",
        "]",
        travel=True,
        modes=ALL,
    ),
    Key(
        ("left_square_bracket",),
        "prev_drop",
        "",
        "to the previous burst of drops",
        "[",
        travel=True,
    ),
    Key(("plus", "equals_sign"), "faster", "", "play twice as fast", "+", travel=True),
    Key(("minus",), "slower", "", "play half as fast", "-", travel=True),
    Key(("down", "up"), "move", "", "next row, previous row", "↓ ↑"),
    Key(("pagedown", "pageup"), "page", "more", "a screenful", "PgDn", modes=PAGES),
    Key(("home", "end"), "edge", "", "first row, last row", "Home End"),
    Key(("l",), "light", "", "dark, light, or the terminal's own colours"),
    Key(("colon", "ctrl+p"), "command_palette", "", "the same commands by name", ":"),
)


PRINTED: Final = {
    "ctrl+c": "Ctrl-C", "ctrl+p": "Ctrl-P", "ctrl+l": "Ctrl-L", "question_mark": "?", "f1": "F1",
    "escape": "Esc", "backspace": "Backspace", "enter": "Enter", "tab": "Tab", "slash": "/",
    "greater_than_sign": ">", "less_than_sign": "<", "right_square_bracket": "]",
    "left_square_bracket": "[", "plus": "+", "equals_sign": "=", "minus": "-", "colon": ":",
    "down": "↓", "up": "↑", "pagedown": "PgDn", "pageup": "PgUp", "home": "Home", "end": "End",
}  # fmt: skip
"""What is printed on the keys, where the terminal library has other names for them."""


def markdown() -> str:
    """Every key as the README's table, two keys a row."""
    cells = []
    for key in KEYS:
        names = ", ".join(f"`{PRINTED.get(name, name)}`" for name in key.keys)
        cells.append(f"{names} | {'in a replay: ' if key.travel else ''}{key.text}")
    half = -(-len(cells) // 2)
    left, right = cells[:half], cells[half:]
    right += [" | "] * (half - len(right))
    rows = [f"| {one} | {other} |" for one, other in zip(left, right)]
    return "\n".join(["| key | does | key | does |", "|---|---|---|---|", *rows])


WANTED: Final = (
    "quit", "help", "up", "step", "jump", "next_drop", "apply", "unfold", "copy", "advice", "drill",
    "group", "filter", "sort", "victims", "namespaces", "page", "record", "pause",
)  # fmt: skip
"""The footer's order when not all keys have room: none of these is needed to leave or to learn."""


def footer_keys(mode: str, travels: bool) -> list[Key]:
    """The keys that the footer offers here, most wanted first."""
    modes = {mode, "top" if mode == NARROWED else mode}
    offered = [
        key for key in KEYS if key.short and modes & set(key.modes or ROWS) and key.serves(travels)
    ]
    return sorted(offered, key=lambda key: WANTED.index(key.action))


def footer(
    mode: str, width: int, palette: Palette, travels: bool
) -> tuple[Text, list[tuple[int, int, str]]]:
    """The footer, and the action of a click on each cell."""
    text = Text(" ", no_wrap=True, end="")
    spots: list[tuple[int, int, str]] = []
    gap = 2 if width >= 110 else 1
    for key in footer_keys(mode, travels):
        start = cell_len(text.plain)
        if start + len(key.label) + 1 + len(key.short) + 1 > width:
            break
        text.append(key.label, palette.accent)
        text.append(" " + key.short, palette.band)
        spots.append((start, cell_len(text.plain), key.action))
        text.append(" " * gap)
    text.truncate(width, pad=True)
    text.style = palette.band
    return text, spots


COLUMNS: Final = (
    ("NEW/s", "entries made per second over the last interval; GONE/s: entries that left"),
    ("LIFE", "median real life of a connection: first to last packet; p99: of the longest 1 %"),
    ("IN TABLE", "how long its entry stays in the table (median): what fills it"),
    ("HELD", "entries in the table now; ranked by this unless sorted otherwise"),
    ("SHARE", "its share of all held entries; OF TABLE: the same as a bar"),
    ("1 MINUTE", "entries held over the last minute"),
    ("WHO", "the process that opened the flows, or listens for them; the pod whose address it is"),
    ("POD", "of a refused source: the pod or container whose address it is"),
    ("WAY", "in: received by this host, out: sent by it, forward: neither"),
    ("NAT", "whether its addresses are rewritten: NOTRACK would break that"),
    ("HOW THEY END", "expired, evicted to make room, deleted"),
    ("PINNED", "share that is ASSURED (sampled): never evicted, so a table full of them refuses"),
    ("ONE-WAY", "share that was never answered"),
    ("ENTRIES", "entries made since the start; in the table of namespaces: held now"),
    ("OLDER", "entries that were there before ctrace: their age is not known"),
    ("SOURCES", "number of source addresses"),
    ("±", "upper bound on events missing from this row"),
    ("DROPPED", "new flows refused because the table was full; DROP/s: per second"),
    ("GOT EPERM", "the local process whose send or connect failed"),
    ("REFUSED %", "share of its new flows that was refused"),
    ("EVICTED", "entries thrown out early to make room for others; EVICT/s: per second"),
    ("LOST RACE", "inserts that failed: an entry with the same tuple was inserted first (clash)"),
    (
        "HEALTHY",
        "far from the limit, nothing refused; HIGH: above 75 %; RISING: at this rate full within "
        "a minute; FILLING: it will be full; "
        "FULL: refusing; EVICTS: making room; EASING: full a moment ago; LOSING: new entries fail",
    ),
    ("chains", "entries for each of the hash table's buckets; far above 1, look-ups are slow"),
    ("~, stale", "held counts are still being read from the table: at the start, or after losses"),
    ("exact", "ctrace's counts agree with the kernel's own (conntrack -C and -S)"),
    ("differs", "by how much they disagree; DIFFERS: of that namespace's entries"),
    ("STATE", "FULL: refusing; EVICTING: making room; EASING: full a moment ago"),
    ("NETNS", "network namespace; INODE: its number; FILL: its ENTRIES of the LIMIT"),
)


def help_lines(width: int, palette: Palette, travels: bool) -> Sequence[Text]:
    """The help page."""
    p = palette

    def section(title: str) -> Text:
        text = line([(title, p.accent)], width)
        text.style = p.band
        return text

    def told(name: str, text: str, style: Style) -> list[Text]:
        rows = wrapped(text, width - 17, len(text))  # the page scrolls: nothing is cut
        return [
            line([(f"{'' if row else name:>13}  ", style), (words, p.text)], width)
            for row, words in enumerate(rows)
        ]

    out = [section("KEYS")]
    for key in KEYS:
        if key.serves(travels):
            out += told(key.names, key.text, p.accent)
    out += [blank(width), section("WORDS")]
    for word, meaning in COLUMNS:
        out += told(word, meaning, p.strong)
    out.append(blank(width))
    out.append(
        line(
            [("Nothing here changes the system unless you type a word to confirm it.", p.dim)],
            width,
        )
    )
    return out
