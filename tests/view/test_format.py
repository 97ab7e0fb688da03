"""Numbers and names as a person reads them."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kit.loads import snapshots
from rich.cells import cell_len
from rich.console import Console, Group

from ctrace.view import format as fmt
from ctrace.view.prose import prose

finite = st.floats(0, 1e12, allow_nan=False)
names = st.text(max_size=60) | st.sampled_from(snapshots.HOSTILE)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"), (0, "0 s"), (350e-6, "350 µs"), (0.004, "4 ms"), (0.0042, "4.2 ms"),
        (0.9996, "1 s"), (1.5, "1.5 s"), (120, "120 s"), (120.4, "120 s"), (720, "12 min"),
        (10_800, "3 h"), (3.5 * 86_400, "4 d"), (-3, "-3 s"), (float("inf"), "-"),
    ],
)  # fmt: skip
def test_durations(seconds: float, shown: str) -> None:
    assert fmt.duration(seconds) == shown


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        (None, "-"), (0, "0 %"), (0.0001, "<0.1 %"), (0.027, "2.7 %"), (0.0999, "10 %"),
        (0.833, "83 %"), (0.996, ">99 %"), (0.99999, ">99 %"), (1, "100 %"), (1.2, "120 %"),
    ],
)  # fmt: skip
def test_shares(part: float, shown: str) -> None:
    assert fmt.share(part) == shown


def test_counts_and_rates() -> None:
    assert fmt.count(262_144) == "262\u202f144"
    assert [fmt.short(n) for n in (812, 9_812, 98_123, 999_960, 1_200_000)] == [
        "812", "9\u202f812", "98.1k", "1.0M", "1.2M",
    ]  # fmt: skip
    assert [fmt.rate(r) for r in (None, 0, 0.02, 1.46, 9.97, 1820.4)] == [
        "-", "0", "<0.1", "1.5", "10", "1\u202f820",
    ]  # fmt: skip
    assert [fmt.size(n) for n in (812, 46 << 20, 3 << 29)] == ["812 B", "46 MiB", "1.5 GiB"]
    assert [fmt.span(n) for n in (45, 130, 11_100, 187_200)] == [
        "45 s", "2 min 10 s", "3 h 05 min", "2 d 4 h",
    ]  # fmt: skip


def test_thousands_in_a_sentence_are_set_apart_as_in_a_table() -> None:
    assert fmt.prose("4,096 of 262,144, ports 1,2 and 8063,53") == (
        "4\u202f096 of 262\u202f144, ports 1,2 and 8063,53"
    )
    assert fmt.prose("\x1b1,000") == "\\x1b1\u202f000"


@given(finite, finite)
def test_a_longer_time_never_looks_shorter(one: float, two: float) -> None:
    units = {"µs": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86400}

    def read(text: str) -> float:
        number, _, unit = text.partition(" ")
        return float(number.replace(fmt.THIN, "")) * units[unit]

    small, large = sorted((one, two))
    assert read(fmt.duration(small)) <= read(fmt.duration(large)) * 1.0001
    # Two figures are kept: half of the second is the most that is lost.
    assert read(fmt.duration(large)) == pytest.approx(large, rel=0.06, abs=6e-8)


@given(finite)
def test_numbers_fit_their_columns(value: float) -> None:
    assert len(fmt.short(value)) <= 5
    assert len(fmt.duration(min(value, 86_400 * 99))) <= 6
    assert len(fmt.share(value % 1.0)) <= 6


@given(names)
def test_a_clean_name_can_do_no_harm(name: str) -> None:
    clean = fmt.clean(name)
    for char in clean:
        assert unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        assert unicodedata.bidirectional(char) not in ("R", "AL", "AN", "RLO", "RLE", "RLI")
    assert fmt.clean(clean) == clean


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_an_ordinary_name_stays_as_it_is(name: str) -> None:
    assert fmt.clean(name) == name


@given(names, st.integers(0, 70))
def test_cut_names_fit_and_keep_both_ends(name: str, width: int) -> None:
    name = fmt.clean(name)
    short = fmt.cut(name, width)
    assert cell_len(short) <= width
    if cell_len(name) <= width:
        assert short == name
    elif width >= 6:
        head, _, tail = short.partition(fmt.ELLIPSIS)
        assert name.startswith(head)
        assert name.endswith(tail)


@given(names, st.integers(1, 70), st.booleans())
def test_a_fitted_name_fills_its_column_exactly(name: str, width: int, right: bool) -> None:
    assert cell_len(fmt.fit(fmt.clean(name), width, right)) == width


@given(st.ip_addresses(v=6).map(str), st.integers(5, 45))
@example("2001:db8:85a3:1234:5678:8a2e:370:7334", 20)
def test_an_ipv6_address_fits(address: str, width: int) -> None:
    short = fmt.address(address, width)
    assert len(short) <= width
    assert short == address or fmt.ELLIPSIS in short


def test_a_key_keeps_its_service_whole() -> None:
    long = "2001:db8:85a3:1234:5678:8a2e:370:7334 -> tcp/8063"
    assert fmt.key(long, 30) == "2001:db8…370:7334 → tcp/8063"
    assert fmt.key("10.0.0.1 -> udp/53", 40) == "10.0.0.1 → udp/53"


@given(names, st.integers(0, 200))
def test_ascii_is_ascii_and_keeps_the_columns(name: str, width: int) -> None:
    text = fmt.key(name, width) + fmt.sparkline((1, 2, 0, 3), 4) + fmt.hbar(0.37, 9) + "12\u202f000"
    plain = fmt.ascii_only(text)
    assert plain.isascii()
    assert cell_len(plain) == cell_len(text)


@given(st.lists(st.floats(0, 1e9), max_size=80), st.integers(0, 40))
def test_a_sparkline_shows_zero_as_nothing_else(values: list[float], width: int) -> None:
    bars = fmt.sparkline(values, width)
    assert len(bars) == (width if width else 0)
    for value, bar in zip(values[-width:] if width else [], bars[-len(values) :], strict=False):
        assert (bar == fmt.RAMP[0]) == (value == 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(1, 200))
def test_a_gauge_never_overflows_and_never_hides_a_part(parts: list[float], width: int) -> None:
    total = sum(parts) or 1.0
    parts = [part / total if total > 1 else part for part in parts]
    cells = fmt.bar(parts, width)
    assert sum(cells) <= width
    shown = sum(part > 0 for part in parts)
    if width >= len(parts):
        assert sum(cell > 0 for cell in cells) >= min(shown, 1)


@given(st.floats(0, 1), st.integers(1, 40))
def test_a_bar_is_as_long_as_its_share(part: float, width: int) -> None:
    bar = fmt.hbar(part, width)
    assert len(bar) <= width
    assert bool(bar) == (part > 0)


@pytest.mark.parametrize(
    ("environ", "ascii_wanted"),
    [
        ({"LANG": "C"}, True),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, True),  # as Python leaves it after coercion
        ({"LANG": "en_GB.UTF-8"}, False),
        ({"LANG": "en_GB.UTF-8", "LC_ALL": "C"}, True),
        ({"LC_ALL": "C.UTF-8"}, False),
        ({"LANG": "de_DE.ISO-8859-1"}, True),
        ({}, True),
        ({"LANG": "en_GB.UTF-8", "TERM": "linux"}, True),
        ({"LANG": "C", "CTRACE_ASCII": "0"}, False),
        ({"LANG": "en_GB.UTF-8", "CTRACE_ASCII": "1"}, True),
    ],
)
def test_which_terminals_get_ascii(environ: dict[str, str], ascii_wanted: bool) -> None:
    assert fmt.wants_ascii(environ) is ascii_wanted


@given(
    words=st.lists(st.sampled_from(("entries", "of", "which")) | st.integers(0, 10**9), min_size=1),
    width=st.integers(16, 60),
)
def test_a_number_is_not_broken_between_its_thousands(words: list[object], width: int) -> None:
    said = " ".join(f"{word:,}" if isinstance(word, int) else str(word) for word in words)
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, markup=False).print(Group(prose(said)))
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    whole = [word for line in lines for word in line.split(" ") if word]
    assert whole == [word.replace(",", fmt.THIN) for word in said.split(" ")]
