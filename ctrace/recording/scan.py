"""A few columns of a recording at full speed: only the bytes they need are read."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import numpy.typing as npt

from ctrace.record import Kind
from ctrace.recording.format.events import TUPLE_DTYPES, Rows
from ctrace.recording.format.layout import Column, FormatError
from ctrace.recording.format.window import Ring


class Scan:
    """Reads chosen columns block after block."""

    _ROW = {  # noqa: RUF012
        "kind": Column.KIND,
        "reason": Column.REASON,
        "direction": Column.DIRECTION,
        "state": Column.STATE,
        "status": Column.STATUS,
    }
    _TAIL = {  # noqa: RUF012
        "owner": Column.OWNER,
        "cgroup": Column.CGROUP,
        "idle_ms": Column.IDLE,
        "overdue_ms": Column.OVERDUE,
        "timeout_ms": Column.TIMEOUT,
        "mark": Column.MARK,
    }
    _TUPLE = {  # noqa: RUF012
        "ct": Column.CT,
        "sport": Column.SPORT,
        "dport": Column.DPORT,
        "netns": Column.NETNS,
        "zone": Column.ZONE,
        "proto": Column.PROTO,
        "family": Column.FAMILY,
    }
    _ADDRESS = ("src", "dst")
    _REPLY = {  # noqa: RUF012
        "reply_src": 5,
        "reply_dst": 7,
        "reply_sport": 2,
        "reply_dport": 3,
    }

    def __init__(self, names: tuple[str, ...]) -> None:
        known = ["ts", *self._ROW, *self._TAIL, *self._TUPLE, *self._ADDRESS, *self._REPLY]
        for name in names:
            if name not in known:
                raise FormatError(f"no column {name!r}: there are {', '.join(known)}")
        self._names = names
        self._rings: dict[str, Ring] = {}
        for name in names:
            if name in self._TUPLE:
                self._rings[name] = Ring(TUPLE_DTYPES[self._TUPLE[name]])
            elif name in self._ADDRESS:
                self._rings[name] = Ring(np.uint64, 2)
            elif name in self._REPLY:
                self._rings.setdefault("image", Ring(np.uint64, 11))

    def block(self, rows: Rows) -> dict[str, npt.NDArray[Any]]:
        """The columns of one block."""
        out: dict[str, npt.NDArray[Any]] = {}
        is_destroy = np.empty(0, bool)
        if self._rings or not self._TAIL.keys().isdisjoint(self._names):
            is_destroy = rows.row(Column.KIND) == Kind.DESTROY
        numbers: npt.NDArray[np.int64] = np.empty(0, np.int64)
        known: Optional[npt.NDArray[np.bool_]] = None
        if self._rings:
            numbers = rows.numbers(is_destroy)
            for name, ring in self._rings.items():
                ring.append(rows.head.first_tuple, self._tuples(name, rows))
            known = next(iter(self._rings.values())).has(numbers)
        for name in self._names:
            if name == "ts":
                values: npt.NDArray[Any] = rows.ts()
            elif name in self._ROW:
                values = rows.row(self._ROW[name])
            elif name in self._TAIL:
                values = self._tail(name, rows, is_destroy)
            elif name in self._REPLY:
                image = self._rings["image"].take(numbers)
                word = self._REPLY[name]
                if word < 5:
                    values = np.ascontiguousarray(image[:, 9]).view(np.uint16)[word::4]
                else:
                    values = np.ascontiguousarray(image[:, word : word + 2]).view(np.uint8)
            else:
                values = self._rings[name].take(numbers)
                values = values.view(np.uint8) if name in self._ADDRESS else values[:, 0]
            out[name] = values if known is None else values[known]
        return out

    def _tuples(self, name: str, rows: Rows) -> npt.NDArray[Any]:
        if name == "image":
            return rows.tuples()
        if name in self._ADDRESS:
            return rows.tuple_address(name == "dst")
        return rows.tuple_column(self._TUPLE[name])

    def _tail(self, name: str, rows: Rows, is_destroy: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
        at, values = rows.tail(is_destroy, self._TAIL[name])
        if name == "idle_ms":
            values = values + rows.tail(is_destroy, Column.TIMEOUT)[1]
            values += rows.tail(is_destroy, Column.OVERDUE)[1]
        out = np.zeros(rows.n, values.dtype)
        out[at] = values
        return out.view(np.int32) if name in ("idle_ms", "overdue_ms") else out
