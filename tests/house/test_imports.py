"""The house: which room may import which, and that what is pointed to exists."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from kit import tree

ROOT = Path(__file__).parents[2]
ARROWS = {
    "advice": "change host model plan rehearsal ruleset whatif",
    "capture": "host kernel",
    "change": "host plan ruleset",
    "cost": "capture host kernel",
    "demo": "capture host lab live model view",
    "dumps": "advice host model recording ruleset",
    "host": "",
    "kernel": "host",
    "lab": "host",
    "live": "advice change model recording view",
    "model": "",
    "plan": "",
    "rehearsal": "host plan ruleset",
    "recording": "advice cost host model",
    "ruleset": "host kernel plan",
    "selftest": "capture host lab",
    "view": "advice change cost live model plan recording whatif",
    "whatif": "model",
}
"""Room: what it may import beside the contract (record, batch, filters, errors)."""
ANY = {"cli"}
"""Verbs bring everything together."""
FOUNDATION = {"__version__", "open"} | {file.stem for file in (ROOT / "ctrace").glob("*.py")}


@cache
def imports(file: Path) -> list[tuple[str, list[str]]]:
    """Our modules that a file imports from, wherever in it, and the names it takes of each."""
    found = (node for node in ast.walk(tree(file)) if isinstance(node, ast.ImportFrom))
    return [
        (node.module, [one.name for one in node.names])
        for node in found
        if node.module and node.module.split(".")[0] == "ctrace"
    ]


def imported(file: Path) -> Iterator[str]:
    """Rooms that a file imports from."""
    for module, names in imports(file):
        yield from names if module == "ctrace" else [module.split(".")[1]]


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    allowed, found = {room, *ARROWS[room].split()}, set[str]()
    for file in (ROOT / "ctrace" / room).rglob("*.py"):
        found |= set(imported(file))
        assert found <= allowed | FOUNDATION, file
    assert allowed - {room} <= found, "a rule that nothing needs"


def test_every_room_has_its_rule() -> None:
    rooms = {path.parent.name for path in (ROOT / "ctrace").glob("*/__init__.py")}
    assert rooms == set(ARROWS) | ANY


def modules(file: Path) -> Iterator[str]:
    """Modules of ours that a file imports, if each name is one."""
    for module, names in imports(file):
        yield module
        yield from (f"{module}.{name}" for name in names)


def test_files_import_each_other_in_no_circle() -> None:
    """Types included: what two files need of each other belongs into one, or into a third."""
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in (ROOT / "ctrace").rglob("*.py")
        if file.name != "__init__.py"  # these only hand on what their folder has
    }
    left = {name: set(modules(file)) & files.keys() - {name} for name, file in files.items()}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, {name: needs & left.keys() for name, needs in left.items()}


def test_what_is_pointed_to_exists() -> None:
    """Paths in comments, docstrings and pages."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    have, lost = set(listed), []
    for name in listed:
        if not re.search(r"\.(py|c|h|md|sh|toml)$|^scripts/", name):
            continue
        text = (ROOT / name).read_text(encoding="utf-8", errors="replace")
        for path in re.findall(
            r"(?<![\w/])((?:bpf|ctrace|docs|tests|scripts)/[\w/.-]+\.\w+)", text
        ):
            if path.endswith((".py", ".c", ".h", ".md", ".sql", ".sh")) and path not in have:
                lost.append(f"{name}: {path}")
    assert not lost
