"""What is kept for the next start: used when whole and our own, else found out again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ctrace.kernel import btf, disk_cache, layout


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place to keep things in, for an ordinary user's process or root's."""
    monkeypatch.setattr(disk_cache, "ROOTS", tmp_path / "ctrace")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ctrace"


def test_what_was_stored_comes_back(directory: Path) -> None:
    name = disk_cache.name("thing", b"one", b"two")
    assert disk_cache.load(name) is None
    disk_cache.store(name, b"content")
    assert disk_cache.load(name) == b"content"
    assert name != disk_cache.name("thing", b"onet", b"wo")
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_damaged_file_is_not_used(directory: Path) -> None:
    name = disk_cache.name("thing")
    disk_cache.store(name, b"content")
    whole = (directory / name).read_bytes()
    for damaged in (b"", whole[:3], whole[:-1], whole + b"x", whole[:-1] + b"T"):
        (directory / name).write_bytes(damaged)
        assert disk_cache.load(name) is None


def test_a_directory_that_others_can_write_is_not_trusted(directory: Path) -> None:
    name = disk_cache.name("thing")
    disk_cache.store(name, b"content")
    os.chmod(directory, 0o777)
    assert disk_cache.load(name) is None
    disk_cache.store(disk_cache.name("other"), b"content")
    assert [path.name for path in directory.iterdir()] == [name]


def test_old_files_of_a_sort_make_room(directory: Path) -> None:
    disk_cache.store(disk_cache.name("other"), b"stays")
    for i in range(disk_cache.KEPT + 5):
        disk_cache.store(disk_cache.name("thing", bytes([i])), b"content")
    names = [path.name for path in directory.iterdir()]
    assert sum(name.startswith("thing-") for name in names) == disk_cache.KEPT
    assert disk_cache.load(disk_cache.name("other")) == b"stays"


@pytest.mark.skipif(btf.kernel() is None, reason="this kernel has no BTF")
def test_a_second_start_reads_the_same_layout_and_places(directory: Path) -> None:
    def restart() -> None:
        for known in (btf.kernel, layout.running, layout._functions):
            known.cache_clear()

    restart()
    first, places = layout.running().constants, layout.function_range("nf_conntrack_free")
    sorts = {path.name.rpartition("-")[0] for path in directory.iterdir()}
    assert {"layout", "btf"} <= sorts
    restart()
    assert layout.running().constants == first
    assert layout.function_range("nf_conntrack_free") == places
