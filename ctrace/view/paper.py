"""Text for a terminal, a file or a pipe."""

from __future__ import annotations

import re
from typing import Any, Final

from rich.console import Console

_BLANKS: Final = re.compile(r"[ \t]+$", re.MULTILINE)


class Paper(Console):
    """A console whose lines end with their text where the output is no terminal: columns are
    padded, and nobody wants the padding in a file or a postmortem."""

    def put(self, *objects: Any, **options: Any) -> None:
        """As ``print``."""
        if self.is_terminal:
            self.print(*objects, **options)
            return
        with self.capture() as said:
            self.print(*objects, **options)
        self.file.write(_BLANKS.sub("", said.get()))
        self.file.flush()
