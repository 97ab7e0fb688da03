"""Where the blocks of a file are, from the index at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np

from ctrace.recording.format.layout import FILE_HEAD


@dataclass(frozen=True)
class Place:
    """A block's place in the file, and the numbers needed to seek."""

    offset: int
    length: int
    kind: int
    until: int


def places(blob: bytes, end: int, until: int) -> Optional[list[Place]]:
    """The index of a FOOT block; None unless its blocks follow one another up to ``end``.

    ``until``: boot clock, ns, after which none may end.
    """
    if not blob or len(blob) % 32:
        return None
    index = np.frombuffer(blob, np.uint64).reshape(-1, 4)
    edges = np.concatenate((index[:, 0], [np.uint64(end)]))
    sound = (
        edges[0] == len(FILE_HEAD)
        and (edges[1:] > edges[:-1]).all()
        and (index[:, 1] == edges[1:] - edges[:-1]).all()
        and (index[:, 3] <= until).all()
    )
    return [Place(*row) for row in index.tolist()] if sound else None
