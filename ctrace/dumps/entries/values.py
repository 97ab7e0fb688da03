"""A whole chunk of lines: finds their words, and turns words into numbers and addresses with
numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.record import MAPPED_PREFIX

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]

WORDS_MOST: Final = 48
"""Words of a line, at most; vendors' longest lines have 30."""
WORD: Final = 16
"""Bytes that distinguish words and names of values; every meaningful word is shorter."""
_PIECE: Final = 1 << 16
"""Bytes that stay in a processor's cache while they are gone through."""
_PAD: Final = 48
"""Zeros after the text, so that reading past a word never leaves it."""
_ODD: Final = np.random.default_rng().integers(1, 1 << 63, WORDS_MOST + 4, np.uint64) | np.uint64(1)
"""Different in each run, so that nobody can make two forms collide."""
_LOW: Final = np.array([(1 << (8 * n)) - 1 for n in range(9)], np.uint64)
_NIBBLE: Final = np.full(256, 255, np.uint8)
for _digit in b"0123456789abcdefABCDEF":
    _NIBBLE[_digit] = int(chr(_digit), 16)
_FULL: Final = np.array([5 * group + digit for group in range(8) for digit in range(4)])
"""Where the digits are in an IPv6 address with all its zeros, as the kernel prints it."""
_VALUE: Final = 1023
_HOW_MANY: Final = 10
"""Bits of three digits' value, below the number of digits."""
_MAPPED: Final = np.frombuffer(MAPPED_PREFIX, "<u4")[2]
_LEAST: Final = np.array([0, 0, 10, 100], np.int16)
_COLONS: Final = np.arange(4, 39, 5)


class Chunk:
    """Whole lines, each with its end, cut into words."""

    def __init__(self, chunk: bytes) -> None:
        self._chunk = chunk
        padded = np.frombuffer(chunk + bytes(_PAD), np.uint8)
        self._bytes = padded
        text = padded[: len(chunk)]
        apart = text == ord(" ")
        for one in b"\n\t\r":
            if one in chunk:
                apart |= text == one
        edges = np.flatnonzero(np.diff(apart, prepend=True, append=True))
        self._start, self._stop = edges[::2], edges[1::2]
        self.ends: I64 = np.flatnonzero(text == 10)
        """Where each line ends in the chunk."""
        self.first: I64 = np.searchsorted(self._start, np.append(0, self.ends[:-1] + 1))
        """Number of each line's first word."""
        self._count = np.diff(np.append(self.first, len(self._start)))
        equals = np.flatnonzero(text == ord("="))
        word = np.searchsorted(self._start, equals, "right") - 1
        self._value = self._start.copy()
        self._value[word[::-1]] = equals[::-1] + 1  # the first of a word wins
        self._has_value = self._value > self._start

        self._digits = _digits(padded)
        self.has_entries = b"src=" in chunk

    def __len__(self) -> int:
        return len(self.ends)

    def line(self, at: int) -> bytes:
        """A line without its end."""
        return self._chunk[0 if at == 0 else self.ends[at - 1] + 1 : self.ends[at]]

    def telling(self, start: int, stop: int) -> list[int]:
        """The lines of a range that have words, and the first blank one behind each."""
        there = self._count[start:stop] > 0
        there[1:] |= there[:-1].copy()
        there[:1] = True
        found: list[int] = (start + np.flatnonzero(there)).tolist()
        return found

    def words(self, line: int) -> list[bytes]:
        """The words of a line."""
        first = int(self.first[line])
        return [self._word(at) for at in range(first, first + int(self._count[line]))]

    def _word(self, at: int) -> bytes:
        return self._chunk[self._start[at] : self._stop[at]]

    def values(self, lines: I64, word: int) -> list[bytes]:
        """Of each line a word, or the part after its ``=``."""
        start, stop = self._at(lines, word)
        return [self._chunk[one:end] for one, end in zip(start.tolist(), stop.tolist())]

    def forms(self) -> U64:
        """A number for each line, the same for similar lines; 0 for those similar to none."""
        length = self._stop - self._start
        named = np.where(self._has_value, self._value - 1 - self._start, length)
        code = self._eight(self._start, named) * _ODD[-1]
        more = np.flatnonzero(named > 8)
        code[more] += self._eight(self._start[more] + 8, named[more] - 8) * _ODD[-2]
        code += (named.astype(np.uint64) << np.uint64(1) | self._has_value) * _ODD[-3]
        bare = np.flatnonzero(~self._has_value)
        begins = self._bytes[self._start[bare]]
        timed, bare = bare[begins == ord("[")], bare[begins - np.uint8(48) < 10]
        timed = timed[self._bytes[self._start[timed] + 1] - np.uint8(48) < 10]
        code[bare[self._decimal(self._start[bare], self._stop[bare])[1]]] = _ODD[-4]
        timed = timed[self._times(self._start[timed], self._stop[timed])[1]]
        code[timed] = _ODD[-4] << np.uint64(8)
        code ^= code >> np.uint64(32)
        return self._per_line(code, named > WORD)

    def _per_line(self, code: U64, long: Bool) -> U64:
        out = np.zeros(len(self.first), np.uint64)
        lines = np.flatnonzero((self._count > 0) & (self._count <= WORDS_MOST))
        some = np.flatnonzero(self._count > 0)
        place = np.arange(len(code)) - np.repeat(self.first[some], self._count[some])
        sums = np.add.reduceat(code * _ODD[np.minimum(place, WORDS_MOST)], self.first[some])
        out[some] = sums | np.uint64(1)
        keep = np.zeros(len(out), bool)
        keep[lines] = True
        keep[some] &= ~np.logical_or.reduceat(long, self.first[some])
        out[~keep] = 0
        return out

    def _eight(self, at: I64, n: I64) -> U64:
        """The first ``n`` of the eight bytes from ``at`` as one number."""
        whole: U64 = np.ndarray((len(self._bytes) - 7,), "<u8", self._bytes, strides=(1,))
        found: U64 = whole[at] & _LOW[np.minimum(n, 8)]
        return found

    # -- values of one word in some lines ----------------------------------------------

    def _at(self, lines: I64, word: int | I64) -> tuple[I64, I64]:
        at = self.first[lines] + word
        return self._value[at], self._stop[at]

    def filled(self, lines: I64, word: int) -> Bool:
        """Whether there is anything."""
        start, stop = self._at(lines, word)
        return stop > start

    def numbers(self, lines: I64, words: Sequence[int]) -> tuple[I64, Bool]:
        """Decimal numbers, an array (word, line), and which are valid."""
        return self._decimal(*self._at(lines, np.array(words)[:, None]))

    def _decimal(self, start: I64, stop: I64) -> tuple[I64, Bool]:
        length = stop - start
        good: Bool = (length > 0) & (length <= 10)
        found = self._digits[stop]
        value = (found & _VALUE).astype(np.int64)
        good &= found >> _HOW_MANY >= np.minimum(length, 3)
        for at in range(3, min(int(length.max(initial=0)), 10), 3):
            more = np.nonzero(length > at)
            found = self._digits[stop[more] - at]
            good[more] &= found >> _HOW_MANY >= np.minimum(length[more] - at, 3)
            value[more] += (found & _VALUE).astype(np.int64) * 10**at
        return value, good

    def times(self, lines: I64, word: int) -> tuple[I64, Bool]:
        """``[seconds.fraction]`` in ns, and which are valid."""
        return self._times(*self._at(lines, word))

    def _times(self, start: I64, stop: I64) -> tuple[I64, Bool]:
        good: Bool = self._bytes[stop - 1] == ord("]")
        start, stop = start + 1, stop - 1
        dots = np.append(np.flatnonzero(self._bytes == ord(".")), len(self._bytes))
        dot = np.minimum(dots[np.searchsorted(dots, start)], stop)
        seconds, right = self._decimal(start, dot)
        places = np.maximum(stop - dot - 1, 0)
        part, exact = self._decimal(stop - places, stop)
        part = np.where(places > 0, part, 0)
        good &= right & (seconds < 1 << 32) & ((exact & (places <= 9)) | (dot == stop))
        return seconds * 10**9 + part * 10 ** np.clip(9 - places, 0, 9), good

    def addresses(self, lines: I64, words: Sequence[int]) -> tuple[npt.NDArray[np.uint8], Bool]:
        """(word, line, 16) bytes, and which are dotted quads or IPv6 with all its zeros."""
        start, stop = self._at(lines, np.array(words)[:, None])
        out = np.zeros((*start.shape, 16), np.uint8)
        quads, good = self._quads(start, stop)
        out.view("<u4")[..., 2] = _MAPPED
        out.view("<u4")[..., 3] = quads
        full = np.nonzero(stop - start == 39)
        if len(full[0]):
            digits = _NIBBLE[self._bytes[start[full][:, None] + _FULL]]
            colons = self._bytes[start[full][:, None] + _COLONS] == ord(":")
            out[full] = digits[:, ::2] << 4 | digits[:, 1::2] & 15
            good[full] = colons[:, :7].all(axis=1) & (digits < 16).all(axis=1)
        return out, good

    def _quads(self, start: I64, stop: I64) -> tuple[npt.NDArray[np.uint32], Bool]:
        """The four bytes of each as one number, the first the lowest."""
        out, good, end = np.zeros(start.shape, np.uint32), np.ones(start.shape, bool), stop
        for at in range(4):  # from the last to the first
            found = self._digits[end]
            value, length = (found & _VALUE).astype(np.uint32), found >> _HOW_MANY
            # One that begins with a zero is none (inet_pton).
            good &= (length > 0) & (value < 256) & (value >= _LEAST[length])
            out = out << np.uint32(8) | value
            end = end - length
            if at < 3:
                end -= 1
                good &= self._bytes[end] == ord(".")
        return out, good & (end == start)


def _digits(text: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Of the digits before each byte, three at most: their number above :data:`_VALUE`, and
    their value."""
    out = np.zeros(len(text), np.uint16)
    for at in range(0, len(text), _PIECE):
        _digits_of(text[max(0, at - 3) : at + _PIECE], out[max(0, at - 3) : at + _PIECE][3:])
    return out


def _digits_of(text: npt.NDArray[np.uint8], out: npt.NDArray[np.uint16]) -> None:
    """The same of every byte but the first three."""
    digit = text - np.uint8(48)
    there = digit < 10
    digit *= there
    last, before, first = there[2:-1], there[1:-2], there[:-3]
    before = before & last
    first = first & before
    out += last.view(np.uint8)
    out += before
    out += first
    out <<= _HOW_MANY
    out += digit[2:-1]
    out += digit[1:-2] * np.uint8(10)  # at most 90
    out += (digit[:-3] * first).astype(np.uint16) * np.uint16(100)
