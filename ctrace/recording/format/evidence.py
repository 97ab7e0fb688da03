"""What a recording made of text says besides its events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Optional

from ctrace.batch import Logged, Moment
from ctrace.names import clean
from ctrace.recording.format.evidence_form import well_formed

FACT: Final = "evidence"
"""The header's fact that holds it, as JSON."""
_WHOSE: Final = ("files", "unread", "dumps")
"""Names of files and commands, which may reveal whose host it was."""


def parse(facts: Mapping[str, str]) -> Optional[dict[str, Any]]:
    """The evidence in a header's facts, without what has not its form; None where the recording was
    not made of text."""
    text = facts.get(FACT)
    if not text:
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return well_formed(data) if isinstance(data, dict) else None


def logged(facts: Mapping[str, str]) -> Optional[Logged]:
    """What the log among the evidence says; None where there is none, or it is damaged."""
    return log_of(parse(facts) or {})


def log_of(data: Mapping[str, Any]) -> Optional[Logged]:
    """The same of what :func:`parse` gives."""
    log = data.get("log")
    if not isinstance(log, dict):
        return None
    full, hidden = (_whole(log.get(name)) for name in ("full", "suppressed"))
    if not full:
        return None
    first, last = (_moment_of(log.get(name)) for name in ("first", "last"))
    return Logged(full, full + hidden, first, last, _netns_of(log))


def _netns_of(log: Mapping[str, Any]) -> tuple[int, ...]:
    """Inodes of the namespaces that its messages name; empty where some name none."""
    said = log.get("netns")
    if not isinstance(said, list):
        return ()
    found = [_whole(one) for one in said[:100]]
    return tuple(found) if all(found) else ()


def _whole(value: object) -> int:
    return value if isinstance(value, int) and 0 < value < 1 << 62 else 0


def _moment_of(said: object) -> Moment:
    """A time of the log, as in the evidence; unknown where it is damaged."""
    if not isinstance(said, dict):
        return Moment()
    utc, boot = (
        float(value) if isinstance(value, (int, float)) and 0 <= value < 1e12 else None
        for value in (said.get("utc"), said.get("boot"))
    )
    return Moment(utc, boot, clean(str(said.get("text") or ""))[:64])


def redacted(facts: Mapping[str, str]) -> dict[str, str]:
    """The fact without the names of files, commands and namespaces, where there is one."""
    data = parse(facts)
    if data is None:
        return {}
    kept = {name: v for name, v in data.items() if name not in _WHOSE}
    if isinstance(kept.get("log"), dict):
        kept["log"] = {name: v for name, v in kept["log"].items() if name != "hosts"}
    if "rules" in kept:
        kept["rules"] = {"": any(kept["rules"].values())}
    kept["tables"] = [
        {**one, "netns": f"namespace {at}"} for at, one in enumerate(kept.get("tables", ()), 1)
    ]
    return {FACT: json.dumps(kept)}
