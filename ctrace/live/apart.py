"""Advice made in a process of its own: it is nice to the host, can be ended at any moment, and its
memory goes with it. Reading a large table and rehearsing its rules takes a core for seconds."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, Final, Optional

from ctrace import interpreter
from ctrace.errors import CtraceError
from ctrace.model.snapshot import Snapshot

if TYPE_CHECKING:
    from ctrace.advice.facts import Facts
    from ctrace.advice.result import Advice

FactsOf = Callable[[int], Optional["Facts"]]
NICE: Final = 5
"""Added to the niceness of ctrace: the host's services go first. With more, advice would hardly
come on a host that is short of processors, which is when it is wanted."""
LOOK_S: Final = 0.1
"""Seconds from one look whether it is still wanted to the next."""


def advise(
    services: Snapshot,
    pairs: Snapshot,
    tables: Sequence[int],
    facts_of: FactsOf,
    stop: threading.Event,
) -> Advice:
    """Advice on these culprits, with the facts of each of these namespaces.

    ``facts_of`` goes to the other process, so it can be pickled. Raises CtraceError, also once
    ``stop`` is set.
    """
    with os.fdopen(os.memfd_create("advice"), "wb+") as asked:
        pickle.dump((services, pairs, tuple(tables), facts_of), asked)
        asked.seek(0)
        said, complaint, status = _answer(asked, stop)
    if stop.is_set():
        raise CtraceError("given up: press a to ask again")
    if not said:
        lines = complaint.decode("utf-8", "replace").strip().splitlines()
        raise CtraceError(lines[-1] if lines else f"advice ended with {status}")
    answer: Any = pickle.loads(said)  # of our own process
    if isinstance(answer, CtraceError):
        raise answer
    advice: Advice = answer
    return advice


def _answer(asked: IO[bytes], stop: threading.Event) -> tuple[bytes, bytes, int]:
    """What the other process writes, what it complains of, and its exit status."""
    with subprocess.Popen(
        interpreter.module(__name__, str(os.getpid())),
        stdin=asked,  # no pipe: with a timeout communicate() may lose what it writes
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as made:
        try:
            while True:
                try:
                    return (*made.communicate(timeout=LOOK_S), made.returncode)
                except subprocess.TimeoutExpired:
                    if stop.is_set():
                        made.kill()
        finally:
            made.kill()


def _make(services: Snapshot, pairs: Snapshot, tables: Sequence[int], facts_of: FactsOf) -> Advice:
    from ctrace.advice.advise import advise as make
    from ctrace.advice.facts import Facts

    return make(services, pairs, {netns: facts_of(netns) or Facts() for netns in tables})


def main() -> None:
    """Read what is asked for, and write the advice, or the CtraceError that there is instead."""
    interpreter.end_with_parent(signal.SIGKILL, int(sys.argv[1]))
    os.nice(NICE)
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no part of the answer
    services, pairs, tables, facts_of = pickle.load(sys.stdin.buffer)  # of our own parent
    made: Any
    try:
        made = _make(services, pairs, tables, facts_of)
    except CtraceError as error:
        made = error
    with answer:
        pickle.dump(made, answer)


if __name__ == "__main__":
    main()
