"""Namespaces that end with the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ctrace.lab import Lab


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made
