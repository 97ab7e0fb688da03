"""The model that a recording is put through."""

from __future__ import annotations

from ctrace.model.model import Model
from ctrace.recording.derived import Recorded
from ctrace.recording.format.evidence import logged


def model_of(recording: Recorded, memory: int = 64 << 20) -> Model:
    """An empty model of the recording's host, hooks and clock; ``memory`` in bytes."""
    return Model(
        recording.hooks,
        recording.clock,
        recording.started,
        host=recording.header.host,
        memory=memory,
        logged=logged(recording.header.facts),
    )
