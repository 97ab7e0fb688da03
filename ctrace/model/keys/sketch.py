"""Upper bounds for the weight of keys without a row, in cells that several keys share.

A cell never has less than the weight of any one of its keys, so it bounds each from above.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.model.keys.columns import U64
from ctrace.model.keys.scatter import Rows, add_at

CELLS_PER_ROW: Final = 8
_HALF, _ODD = np.uint64(32), np.uint64(1)


class Sketch:
    """Cells for a table of ``rows`` rows; their memory is taken once the first is used."""

    def __init__(self, rows: int) -> None:
        bits = self._bits(rows)
        self._cells = np.zeros(1 << bits, np.uint32)
        self._shift = np.uint64(64 - bits)

    @staticmethod
    def _bits(rows: int) -> int:
        return (CELLS_PER_ROW * rows - 1).bit_length()

    @classmethod
    def needed(cls, rows: int) -> int:
        """Bytes that the cells of a table of this many rows take."""
        return 4 << cls._bits(rows)

    def _cell(self, h: U64) -> Rows:
        """The cell of each hash; squaring decorrelates the hashes of consecutive keys."""
        cell = h >> _HALF
        cell ^= h
        cell *= cell | _ODD
        cell >>= self._shift
        return cell.view(np.int64)

    def bounds(self, h: U64) -> npt.NDArray[np.int64]:
        """Upper bound of each key's weight."""
        return self._cells.take(self._cell(h)).astype(np.int64)

    def add(self, h: U64, weight: npt.NDArray[np.uint32] | int) -> npt.NDArray[np.uint32]:
        """Add to the weight of keys; returns their new upper bounds."""
        cell = self._cell(h)
        add_at(self._cells, cell, weight)
        return self._cells.take(cell)

    def raise_to(self, h: U64, bound: npt.NDArray[np.int64]) -> None:
        """Raise the bounds of these keys to at least these weights."""
        np.maximum.at(self._cells, self._cell(h), bound.astype(np.uint32))

    def distinct(self) -> int:
        """How many keys were ever added, by the cells that are empty.

        About 1 % standard error up to twice as many keys as there are cells (262,144 at the
        default size), and at most twelve times as many.
        """
        n = len(self._cells)
        empty = max(1, n - int(np.count_nonzero(self._cells)))
        return round(n * float(np.log(n / empty)))
