"""The conditions of :mod:`ctrace.rehearsal.conditions.forced`, in legacy tables."""

from __future__ import annotations

import re
from typing import Final, Optional

from ctrace.rehearsal.conditions import recent
from ctrace.rehearsal.conditions.forced import (
    COUNTED,
    SET_COUNTED,
    SHARED,
    XT_KEPT,
    XT_MEASURES,
    XT_PLAIN,
)
from ctrace.rehearsal.conditions.quiet import LOGS, SENT, SHARED_MATCHES, Does, Quiet, decides


def loaded(
    text: str,
    answer: bool,
    *,
    untracked: bool = False,
    draw: bool = True,
    kept: Optional[bool] = None,
    packet: Optional[bool] = None,
) -> str:
    """The same for the output of iptables-legacy-save: a match is removed, or its rule never
    matches. Each rule keeps its number."""
    out = []
    for line in text.splitlines():
        if not _TOUCHED.search(line) or (" -A " not in line and not line.startswith("-A ")):
            out.append(line)
            continue
        changed = _line(line, answer, kept, packet, untracked=untracked, draw=draw)
        if changed is None:  # what turns tracking on still does
            changed = _HEAD.sub(_NEVER, line) + (_TRACKS if " -m connlimit " in line else "")
        out.append(changed)
    return "\n".join(out) + "\n"


_ASKS_COUNTERS: Final = " --(?:packets|bytes)-(?:eq|lt|gt) "
"""Of an ipset's elements."""
_TOUCHED: Final = re.compile(
    rf" -m (?!(?:{'|'.join(sorted(XT_PLAIN))})(?: |$))| -j (?:IDLETIMER|LED|NFQUEUE)| --random"
    rf"|{_ASKS_COUNTERS}"
)
"""In every line that is loaded otherwise."""


def depends(text: str, *, lots: bool = True) -> bool:
    """Whether more than a log hangs on such a condition, by the output of iptables-legacy-save.
    ``lots``: whether those count that fall on one of several."""
    decide = _deciding(text, lots=lots)
    return loaded(decide, True) != loaded(decide, False, kept=None if lots else True)


def groups(text: str) -> tuple[bool, bool]:
    """Whether conditions there read something of a packet, and whether others depend, too."""
    decide = _deciding(text)
    apart = loaded(decide, True, packet=False)
    return apart != loaded(decide, True), apart != loaded(decide, False)


def _deciding(text: str, *, lots: bool = True) -> str:
    """The rules that decide something about such packets as are sent."""
    quiet: Quiet[tuple[str, str]] = Quiet()
    rules, chains, table = [], set(), ""
    for line in text.splitlines():
        found = _RULE.search(line)
        if line.startswith("*"):
            table = line
        elif line.startswith(":"):
            chains.add((table, line[1:].split()[0]))
        elif found:
            does = _does(line, table, chains)
            quiet.see((table, found[1]), does[0])
            if not _unheard(line):
                rules.append(((table, found[1]), does, line))
    loud = quiet.loud()
    return "\n".join(
        line if lots else _STATISTIC.sub("", line)
        for chain, does, line in rules
        if decides(loud, chain, does)
    )


def _does(line: str, table: str, chains: set[tuple[str, str]]) -> Does[tuple[str, str]]:
    """As :func:`ctrace.rehearsal.conditions.quiet.does`."""
    end = _END.search(line)
    target = end[2] if end else ""
    ends = target == "RETURN" or (end is not None and end[1] == "g")
    if (table, target) in chains:
        return [(table, target)], ends
    return (None if _SHARED.search(line) or target not in {"", "RETURN", *LOGS} else []), ends


def _unheard(line: str) -> bool:
    kind = _ICMP.search(line)
    return kind is not None and int(kind[1]) not in SENT[1] | SENT[58]


_RULE: Final = re.compile(r"^(?:\[\d+:\d+\] )?-A (\S+)")
_END: Final = re.compile(r" -([jg]) (\S+)")
_SHARED: Final = re.compile(rf" -m (?:{'|'.join(sorted(SHARED_MATCHES))}) ")
_ICMP: Final = re.compile(r"(?<!!) --icmp(?:v6)?-type (\d+)")
_STATISTIC: Final = re.compile(r" -m statistic(?: (?!-m |-j |-g )\S+)*")
_HEAD: Final = re.compile(r"^((?:\[\d+:\d+\] )?-A \S+).*")
_NEVER: Final = r"\1 -p 254"
"""A protocol number for experiments (RFC 3692), which no packet here has."""
_TRACKS: Final = " -m conntrack --ctstate INVALID"
_MATCH: Final = re.compile(r" -m (\S+)((?: (?!-m |-j |-g )(?:\"(?:[^\"\\]|\\.)*\"|\S+))*)")


def _line(
    line: str,
    answer: bool,
    kept: Optional[bool],
    packet: Optional[bool],
    *,
    untracked: bool,
    draw: bool,
) -> Optional[str]:
    for match in _MATCH.finditer(line):
        options = match[2]
        module = SET_COUNTED if re.search(_ASKS_COUNTERS, options) else match[1]
        if module in XT_PLAIN:
            continue
        if module == COUNTED and kept is None:
            continue
        if module == recent.MATCH and " --set" in options:
            continue
        said = _says(module, answer, kept, packet)
        instead = ""
        if untracked and module in ("connlimit", COUNTED):  # they count no untracked packet
            within = "--connlimit-upto" in options
            if said != within:
                instead = f" -m conntrack {'! ' if said else ''}--ctstate UNTRACKED"
        if not said and not instead:
            return None
        line = line.replace(match[0], instead, 1)
    target = re.search(r" -j (\S+)", line)
    if target and target[1] in SHARED:
        return None
    if target and target[1] == "NFQUEUE":
        if not answer:
            line = f"{line[: target.start()]} -j DROP"
        elif "--queue-bypass" not in line:
            line += " --queue-bypass"
    if not draw:
        line = re.sub(r" --random(-fully)?", "", line)
    return line


def _says(module: str, answer: bool, kept: Optional[bool], packet: Optional[bool]) -> bool:
    if kept is not None and module in XT_KEPT:
        return kept
    return answer if packet is None or module in XT_MEASURES else packet
