"""What the verdict says of a table that rises and will level off."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import pytest
from kit import samples

from ctrace.view.palette import DARK
from ctrace.view.screen.parts import rate_line, table_lines
from ctrace.view.verdict import verdict


@pytest.mark.parametrize(
    ("level", "error", "said"),
    [
        (9_000.0, 500.0, "rising to 13 to 14 %"),
        (9_000.0, 1.0, "rising to 14 %"),
        (None, None, "full, nothing"),
    ],
)
def test_a_table_that_levels_off_says_where(
    level: Optional[float], error: Optional[float], said: str
) -> None:
    calm = samples.calm()
    table = replace(
        calm.tables[0], count=6_000, max=65_536, levels_off=level, levels_off_error=error
    )
    assert said in verdict(replace(calm, tables=(table,)), table).text


@pytest.mark.parametrize(
    ("count", "insert", "destroy", "full", "word"),
    [
        (34_000, 900.0, 100.0, None, "RISING"),  # 31 536 places for 800 a second: 39 s
        (34_000, 900.0, 800.0, None, "HEALTHY"),
        (34_000, 100.0, 900.0, None, "HEALTHY"),
        (60_000, 900.0, 100.0, None, "RISING"),
        (60_000, 900.0, 900.0, None, "HIGH"),
        (34_000, 900.0, 100.0, 39.0, "FILLING"),
        (1_000, 9_000.0, 0.0, None, "HEALTHY"),  # a burst into an empty table
    ],
)
def test_a_table_that_the_last_rate_would_fill_within_a_minute_is_never_called_healthy(
    count: int, insert: float, destroy: float, full: Optional[float], word: str
) -> None:
    calm = samples.calm()
    table = replace(
        calm.tables[0], count=count, max=65_536, seconds_to_full=full,
        rates=replace(calm.tables[0].rates, insert=insert, destroy=destroy),
    )  # fmt: skip
    said = verdict(replace(calm, tables=(table,)), table)
    assert said.word == word
    assert "full" in said.text


@pytest.mark.parametrize(("count", "word"), [(65_536, "FULL"), (64_900, "FULL"), (4_587, "EASING")])
def test_a_table_that_emptied_within_the_interval_is_not_called_full(count: int, word: str) -> None:
    calm = samples.calm()
    table = replace(
        calm.tables[0], count=count, max=65_536, full_since=calm.ts / 1e9 - 15,
        rates=replace(calm.tables[0].rates, drop=47.0),
    )  # fmt: skip
    assert verdict(replace(calm, tables=(table,)), table).word == word


def test_a_narrow_screen_leaves_out_clauses_rather_than_cuts_them() -> None:
    calm = samples.calm()
    table = replace(calm.tables[0], count=20_000, max=65_536, full_since=calm.ts / 1e9 - 15)
    first = table_lines(replace(calm, tables=(table,)), 40, DARK)[0].plain
    assert "EASING  31 % full" in first
    assert "…" not in first


@pytest.mark.parametrize("width", [40, 60, 72, 80, 100, 160])
def test_rates_keep_their_place_whatever_they_are(width: int) -> None:
    def places(rate: float) -> list[int]:
        rates = replace(samples.calm().rates, insert=rate, destroy=rate, drop=rate)
        said = rate_line(replace(samples.calm(), rates=rates), width, DARK).plain
        return [said.find(word) for word in ("new", "gone", "EVICTED", "DROPPED")]

    assert width < 72 or places(1.0) == places(9_812.0)
    assert places(9_812.0)[3] > 0


def test_a_table_that_was_not_read_is_not_called_healthy() -> None:
    calm = samples.calm()
    unread = replace(calm.tables[0], count=0, max=0, max_known=False, read=False)
    assert str(verdict(replace(calm, tables=(unread,)))).startswith("NONE no connection tracking")
