"""ctrace finds what fills Linux's connection tracking table, and how to fix it safely.

A recording in Python::

    import ctrace

    with ctrace.open("ctrace.data") as recording:
        print(recording.header.host, recording.hooks.family, recording.missing)
        for batch in recording.batches():            # as captured, in time order
            batch.events                             # numpy array of ctrace.record.RECORD
        for columns in recording.columns("ts", "dport"):   # only what these need is read
            columns["dport"]
        for until, tables in recording.tables():     # boot clock ns, one a second
            print(recording.clock.utc(until), tables[0].count, tables[0].max)
        for until, counts in recording.counts():     # exact, by namespace and Reason
            ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctrace.recording.reader import Recording

__version__ = "0.1.0"


def open(path: str) -> Recording:
    """A recording, or a flight recorder's directory, for reading.

    Raises ctrace.errors.CtraceError when it is none, damaged at its beginning, or
    of a version that this one cannot read.
    """
    from ctrace.recording.series import open_recording

    return open_recording(path)
