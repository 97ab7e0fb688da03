"""The counters of the flows in a recording."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ctrace.batch import DUMP, Batch, Counts
from ctrace.record import N_REASONS
from ctrace.recording.format.meta import Header


class Counted:
    """Exact cumulative counters of the flows asked for, batch after batch.

    Hooks count every flow of a namespace, so under a filter that selects among flows the events
    themselves are counted: exact except for lost ones.
    """

    def __init__(self, header: Header) -> None:
        self._own = bool(header.flow_filter) or header.hooks.family == DUMP
        self._counts: dict[int, Counts] = {}

    def after(self, batch: Batch) -> Mapping[int, Counts]:
        """By namespace and Reason, at the end of ``batch``; call it for each batch in turn."""
        if not self._own:
            return batch.counts
        events = batch.events
        for netns in np.unique(events["netns"]).tolist():
            reasons = events["reason"][events["netns"] == netns]
            new = np.bincount(reasons, minlength=N_REASONS)[:N_REASONS].astype(np.uint64)
            self._counts[netns] = self._counts.get(netns, np.uint64(0)) + new
        return dict(self._counts)
