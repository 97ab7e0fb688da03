"""A process's command line as it is stored: the program and words that can hold no secret.

A word is kept for its form, not left out for it: forms of secrets have no end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import Final

from ctrace.names import clean

MOST: Final = 256
"""Characters that are stored."""
READ: Final = 4096
"""Bytes that are read of a command line."""
MASK: Final = "***"
"""Stands for one or more words, or the rest of one."""

_PLAIN = re.compile(r"[A-Za-z_]{1,32}(?:[.:-][A-Za-z_]{1,32}){0,8}:?", re.A)
"""A name without digits: a subcommand, a module, a class; kept where it comes first."""
_OPTION = re.compile(r"(--[a-z][A-Za-z0-9-]{0,31}|-[A-Za-z]{1,3}|-)(?:([=:])(.*))?", re.A | re.S)
_SHORT = re.compile(r"-[A-Za-z]", re.A)
_VARIABLE = re.compile(r"([A-Z][A-Z0-9_]{0,31})=([^=].*)", re.A | re.S)
_PATH = re.compile(r"(?:~|\.{1,2})?(?:/[\w.,@-]{1,255}){1,32}/?", re.A)
_FILE = re.compile(
    r"(?:[\w.-]{1,64}/){0,8}[\w.-]{1,64}\.(?:py|pl|rb|php|m?js|ts|lua|sh|jar|war|conf|cfg|ini|ya?ml"
    r"|json|toml|xml|socket|service|pid|log)",
    re.A,
)
_PORT = re.compile(r"--(?:[a-z]{1,16}-)?port", re.A)
_NUMBER = re.compile(r"\d{1,5}", re.A)
_URL = re.compile(r"([a-z][a-z0-9+]{1,11}://)([^/]*)(/?)(.*)", re.A | re.S)
_PLACE = re.compile(
    r"(\[[0-9a-fA-F:.]{2,45}\]|[\w.*-]{1,255}|[0-9a-fA-F:.]{2,45})(?::\d{1,5}|\(\d{1,5}\)|/\d{1,3})?",
    re.A,
)
_DIGITS = re.compile(r"[0-9a-fA-F]{0,4}[.:][0-9a-fA-F.:]{1,45}")
_HOST = re.compile(r"(?:[a-z0-9-]{1,63}\.){0,8}[a-z][a-z0-9-]{0,62}", re.A)
"""Without a URL around it, it may as well be a password, or a login before one."""
_EVERYWHERE = re.compile(r"\*|localhost")
_LOT = re.compile(r"(?=.*\d)(?=.*[a-z])(?=.*[A-Z])", re.A)
_PIECE = re.compile(r"[\w-]{12,}", re.A)
"""Long enough for a key by lot; it is one where it has digits, small and capital letters."""


def masked(arguments: Sequence[str]) -> str:
    """The command line as words, at most :data:`MOST` characters, harmless to show.

    Kept are the program, names of options and variables, the first word of letters alone (a
    subcommand, a module), paths, files of known kinds, addresses, hosts of URLs and values of
    ``--port``. ``***`` stands for all else: a value that nobody can tell from a secret.
    A title that a daemon gave itself (``nginx: worker process``) keeps its words of letters.
    """
    words = [_program(arguments[0])] if arguments else []
    for word in _words(arguments):
        if word != MASK or words[-1] != MASK:
            words.append(word)
    return clean(" ".join(words))[:MOST]


def split(raw: bytes) -> list[str]:
    """The arguments in the first :data:`READ` bytes of /proc/PID/cmdline.

    The last of a longer one is left out: what would tell its form may be missing.
    """
    arguments = raw.rstrip(b"\0").decode(errors="replace").split("\0")
    return arguments[: max(1, len(arguments) - 1)] if len(raw) >= READ else arguments


def _program(first: str) -> str:
    """Its path; of one with a blank, which may be a title, as far as that."""
    program = first.split(maxsplit=1)[0] if first.strip() else ""
    return MASK if _by_lot(program) or re.search(r"[=@]|://", program) else program


def _words(arguments: Sequence[str]) -> Iterator[str]:
    if not arguments:
        return
    title = arguments[0].split()
    titled = len(arguments) == 1 and bool(title) and title[0].endswith(":")
    shell = bool(title) and title[0].endswith("sh")
    before, plain = "", True  # the option that a word may belong to; whether one may be kept
    for argument in (" ".join(title[1:]), *arguments[1:]):
        parts = argument.split()
        if shell and len(parts) > 1:  # a line with a program and its words
            before = ""
        for word in parts:
            kept = _kept(word, before)
            if kept == MASK and plain and before in ("", "-m") and _PLAIN.fullmatch(word):
                kept, plain = word, titled
            yield kept
            before = word if word.startswith("-") else ""


def _kept(word: str, before: str) -> str:
    """A word, or as much of it as is of a form that is no secret's; ``before``: as in masked."""
    option = _OPTION.fullmatch(word)
    if option:
        name, sign, value = option.groups(default="")
        return name + sign + (_value(value, name) if value else "")
    if _SHORT.match(word):  # -phunter2
        return word[:2] + MASK
    variable = _VARIABLE.fullmatch(word)
    if variable:
        return f"{variable[1]}={_value(variable[2], '')}"
    return _value(word, before)


def _value(text: str, option: str) -> str:
    if _PORT.fullmatch(option) and _NUMBER.fullmatch(text):
        return text
    if (_PATH.fullmatch(text) or _FILE.fullmatch(text)) and not _by_lot(text):
        return text
    url = _URL.fullmatch(text)
    if url and "@" not in text:
        scheme, host, slash, rest = url.groups()
        return scheme + (host if _is_place(host, _HOST) else MASK) + slash + (rest and MASK)
    return text if _is_place(text, _EVERYWHERE) else MASK


def _is_place(text: str, named: re.Pattern[str]) -> bool:
    """Whether it is an address or such a name, with or without a port."""
    place = _PLACE.fullmatch(text)
    host = place[1].strip("[]") if place else ""
    if named.fullmatch(host):
        return True
    try:
        return bool(_DIGITS.fullmatch(host) and ip_address(host))
    except ValueError:
        return False


def _by_lot(text: str) -> bool:
    return any(_LOT.match(piece) for piece in _PIECE.findall(text))
