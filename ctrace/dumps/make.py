"""A recording made of texts; or opened as if it were one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence

from ctrace.dumps.evidence import evidence, to_text
from ctrace.dumps.files import texts
from ctrace.dumps.found import Found
from ctrace.dumps.recognise import Reader
from ctrace.dumps.rules import rulesets
from ctrace.dumps.source import Told, nothing
from ctrace.errors import CtraceError
from ctrace.recording.derived import Recorded
from ctrace.recording.format.evidence import FACT
from ctrace.recording.format.layout import SIGNATURE
from ctrace.recording.format.meta import Header
from ctrace.recording.merge import open_several
from ctrace.recording.reader import Recording
from ctrace.recording.series import SUFFIX
from ctrace.recording.writer import Writer


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
        with open(path, "rb") as file:
            head = file.read(len(SIGNATURE))
    except OSError:
        return True
    return not head or head == SIGNATURE[: len(head)] or head.startswith(SIGNATURE[:7])


def open_any(paths: Sequence[str]) -> Recorded:
    """Recordings as they are; texts as the recording that they make. Raises CtraceError."""
    known = [is_recording(path) for path in paths]
    if all(known):
        return open_several(paths)
    if any(known):
        raise CtraceError("recordings and texts together: make one of the texts with ctrace import")
    with tempfile.TemporaryDirectory(prefix="ctrace-") as folder:
        path = os.path.join(folder, "imported")
        make(paths, path)
        recording = Recording(path)  # stays open, though the file goes
    recording.path = ", ".join("standard input" if one == "-" else one for one in paths)
    return recording


def make(paths: Sequence[str], path: str) -> tuple[Writer, Told]:
    """Write what the texts tell to a new recording. Raises CtraceError."""
    found = Found()
    try:
        reader = Reader(found)
        for text in texts(paths):
            reader.read(text)
        told = Told(found)
        if not _any(found):
            raise nothing(found, paths)
        return write(told, path), told
    finally:
        found.close()


def _any(found: Found) -> bool:
    return bool(
        found.dumps or found.log.full or found.modules
        or any(one.sysctls or one.counts or one.has_rules or one.counters or one.expectations
               for one in found.spaces.values())
    )  # fmt: skip


def write(told: Told, path: str) -> Writer:
    """The recording of what was told."""
    found = told.found
    told.said = evidence(told)
    facts = {name: value for one in found.spaces.values() for name, value in one.sysctls.items()}
    header = Header(
        told.hooks, told.clock, told.started, host=found.host, kernel=found.kernel,
        facts={**facts, FACT: to_text(told.said)},
    )  # fmt: skip
    writer = Writer(path, header)
    try:
        with writer:
            for batch in told.batches():
                writer.write(batch)
            for netns, text in rulesets(told):
                writer.ruleset(netns, text)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return writer
