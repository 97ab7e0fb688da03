"""Whole frames: exact size, everything important at 80x24, nothing that disturbs."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import samples
from kit.examples import examples
from kit.loads import snapshots
from rich.cells import cell_len
from rich.console import Console
from textual.binding import Binding

from ctrace.model.snapshot import GROUPS, SORTS, Snapshot
from ctrace.view.palette import DARK, LIGHT, PALETTES, TERMINAL, Palette, choose
from ctrace.view.screen.frame import compose, frame
from ctrace.view.screen.keys import PRINTED, markdown
from ctrace.view.screen.parts import sentence
from ctrace.view.screen.stage import bindings
from ctrace.view.screen.state import MODES, State
from ctrace.view.verdict import in_trouble

EXPECTED = Path(__file__).parent / "expected"
ROOT = Path(__file__).parents[2]
SCENES: dict[str, Callable[[], Snapshot]] = {
    "incident": samples.incident,
    "filling": samples.filling,
    "calm": samples.calm,
    "netlink": samples.netlink,
    "namespaces": snapshots.namespaces,
    "hostile": snapshots.hostile,
}
SIZES = ((80, 24), (120, 40), (200, 60))


def printed(
    snapshot: Snapshot, width: int, height: int, palette: Palette, *, ascii_only: bool = False,
    colour: bool = False,
) -> str:  # fmt: skip
    out = io.StringIO()
    console = Console(
        file=out, width=width, height=height, force_terminal=colour, legacy_windows=False,
        color_system="truecolor" if colour else None,
    )  # fmt: skip
    console.print(frame(snapshot, width, height, palette=palette, ascii_only=ascii_only), end="")
    return out.getvalue()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", SCENES)
def test_frames_are_as_they_were_reviewed(name: str, size: tuple[int, int]) -> None:
    """To renew them: scripts/pictures --expected, then look at every one that changed."""
    text = printed(SCENES[name](), *size, DARK)
    file = EXPECTED / f"{name}-{size[0]}x{size[1]}.txt"
    assert text == file.read_text(encoding="utf-8")


def test_pictures_are_as_they_were_reviewed(tmp_path: Path) -> None:
    """In colour and without, at three sizes. To renew them: scripts/pictures, then look."""
    script = ROOT / "scripts" / "pictures"
    subprocess.run([sys.executable, str(script), "--into", str(tmp_path)], check=True,
                   capture_output=True)  # fmt: skip
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert {f"{kind}-{w}x{h}.svg" for kind in ("top", "plain") for w, h in SIZES} < set(made)
    for name, text in made.items():
        folder = EXPECTED if name.startswith("plain") else ROOT / "ctrace" / "share" / "pictures"
        assert text == (folder / name).read_text(encoding="utf-8"), name
        colours = set(re.findall(r"fill: (#[0-9a-f]{6})", text))
        if name.startswith("plain"):
            assert all(len({c[1:3], c[3:5], c[5:7]}) == 1 for c in colours), colours
        else:
            assert len(colours) > 8


def test_the_readme_has_every_key() -> None:
    """To renew the table: scripts/pictures."""
    page = (ROOT / "docs" / "screen.md").read_text(encoding="utf-8")
    table = page.partition("<!-- keys: begin -->\n")[2].partition("\n<!-- keys: end -->")[0]
    assert table == markdown()
    told = set(re.findall(r"`([^`]+)`", table))
    bound = {binding.key for binding in bindings() if isinstance(binding, Binding)}
    assert told == {PRINTED.get(name, name) for name in bound}


@pytest.mark.parametrize("palette", PALETTES.values(), ids=PALETTES)
@pytest.mark.parametrize("name", SCENES)
def test_without_colour_every_word_is_still_there(name: str, palette: Palette) -> None:
    snapshot = SCENES[name]()
    plain = printed(snapshot, 120, 40, palette)
    assert plain == printed(snapshot, 120, 40, TERMINAL)
    assert "\x1b" not in plain
    coloured = printed(snapshot, 120, 40, palette, colour=True)
    assert "\x1b[" in coloured


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("size", SIZES)
def test_ascii_frames_are_ascii_and_keep_their_columns(name: str, size: tuple[int, int]) -> None:
    snapshot = SCENES[name]()
    plain = printed(snapshot, *size, TERMINAL, ascii_only=True)
    assert plain.isascii()
    widths = [cell_len(line) for line in printed(snapshot, *size, TERMINAL).splitlines()]
    assert [len(line) for line in plain.splitlines()] == widths


def test_a_small_screen_answers_everything() -> None:
    text = printed(samples.incident(), 80, 24, DARK)
    for wanted in (
        "65\u202f536 of 65\u202f536", "100 %", "FULL", "for 1 min 12 s", "since 10:00:57",
        "pinned 95 %",
        "new 594/s", "gone 577/s", "EVICTED 16/s", "DROPPED 15/s", "WHY", "tcp/8063", "TIME_WAIT",
        "HELPS", "php-fpm", "10.42.3.17 → tcp/8063", "54\u202f600", "83 %", "4.2 ms", "120 s",
        "10.96.0.10:53", "app[1001]", "exact", "netfilter", "lost 0", "self 1.8 %", "46 MiB",
    ):  # fmt: skip
        assert wanted in text, wanted


@pytest.mark.parametrize("name", SCENES)
def test_the_two_ends_of_the_header_stand_apart(name: str) -> None:
    for width in range(60, 200, 3):
        head = printed(SCENES[name](), width, 24, TERMINAL).splitlines()[0]
        word = next(word for word in ("totals exact", "exact", "differs") if word in head)
        before = head[: head.index(word)]
        assert before.endswith("  "), head


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_filter_is_always_told(width: int) -> None:
    pruned = replace(samples.incident().memory, pruned=9)
    shown = replace(samples.incident(), filter="netns=netns:4026532388", memory=pruned)
    note = [(" PAUSED ", TERMINAL.alarm)]
    head = compose(shown, width, 24, TERMINAL, State(), note=note).lines[0].plain
    assert " filter n" in head
    assert "88  " in head
    assert "PAUSED" in head
    assert "keys bounded" in head


def test_a_number_stays_with_its_unit() -> None:
    for width in range(20, 90):
        for words in sentence("closed (they live 12 ms, held 20 s): 98 % of the table", width, 9):
            assert not re.search(r"\d$", words), (width, words)


def test_full_is_not_said_of_a_table_that_has_room_and_refuses_nobody() -> None:
    full = samples.incident()
    table = replace(full.tables[0], count=40_000, rates=replace(full.rates, drop=0, early_drop=0))
    text = printed(replace(full, tables=(table,)), 80, 24, TERMINAL)
    assert "EASING  61 % full, was full at 10:01:55" in text
    assert not in_trouble(replace(full, tables=(table,)))
    evicting = replace(table, count=64_900, rates=replace(table.rates, early_drop=3.0))
    assert "EVICTS  for 1 min 12 s: 3.0/s evicted, 2\u202f114 refused since" in printed(
        replace(full, tables=(evicting,)), 80, 24, TERMINAL
    )
    assert in_trouble(replace(full, tables=(evicting,)))


@pytest.mark.parametrize("width", [40, 50, 64, 80])
@pytest.mark.parametrize("name", SCENES)
def test_a_gauge_and_its_number_never_touch(name: str, width: int) -> None:
    gauge = printed(SCENES[name](), width, 20, TERMINAL).splitlines()[2]
    assert re.search(r"[█▒░] +\d", gauge), gauge


def test_what_a_family_cannot_see_is_said() -> None:
    text = printed(samples.netlink(), 80, 24, TERMINAL)
    assert "evictions unseen" in text
    assert "netlink hooks cannot name who is" in text
    assert "only netlink, for netfilter: BCC is not installed" in text
    assert "UNSEEN" in text
    assert "lost 18\u202f204" in text
    assert "differs by 18\u202f190" in text
    wide = printed(samples.netlink(), 120, 40, TERMINAL)
    assert "differs from kernel by 18\u202f190" in wide


def test_time_to_full_is_told_with_its_error() -> None:
    assert "FILLING 63 % full, at its limit in 65 to 77 s" in printed(
        samples.filling(), 80, 24, TERMINAL
    )


def test_a_table_that_is_nearly_empty_is_healthy_first() -> None:
    """However long a forecast: 0.1 % full in three hours is no trouble."""
    calm = samples.calm()
    table = replace(calm.tables[0], seconds_to_full=9000.0, seconds_to_full_error=2000.0)
    assert "HEALTHY" in printed(replace(calm, tables=(table,)), 80, 24, TERMINAL)
    soon = replace(table, seconds_to_full=600.0, seconds_to_full_error=60.0)
    assert "FILLING" in printed(replace(calm, tables=(soon,)), 80, 24, TERMINAL)


def test_the_table_in_trouble_is_the_one_shown() -> None:
    text = printed(snapshots.namespaces(), 120, 40, TERMINAL)
    assert "in pod-08" in text
    assert "+39 namespaces" in text


@pytest.mark.parametrize("mode", ["top", "victims", "namespaces"])
@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
def test_no_name_reaches_the_terminal_raw(mode: str, size: tuple[int, int]) -> None:
    lines = compose(snapshots.hostile(), *size, DARK, State(mode=mode)).lines
    for line in lines:
        for char in line.plain:
            assert unicodedata.category(char) not in ("Cc", "Cf", "Cs")
            assert unicodedata.bidirectional(char) not in ("R", "AL", "RLO")
        assert cell_len(line.plain) == size[0]


@examples(150)
@given(
    st.sampled_from(sorted(SCENES)),
    st.integers(1, 260),
    st.integers(1, 90),
    st.sampled_from(MODES),
    st.sampled_from(GROUPS),
    st.sampled_from(SORTS),
    st.booleans(),
    st.integers(0, 10**6),
    st.sampled_from(["culprits", "victims"]),
)
def test_every_size_is_filled_exactly(
    name: str, width: int, height: int, mode: str, group: str, sort: str, reverse: bool,
    cursor: int, pane: str,
) -> None:  # fmt: skip
    snapshot = replace(SCENES[name](), group=group, sort=sort)
    state = State(mode, group, sort, reverse, pane=pane, cursor=cursor, scroll=cursor)
    painted = compose(snapshot, width, height, DARK, state, page=lambda _: [])
    assert len(painted.lines) == height
    assert {cell_len(line.plain) for line in painted.lines} == {width}


@pytest.mark.parametrize("palette", [DARK, LIGHT], ids=["dark", "light"])
def test_colours_can_be_read(palette: Palette) -> None:
    """WCAG's contrast for text of normal size."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, two: str) -> float:
        light, dark = sorted((luminance(one), luminance(two)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    cursor = palette.cursor.bgcolor
    assert cursor is not None
    for name in ("text", "strong", "dim", "accent", "good", "warn", "bad", "band", "alarm"):
        style = getattr(palette, name)
        behind = [style.bgcolor.name] if style.bgcolor else [palette.background]
        if name in ("text", "strong"):
            behind.append(cursor.name)
        for back in behind:
            assert contrast(style.color.name, back) >= 4.5, (name, back)


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"TERM": "xterm-256color"}, "dark"),
        ({"TERM": "xterm"}, "terminal"),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, "dark"),
        ({"TERM": "xterm-256color", "COLORFGBG": "0;15"}, "light"),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, "terminal"),
        ({"TERM": "xterm-256color", "CTRACE_THEME": "light"}, "light"),
    ],
)
def test_which_colours_a_terminal_gets(environ: dict[str, str], name: str) -> None:
    assert choose("", environ).name == name
