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
