"""Every test of apply keeps its notes in a directory of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ctrace.change import notes as change_notes
from ctrace.lab import Lab


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state"
    monkeypatch.setenv(change_notes.VARIABLE, str(path))
    return path


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made
