"""What the verdict says of a table that rises and will level off."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import pytest
from kit import samples

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


def test_a_table_that_was_not_read_is_not_called_healthy() -> None:
    calm = samples.calm()
    unread = replace(calm.tables[0], count=0, max=0, max_known=False, read=False)
    assert str(verdict(replace(calm, tables=(unread,)))).startswith("NONE no connection tracking")
