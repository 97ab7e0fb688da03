"""What the tests of advice share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kit.rulesets.net import Net, build


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    """Host, clients and servers, fresh for each module."""
    made = build()
    try:
        yield made
    finally:
        made.close()
