"""A recording made of texts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from ctrace.dumps import whose
from ctrace.dumps.evidence import evidence, to_text
from ctrace.dumps.files import texts
from ctrace.dumps.found import Found
from ctrace.dumps.recognise import Reader
from ctrace.dumps.rules import rulesets
from ctrace.dumps.source import Told, nothing
from ctrace.errors import CtraceError
from ctrace.recording.format.evidence import FACT
from ctrace.recording.format.meta import Header
from ctrace.recording.writer import Writer


def make(paths: Sequence[str], path: str) -> tuple[Writer, Told]:
    """Write what the texts tell to a new recording. Raises CtraceError."""
    found = Found()
    try:
        reader = Reader(found)
        for text in texts(paths):
            reader.read(text)
        _check_hosts(found, paths)
        for space in found.spaces.values():
            space.settle()
        found.host = found.host or next(iter(found.hosts.get(whose.PROMPTS, ())), "")
        told = Told(found)
        if not _any(found):
            raise nothing(found, paths)
        return write(told, path), told
    finally:
        found.close()


def _check_hosts(found: Found, paths: Sequence[str]) -> None:
    """One host's table and another's maximum would make a third. Raises CtraceError."""
    for way, hosts in found.hosts.items():
        if len(hosts) > 1:
            kinds = "hosts, containers or files" if way == whose.REACHED else "hosts"
            raise CtraceError(
                f"{', '.join(paths)} holds output of {len(hosts)} {kinds} "
                f"({', '.join(sorted(hosts)[:5])}): {way}"
            )


def _any(found: Found) -> bool:
    return bool(
        found.dumps
        or found.log.full
        or found.log.sizes
        or found.modules
        or found.slab
        or any(
            one.sysctls or one.counts or one.has_rules or one.counters or one.expectations
            for one in found.spaces.values()
        )
    )


def write(told: Told, path: str) -> Writer:
    """The recording of what was told."""
    found = told.found
    told.said = evidence(told)
    facts = {name: value for one in found.spaces.values() for name, value in one.sysctls.items()}
    header = Header(
        told.hooks,
        told.clock,
        told.started,
        host=found.host,
        kernel=found.kernel,
        facts={**facts, FACT: to_text(told.said)},
    )
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
