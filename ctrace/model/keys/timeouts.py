"""Which entries do not have the timeout that the kernel's settings give them now.

How long an entry was idle is derived from the timeout in force at its end. The entry had another
one where the setting was lowered meanwhile, or a ``ct timeout`` policy chose it. A look at a living
entry shows both: it has more time left than the timeout in force, or its policy is seen.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ctrace.model.keys.columns import SERVICE_MASK, Window
from ctrace.model.keys.scatter import Rows

LATER_MS: Final = 90_000
"""ms by which expired entries may be collected late (gc_worker, nf_conntrack_core.c)."""
MOST: Final = 256
"""Services that are remembered, at most."""


class Timeouts:
    """Services whose entries' lives are not derived from their ends for a while."""

    def __init__(self) -> None:
        self._until: dict[int, int] = {}

    def learn(self, w: Window, at: Rows) -> None:
        """Take looks at living entries."""
        over = w.events["overdue_ms"][at]
        at = at[(w.idle_ms(at) < 0) & (w.events["timeout_ms"][at] == 0) & (over < 0)]
        left = -w.events["overdue_ms"][at].astype(np.int64)
        until = w.ts.take(at).astype(np.int64) + (left + LATER_MS) * 1_000_000
        services = (w.meta.take(at) & SERVICE_MASK).tolist()
        for service, end in zip(services, until.tolist()):
            self._until[service] = max(end, self._until.get(service, 0))
        while len(self._until) > MOST:
            self._until.pop(next(iter(self._until)))

    def doubtful(self, w: Window, at: Rows) -> npt.NDArray[np.bool_]:
        """Which of these ends belong to such a service."""
        if not self._until or not at.size:
            return np.zeros(at.size, bool)
        now = int(w.ts[0])
        services = np.array([one for one, end in self._until.items() if end >= now], np.uint64)
        found: npt.NDArray[np.bool_] = np.isin(w.meta.take(at) & SERVICE_MASK, services)
        return found
