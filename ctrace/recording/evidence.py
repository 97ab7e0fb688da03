"""What a recording that was made of text says beside its events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Optional

FACT: Final = "evidence"
"""The header's fact that holds it, as JSON."""
_WHOSE: Final = ("files", "unread", "dumps")
"""What names files and commands, which may tell whose host it was."""


def parse(facts: Mapping[str, str]) -> Optional[dict[str, Any]]:
    """The evidence in a header's facts; None where the recording was not made of text."""
    text = facts.get(FACT)
    if not text:
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def redacted(facts: Mapping[str, str]) -> dict[str, str]:
    """The fact without the names of files and commands, where there is one."""
    data = parse(facts)
    if data is None:
        return {}
    return {FACT: json.dumps({name: v for name, v in data.items() if name not in _WHOSE})}
