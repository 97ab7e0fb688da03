"""Lines that have the same words in the same order, read together as columns.

Of each form one line is read word by word, with every value replaced by the number of its
word: what that line gives as its mark is then the word in which all others have theirs.
A line with a value that is not what it should be is left to be read by itself, which
also finds the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np
import numpy.typing as npt

from ctrace.dumps.entries.columns import (
    MOST,
    NUMBERS,
    TAGS,
    Entries,
    Numbers,
    build,
    other_family,
    parse_rest,
    tcp_state,
)
from ctrace.dumps.entries.lines import NAMED, named_row
from ctrace.dumps.entries.values import Chunk
from ctrace.dumps.entries.words import Bad, addresses

I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Octets = npt.NDArray[np.uint8]

FORMS_MOST: Final = 4096
"""Forms that are remembered; a line of any other form is read by itself."""
_KEY: Final = re.compile(rb"[A-Za-z][\w-]*\Z")
_NUMBER: Final = re.compile(rb"\d+\Z")
_TIME: Final = re.compile(rb"\[\d+(?:\.\d+)?\]\Z")
_PART_OF_TIME: Final = re.compile(rb"\[\d+(?:\.\d+)?\]|(?:\A|\[)[\d.]*\]?\Z")
"""A word that is neither a time nor a number, though a similar line may have a time there."""
_VALUES: Final = {
    "proto": 3, "left": 4, "sport": 8, "dport": 9, "type": 10, "code": 11, "ident": 12,
    "reply_sport": 16, "reply_dport": 17, "reply_type": 18, "reply_code": 19, "reply_ident": 20,
}  # fmt: skip
"""The fields of a row, by position."""
_ENDS: Final = {"reply_dport": "sport", "reply_ident": "ident"}
"""What the reply has last, and what it mirrors where nothing is translated."""


@dataclass(frozen=True)
class _Form:
    """The meaning of each word, the same in all lines of one form."""

    addresses: tuple[int, ...]
    """src and dst of both directions."""
    numbers: Mapping[str, int]
    """Name in NUMBERS to the word with its value."""
    same: Mapping[str, int]
    """Values that are the same in every line of the form."""
    time: Optional[int]
    helper: Optional[int]
    proto: Optional[int]
    """The number that the protocol's name stands for, where it is known."""
    ends: Optional[str]
    """Name in :data:`_ENDS` of the word that ends the line, if it is one of these."""


class Alike:
    """Reads whole chunks of lines; remembers the forms that it has seen."""

    def __init__(self, read: Callable[[bytes], object]) -> None:
        """``read`` is told one line of each form."""
        self._told = read
        self._forms: dict[int, Optional[_Form]] = {}

    def read(self, text: Chunk) -> tuple[Bool, Entries]:
        """(of each line whether it was read, the entries of those lines in order)."""
        n = len(text)
        done, told, octets = np.zeros(n, bool), np.zeros(n, NUMBERS), np.zeros((n, 4, 16), np.uint8)
        forms, of = np.unique(text.forms(), return_inverse=True)
        for at, name in enumerate(forms.tolist()):
            lines = np.flatnonzero(of == at)
            form = self._form(name, text.words(int(lines[0])))
            if form is not None:
                done[lines] = _fill(form, text, lines, told, octets)
        return done, build(octets[done], told[done])

    def _form(self, name: int, example: list[bytes]) -> Optional[_Form]:
        if name in self._forms:
            return self._forms[name]
        form = _learn(example) if name else None
        if form is not None:
            self._told(b" ".join(example))
        if len(self._forms) < FORMS_MOST:
            self._forms[name] = form
        return form


def _numbered(example: list[bytes]) -> tuple[list[bytes], dict[bytes, int]]:
    """A line with the number of its word for each value, and the words of names. Raises Bad."""
    line: list[bytes] = []
    keys: dict[bytes, int] = {}
    for at, word in enumerate(example):
        key, is_, _ = word.partition(b"=")
        if is_:
            keys.setdefault(key, at)
            # Before the addresses a value may be taken for a time.
            if not _KEY.match(key) or key in (b"srckey", b"dstkey") or b"src" not in keys:
                raise Bad("not to be read in columns")
            line.append(b"%s=%d" % (key, at))
        elif _NUMBER.match(word) or _TIME.match(word):
            line.append((b"[%d]" if word[:1] == b"[" else b"%d") % at)
        elif _PART_OF_TIME.search(word) or word == b"shown.":  # conntrack's last words
            raise Bad("not to be read in columns")
        else:
            line.append(word)
    return line, keys


def _learn(example: list[bytes]) -> Optional[_Form]:
    """The form of a line, from its words; None when it cannot be read in columns."""
    try:
        line, keys = _numbered(example)
        found, name = named_row(b" ".join(line))
        status, mark, zone, age, user, own = parse_rest(found[21] or b"")
    except Bad:
        return None
    if keys[b"src"] != int(found[6] or b""):
        return None
    numbers = {one: int(found[at] or b"") for one, at in _VALUES.items() if found[at]}
    numbers.update(
        {
            one: at
            for one, at in (("mark", mark), ("zone", zone), ("age", age), ("id", own))
            if at >= 0
        }
    )
    same = {
        "tag": TAGS.index(found[1] or b""),
        "family": int(found[2] or 0),
        "state": tcp_state(found[5]),
        "replied": int(found[13] is None),
        "status": status,
        "user": int(user),
        **{one: -1 for one in MOST if MOST[one] and one not in numbers},
    }
    return _Form(
        tuple(int(found[at] or b"") for at in (6, 7, 14, 15)),
        numbers,
        same,
        int(found[0]) if found[0] else None,
        keys.get(b"helper"),
        NAMED.get(name),
        next((one for one in _ENDS if numbers.get(one) == len(example) - 1), None),
    )


def _fill(form: _Form, text: Chunk, lines: I64, told: Numbers, octets: Octets) -> Bool:
    """Which of the lines are valid; everything in those is filled in."""
    mine = np.zeros(len(lines), NUMBERS)
    for name, value in form.same.items():
        mine[name] = value
    good = np.ones(len(lines), bool)
    values, right = text.numbers(lines, list(form.numbers.values()))
    for at, name in enumerate(form.numbers):
        good &= right[at] & (values[at] <= (MOST[name] or 0))
        mine[name] = values[at]
    if form.proto is not None:
        good &= mine["proto"] == form.proto
    if form.time is not None:
        mine["time"], there = text.times(lines, form.time)
        good &= there
    if form.helper is not None:
        good &= text.filled(lines, form.helper)
    if form.ends is not None:  # the line may end within the number
        for tens in (10, 100, 1000, 10_000):
            good &= mine[_ENDS[form.ends]] // tens != mine[form.ends]
    raw, right = text.addresses(lines, form.addresses)
    for at, word in enumerate(form.addresses):
        rest = np.flatnonzero(~right[at])
        if len(rest):
            bad: dict[int, str] = {}
            raw[at, rest] = addresses(text.values(lines[rest], word), bad)
            right[at, rest] = True
            right[at, rest[list(bad)]] = False
        good &= right[at]
    good &= ~other_family(raw[0], mine["family"])
    told[lines], octets[lines] = mine, raw.transpose(1, 0, 2)
    return good
