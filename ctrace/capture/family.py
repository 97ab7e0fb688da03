"""What every hook family offers, and nothing more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from ctrace.batch import Counts, HookInfo
from ctrace.record import Events

if TYPE_CHECKING:
    from ctrace.host.netns import Namespace


class Capture(Protocol):
    """One attached hook family. :mod:`ctrace.capture.live` makes a Source of it."""

    info: HookInfo

    def poll(self) -> tuple[Events, int]:
        """New records in time order, and how many were lost since the last poll.

        Records are held back until none with an earlier time can follow, so that
        successive polls are in time order too; a few milliseconds at most.
        """

    def counts(self) -> dict[int, Counts]:
        """Exact cumulative counters per namespace since attaching, losses included."""

    def owner_comms(self, keys: Iterable[int]) -> dict[int, tuple[str, int]]:
        """Owner key to (comm, cgroup id), for those still known."""

    def cgroup_names(self, ids: Iterable[int]) -> dict[int, str]:
        """cgroup id to the last two parts of its path, for those still known.

        As they were when a process of it first sent: the cgroup may have gone since.
        """

    def follow(self, namespaces: Sequence[Namespace]) -> None:
        """The namespaces that exist now: attach to new ones, let go of gone ones."""

    def close(self) -> None:
        """Detach everything; safe to call twice."""
