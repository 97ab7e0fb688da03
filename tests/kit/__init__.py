"""What several suites share: traffic, made-up recordings and snapshots, machines, a browser."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path


@cache
def tree(file: Path) -> ast.Module:
    """A file of ours as Python 3.9 reads it, parsed once. SyntaxError: it cannot."""
    return ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=(3, 9))
