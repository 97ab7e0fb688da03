"""A whole chunk of lines: finds their words, and turns words into numbers and addresses with
numpy."""

from __future__ import annotations

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

        self._dots = np.append(np.flatnonzero(text == ord(".")), [len(chunk)] * 4)
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

    def value(self, line: int, word: int) -> bytes:
        """A word, or the part after its ``=``."""
        at = int(self.first[line]) + word
        return self._chunk[self._value[at] : self._stop[at]]

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

    def _at(self, lines: I64, word: int) -> tuple[I64, I64]:
        at = self.first[lines] + word
        return self._value[at], self._stop[at]

    def filled(self, lines: I64, word: int) -> Bool:
        """Whether there is anything."""
        start, stop = self._at(lines, word)
        return stop > start

    def numbers(self, lines: I64, word: int) -> tuple[I64, Bool]:
        """Decimal numbers, and which are valid."""
        return self._decimal(*self._at(lines, word))

    def _decimal(self, start: I64, stop: I64) -> tuple[I64, Bool]:
        length = stop - start
        good: Bool = (length > 0) & (length <= 10)
        value = np.zeros(len(start), np.int64)
        for at in range(min(int(length.max(initial=0)), 10)):
            digit = self._bytes[start + at] - np.uint8(48)
            there = at < length
            good &= ~there | (digit < 10)
            value = np.where(there, value * 10 + digit, value)
        return value, good

    def times(self, lines: I64, word: int) -> tuple[I64, Bool]:
        """``[seconds.fraction]`` in ns, and which are valid."""
        return self._times(*self._at(lines, word))

    def _times(self, start: I64, stop: I64) -> tuple[I64, Bool]:
        good: Bool = self._bytes[stop - 1] == ord("]")
        start, stop = start + 1, stop - 1
        dot = np.minimum(self._dots[np.searchsorted(self._dots, start)], stop)
        seconds, right = self._decimal(start, dot)
        part, exact = self._decimal(np.minimum(dot + 1, stop), stop)
        places = np.maximum(stop - dot - 1, 0)
        good &= right & (seconds < 1 << 32) & ((exact & (places <= 9)) | (dot == stop))
        return seconds * 10**9 + part * 10 ** np.clip(9 - places, 0, 9), good

    def addresses(self, lines: I64, word: int) -> tuple[npt.NDArray[np.uint8], Bool]:
        """(n, 16) bytes, and which are dotted quads or IPv6 with all its zeros."""
        start, stop = self._at(lines, word)
        out = np.zeros((len(lines), 16), np.uint8)
        out[:, :12] = np.frombuffer(MAPPED_PREFIX, np.uint8)
        out[:, 12:], good = self._quads(start, stop)
        full = np.flatnonzero(stop - start == 39)
        if len(full):
            digits = _NIBBLE[self._bytes[start[full, None] + _FULL]]
            colons = self._bytes[start[full, None] + _COLONS] == ord(":")
            out[full] = digits[:, ::2] << 4 | digits[:, 1::2] & 15
            good[full] = colons[:, :7].all(axis=1) & (digits < 16).all(axis=1)
        return out, good

    def _quads(self, start: I64, stop: I64) -> tuple[npt.NDArray[np.uint8], Bool]:
        first = np.searchsorted(self._dots, start)
        dots = [self._dots[first + at] for at in range(4)]
        good: Bool = (dots[2] < stop) & (dots[3] >= stop)
        out = np.zeros((len(start), 4), np.uint8)
        edges = [start - 1, *dots[:3], stop]
        for at in range(4):
            length = edges[at + 1] - edges[at] - 1
            value, place = np.zeros(len(start), np.int16), edges[at + 1]
            good &= (length > 0) & (length < 4)
            for back, tens in ((1, 1), (2, 10), (3, 100)):
                digit = self._bytes[place - back] - np.uint8(48)
                there = length >= back
                good &= ~there | (digit < 10)
                value += np.where(there, digit, 0) * np.int16(tens)
            # One that begins with a zero is none (inet_pton).
            good &= (value < 256) & (value >= _LEAST[np.clip(length, 0, 3)])
            out[:, at] = value
        return out, good
