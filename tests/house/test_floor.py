"""The floor is Python 3.9: what came later is not used, whichever Python runs the tests."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from kit import tree

ROOT = Path(__file__).parents[2]
LATER_KEYWORDS = {("zip", "strict"), ("dataclass", "slots"), ("dataclass", "kw_only")}
LATER_NAMES = {"pairwise", "batched", "aiter", "anext", "StrEnum", "UTC", "file_digest", "tomllib"}


@pytest.mark.parametrize("folder", ["ctrace", "packaging"])
def test_only_what_python_3_9_has(folder: str) -> None:
    found = []
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(tree(file)):
            later: list[str] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called = node.func.id
                later = [
                    f"{called}({word.arg}=)"
                    for word in node.keywords
                    if (called, word.arg) in LATER_KEYWORDS
                ]
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                later = sorted(LATER_NAMES & {one.name for one in node.names})
            elif type(node).__name__ == "Match":
                later = ["match"]
            found += [f"{file.relative_to(ROOT)}:{node.lineno}: {name}" for name in later]  # type: ignore[attr-defined]
    assert not found
