"""That a module went is noticed, also when it is there again by the next look."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctrace.host import kernel


def test_a_module_that_goes_and_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "MODULES", str(tmp_path))
    folder, other = tmp_path / "nf_conntrack", tmp_path / "other"
    watched = kernel.Module("nf_conntrack")
    assert not watched.changed()
    folder.mkdir()  # loaded after the start
    assert not watched.changed()
    assert not watched.changed()
    folder.rmdir()
    assert watched.changed()
    assert not watched.changed()
    folder.mkdir()
    assert watched.changed()
    other.mkdir()
    folder.rmdir()
    other.rename(folder)
    assert watched.changed()
    assert not watched.changed()
