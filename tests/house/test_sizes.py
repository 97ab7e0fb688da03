"""The house: how long a file and a function may be, how much a function is told, and how many
files a folder holds.

What is larger than that stands below, and how large it may be. These numbers only go down.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from kit import tree

TESTS = Path(__file__).parents[1]
HOUSE = TESTS.parent / "ctrace"
LINES, FUNCTION, PARAMETERS, FOLDER = 400, 60, 7, 15
"""Lines of a file and of a function, parameters, files of a folder: at most."""
VERBS = "cli/"
"""A verb has a parameter for each of its options."""
LARGER = {"cli/recordings/record.py: command, lines": 79, "cli/watch/top.py: command, lines": 67}
"""What is larger than that, and how large it may be."""
BY_HAND = 70
"""Statements that are laid out by hand, as the tables that they are."""


def functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function below a node, with the names of what it is in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield f"{name}{child.name}", child
        inside = isinstance(child, (ast.FunctionDef, ast.ClassDef))
        yield from functions(child, f"{name}{child.name}." if inside else name)  # type: ignore[attr-defined]


def parameters(one: ast.FunctionDef) -> int:
    """How many a caller may give."""
    told = [*one.args.posonlyargs, *one.args.args, *one.args.kwonlyargs]
    told += [more for more in (one.args.vararg, one.args.kwarg) if more]
    return sum(each.arg not in ("self", "cls") for each in told)


def larger() -> Iterator[tuple[str, int]]:
    """Whatever is over its limit."""
    for folder in (HOUSE, *(path for path in HOUSE.rglob("*") if path.is_dir())):
        n = sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        if n > FOLDER:
            yield f"{folder.relative_to(HOUSE)}/", n
    for file in HOUSE.rglob("*.py"):
        place, text = str(file.relative_to(HOUSE)), file.read_text(encoding="utf-8")
        if (n := len(text.splitlines())) > LINES:
            yield place, n
        for name, one in functions(tree(file), ""):
            assert one.end_lineno is not None
            if (n := one.end_lineno - one.lineno + 1) > FUNCTION:
                yield f"{place}: {name}, lines", n
            if (n := parameters(one)) > PARAMETERS and not place.startswith(VERBS):
                yield f"{place}: {name}, parameters", n


def test_nothing_is_larger_than_it_may_be() -> None:
    found = {what: n for what, n in larger() if n > LARGER.get(what, 0)}
    assert not found, "too large: cut it in two"


def test_a_folder_of_tests_is_no_larger_either() -> None:
    for folder in (path for path in TESTS.rglob("*") if path.is_dir()):
        files = [
            one.name for one in folder.glob("*.py") if one.stem not in ("__init__", "conftest")
        ]
        assert len(files) <= FOLDER, folder
        assert f"test_{folder.name}_" not in "".join(files), f"the folder says {folder.name}"


def test_few_statements_are_laid_out_by_hand() -> None:
    assert sum(path.read_text().count("# fmt: skip") for path in HOUSE.rglob("*.py")) <= BY_HAND
