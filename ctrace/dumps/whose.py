"""Whose lines are: what prompts, commands and programs that ask many hosts say of it."""

from __future__ import annotations

import re
from typing import Final

FOLDERS: Final = "unpack it, and name one host's folder"
PROMPTS: Final = "give one host's lines"
NAMES: Final = "give one host's files"
REACHED: Final = "give the lines of one"
"""What names hosts, each with the way out where these are several: a bundle's folders, prompts,
``uname`` and ``hostname``; ``ssh``, ``kubectl exec`` and their like, and what stands before each
line. A host may have another name in each."""

_AT: Final = re.compile(rb"^\[?[\w.-]{1,64}@([\w.-]{1,253})")
_ELSEWHERE: Final = re.compile(
    rb"^(?:sudo )?(?:ssh|kubectl|oc|docker|podman|crictl|lxc|pct|ansible|salt|pdsh|nsenter)\b"
)
_REACHED: Final = re.compile(
    rb"^(?:sudo )?(?:ssh (?:-[bcDEeFIiJLlmOopQRSWw] ?\S{1,200} |-\w{1,20} ){0,20}(?:[\w.-]{1,64}@)?"
    rb"|(?:docker|podman|lxc|crictl) exec (?:-[ewu] ?\S{1,99} |-\S{1,99} ){0,9}"
    rb"|nsenter (?:-[a-zA-Z]{1,9} |--[a-su-z]\S{0,30} ){0,9}(?:-t ?|--target[ =])"
    rb"|(?:kubectl|oc) (?:(?!exec|rsh|debug)\S{1,99} ){0,9}(?:exec|rsh|debug) "
    rb"(?:-[nc] \S{1,99} |--(?:namespace|container) \S{1,99} |-\S{1,99} ){0,9})([\w./-]{1,253})"
)
_BEFORE: Final = re.compile(
    rb"\s*(?:\[pod/([\w.-]{1,253})/[\w.-]{1,63}\] +"  # kubectl logs --prefix
    # pdsh, compose
    rb"|((?:[A-Za-z][\w.-]{0,62}|\d{1,3}(?:\.\d{1,3}){3}))(?:: +| {0,20}\| +)"
    rb"|[A-Z][a-z]{2} [ \d]\d [\d:]{8} ([\w.-]{1,63}) [\w./-]{1,64}(?:\[\d{1,10}\])?: "  # syslog
    rb"|([\w./-]{0,253}[A-Za-z][\w.-]{0,62}):(?:\d{1,12}:)?(?=\w))"  # grep
)
_ANNOUNCED: Final = re.compile(
    rb"^(?:(\S{1,100}) \| (?:CHANGED|SUCCESS|FAILED) \| rc=\d+ >>"
    rb"|\[\d+\] [\d:]{8} \[\w+\] (\S{1,100}))$"
)
_RULED: Final = re.compile(rb"^([\w.-]{1,63})(?: \(1\))?$")
RULES: Final = (b"-" * 15, b"-" * 16)
"""What clush and dshbak draw above and below a host's name."""


def prompted(line: bytes, command: bytes) -> tuple[str, str]:
    """(what names it, the host) that a command was typed on, or that it asks; the host is empty
    where nothing tells."""
    reached = _REACHED.match(command)
    if reached:
        return REACHED, short(reached[1].decode("ascii", "replace"))
    said = _AT.match(line)
    if said is None or _ELSEWHERE.match(command):
        return PROMPTS, ""
    return PROMPTS, short(said[1].decode("ascii", "replace"))


def short(host: str) -> str:
    """A host's name without its domain; an address or file's name stays."""
    return host if "/" in host or host[:1].isdigit() else host.lower().partition(".")[0]


def before(line: bytes) -> str:
    """The host, pod or file that a line begins with, as programs print it that ask several."""
    said = _BEFORE.match(line)
    return next(filter(None, said.groups())).decode("ascii", "replace") if said else ""


def announced(line: bytes, last: bytes) -> str:
    """The host that a line says the next ones are of; ``last`` is the line before it."""
    said = _ANNOUNCED.match(line) or (last in RULES and _RULED.match(line))
    return next(filter(None, said.groups())).decode("ascii", "replace") if said else ""
