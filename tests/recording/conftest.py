"""A recording of synthetic traffic, the batches that it was made of, and namespaces for real
traffic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.synthetic import incident, write

from ctrace.batch import Batch
from ctrace.lab import Lab


@pytest.fixture(scope="module")
def truth() -> list[Batch]:
    return incident()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, truth: list[Batch]) -> Path:
    return write(tmp_path_factory.mktemp("recording") / "a.data", truth)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made
