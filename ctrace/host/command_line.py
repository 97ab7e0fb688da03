"""A process's command line as it is stored: program and arguments, without secrets.

Only known forms of secrets are masked: a program may take a password where nothing marks it as one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from ctrace.names import clean

MOST: Final = 256
"""Characters that are stored."""
READ: Final = 4096
"""Bytes that are read: masking comes before cutting, so that a cut hides no mark."""
MASK: Final = "***"

_WORD = (
    r"(?:pass|pwd|(?<![a-z])pw(?![a-z])|secret|token|key|credential|cred(?![a-z])|auth"
    r"|cookie|bearer|private|(?<![a-z])psk(?![a-z]))"
)
# Bounded repeats: a hostile command line costs no more than an ordinary one.
_NAMED = re.compile(rf"({_WORD}[\w.-]{{0,64}}[\"'\])]{{0,4}}[\s=:,]{{1,8}})\S.*", re.I | re.S)
_BARE = re.compile(rf"^-{{0,2}}[\w.-]{{0,64}}{_WORD}[s:=]?$", re.I)
_BARE_OPTION = re.compile(rf"^-{{1,2}}[\w.-]{{0,64}}{_WORD}[\w.-]{{0,64}}[:=]?$", re.I)
_SHORT = re.compile(r"((?:^|\s)-p)(?!\s*-)\s*\S.*", re.S)
_URL = re.compile(r"://\S{1,1024}@")
_LOGIN = re.compile(r"([^\s:/@=]{1,64}):(?!//)\S{1,1024}@")
_USER = re.compile(r"(?:-[uU]|--user|--proxy-user)=?")
_OF_USER = re.compile(r"[:%].*", re.S)
_OF_PROGRAM: Final = {"redis-cli": "-a", "ldapsearch": "-w", "ldapmodify": "-w"}
"""Single-letter options that take a password, by program."""


def masked(arguments: Sequence[str]) -> str:
    """The arguments on one line of at most :data:`MOST` characters, harmless to show.

    ``***`` stands for the value of an option or variable whose name holds a word such as
    password, secret, token, key or credential (``--token X``, ``DB_PASS=X``, ``"Cookie: X"``),
    for what follows ``-p``, for the login in ``scheme://login@host``, and for the
    password in ``user:password@host`` and ``-u user:password``.
    """
    kept: list[str] = []
    before = ""
    letters = ("-p", _OF_PROGRAM.get(arguments[0].rpartition("/")[2]) if arguments else "")
    for argument in arguments:
        if before and (before in letters or _BARE.match(before) or _BARE_OPTION.match(before)):
            kept.append(MASK)
            before = ""
            continue
        kept.append(_argument(argument, before))
        before = argument if len(kept) > 1 else ""
    return clean(" ".join(kept))[:MOST]


def split(raw: bytes) -> list[str]:
    """The arguments in the first :data:`READ` bytes of /proc/PID/cmdline.

    Of an argument that goes on beyond them only what comes before a colon is kept: the
    ``@`` that tells a login may be what is missing.
    """
    cut = len(raw) >= READ
    arguments = raw.rstrip(b"\0").decode(errors="replace").split("\0")
    if cut and arguments:
        arguments[-1] = arguments[-1].partition(":")[0]
    return arguments


def _argument(text: str, before: str) -> str:
    user = _USER.match(text)
    if user and len(text) > user.end():
        text = text[: user.end()] + _OF_USER.sub(":" + MASK, text[user.end() :])
    elif _USER.fullmatch(before):
        text = _OF_USER.sub(":" + MASK, text)
    text = _NAMED.sub(rf"\g<1>{MASK}", text)
    text = _SHORT.sub(rf"\g<1>{MASK}", text)
    if "@" in text:
        text = _LOGIN.sub(rf"\g<1>:{MASK}@", _URL.sub(f"://{MASK}@", text))
    return text
