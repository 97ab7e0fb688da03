"""Recordings in segments: a directory of files that reads as one."""

from __future__ import annotations

import os

from ctrace.trace.reader import Recording


def open_recording(path: str) -> Recording:
    """The recording at ``path``. Raises CtraceError."""
    return Recording(os.fspath(path))
