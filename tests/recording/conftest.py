"""Lets the tests of this directory import its synthetic traffic; a recording of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ctrace.batch import Batch

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import incident, write


@pytest.fixture(scope="module")
def truth() -> list[Batch]:
    return incident()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, truth: list[Batch]) -> Path:
    return write(tmp_path_factory.mktemp("recording") / "a.data", truth)
