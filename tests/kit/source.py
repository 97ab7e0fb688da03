"""Our own Python, parsed once for all that is asked of it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path


@cache
def tree(file: Path) -> ast.Module:
    """A file as Python 3.9 reads it. SyntaxError: it cannot."""
    return ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=(3, 9))
