"""What keeps reads of a ring in order on processors that would not keep it themselves."""

from __future__ import annotations

import ctypes
import platform

import pytest

from ctrace.errors import CtraceError
from ctrace.kernel import rings


@pytest.fixture(autouse=True)
def _another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


def test_it_is_found_without_the_hosts_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        ctypes.CDLL("libatomic.so.1")
    except OSError:
        pytest.skip("libatomic is not here")
    monkeypatch.setenv("PATH", "")
    rings._fence()()


def test_without_the_library_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(CtraceError, match="libatomic1"):
        rings._fence()
