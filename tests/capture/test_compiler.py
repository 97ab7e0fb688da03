"""The child that compiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctrace.kernel import btf, compiler


@pytest.mark.slow
@pytest.mark.skipif(btf.kernel() is None, reason="this kernel has no BTF")
def test_nothing_is_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be anyone's, and ctrace is run as root."""
    pytest.importorskip("bcc")
    for module in ("json", "base64", "ctrace"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('from the current folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = str(Path(__file__).resolve().parent / "produce.c")
    code = compiler.compile_programs(source, ("produce",), [])
    assert len(code["produce"]) % 8 == 0
    assert code["produce"]
