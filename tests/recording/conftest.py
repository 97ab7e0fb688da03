"""A recording of synthetic traffic, and the batches that it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.synthetic import incident, write

from ctrace.batch import Batch


@pytest.fixture(scope="module")
def truth() -> list[Batch]:
    return incident()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, truth: list[Batch]) -> Path:
    return write(tmp_path_factory.mktemp("recording") / "a.data", truth)
