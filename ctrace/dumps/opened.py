"""Recordings, or texts as if they were one. What reads texts is imported when there are some."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence

from ctrace import files
from ctrace.errors import CtraceError
from ctrace.recording.derived import Recorded
from ctrace.recording.format.layout import SIGNATURE
from ctrace.recording.merge import open_several
from ctrace.recording.reader import Recording
from ctrace.recording.series import SUFFIX


def is_recording(path: str) -> bool:
    """Whether ctrace wrote it: a recording, or a flight recorder's directory.

    What cannot be read is left for the recording's reader to complain of.
    """
    if path == "-":
        return False
    if os.path.isdir(path):
        with contextlib.suppress(OSError):
            return any(name.endswith(SUFFIX) for name in os.listdir(path))
        return True
    if not os.path.isfile(path):
        return not os.path.exists(path)
    try:
        head = files.content(path, len(SIGNATURE))
    except (OSError, CtraceError):
        return True
    return not head or head == SIGNATURE[: len(head)] or head.startswith(SIGNATURE[:7])


def open_any(paths: Sequence[str]) -> Recorded:
    """Recordings as they are; texts as the recording that they make. Raises CtraceError."""
    known = [is_recording(path) for path in paths]
    if all(known):
        return open_several(paths)
    if any(known):
        raise CtraceError("recordings and texts cannot be read together: import the texts first")
    from ctrace.dumps.ended import cleanly
    from ctrace.dumps.make import make

    with cleanly(), tempfile.TemporaryDirectory(prefix="ctrace-") as folder:
        path = os.path.join(folder, "imported")
        make(paths, path)
        recording = Recording(path)  # stays open, though the file goes
    recording.path = ", ".join("standard input" if one == "-" else one for one in paths)
    return recording
