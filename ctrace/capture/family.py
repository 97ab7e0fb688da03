"""The interface of a hook family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from ctrace.batch import Counts, HookInfo
from ctrace.record import Events

if TYPE_CHECKING:
    from ctrace.host.netns import Namespace
    from ctrace.kernel.objects import Objects

POLL: Final = 0.02
"""Seconds between two polls of a family that sets no interval of its own."""

NO_OWNERS: Final = (
    "the process that opened a flow: the kernel does not tell whether a packet is sent or comes in"
)


class Capture(ABC):
    """One attached hook family. :mod:`ctrace.capture.live` makes a Source of it."""

    info: HookInfo
    """What is attached and what cannot be seen; replaced as namespaces come and go."""
    hold: float = 0.002
    """Seconds for which a poll may keep records back, so that polls are in time order."""
    tells_left: bool = True
    """Whether an entry's end carries its remaining time and its state."""
    lags: bool = False
    """Whether :meth:`counts` knows only of what was polled."""
    looks: bool = False
    """Whether :meth:`look` finds anything; if so, ``ct`` is the entry's address."""

    @abstractmethod
    def poll(self) -> tuple[Events, int]:
        """New records in time order, and how many were lost since the last poll.

        Records are held back until none with an earlier time can follow, so that
        successive polls are in time order too; :attr:`hold` seconds at most.
        """

    @abstractmethod
    def counts(self) -> dict[int, Counts]:
        """Exact cumulative counters per namespace since attaching, losses included."""

    @abstractmethod
    def follow(self, namespaces: Sequence[Namespace]) -> None:
        """The namespaces that exist now: attach to new ones, let go of gone ones."""

    @abstractmethod
    def close(self) -> None:
        """Detach everything; safe to call twice."""

    @property
    def interval(self) -> float:
        """Seconds that may pass until the next poll."""
        return POLL

    def part(self) -> None:
        """Start a new batch: what is polled from now on belongs to it."""
        return

    def owner_comms(self, keys: Iterable[int]) -> dict[int, tuple[str, int]]:  # noqa: ARG002
        """Owner key to (comm, cgroup id), for the owners still known."""
        return {}

    def cgroup_names(self, ids: Iterable[int]) -> dict[int, str]:  # noqa: ARG002
        """cgroup id to the last two parts of its path, for the cgroups still known.

        The paths are those at the time when a process in it first sent: the cgroup may have gone
        since.
        """
        return {}

    def look(self, entries: Iterable[int]) -> None:  # noqa: ARG002
        """Ask for SAMPLED records of these entries (``ct``), where they still live.

        They come with the next poll; none where :attr:`looks` is false. Raises BpfError where the
        kernel cannot run programs on request.
        """
        return

    def run_time(self) -> int:
        """Nanoseconds spent in our programs so far; 0 where the kernel does not measure it."""
        return 0


class BpfCapture(Capture):
    """What the families that run BPF programs share: all of it is in ``self._objects``."""

    looks = True
    _objects: Objects

    def poll(self) -> tuple[Events, int]:
        """New records in time order, and how many were lost."""
        return self._objects.poll(self.hold)

    def counts(self) -> dict[int, Counts]:
        """Exact counters per namespace since attaching."""
        return self._objects.counts()

    @property
    def interval(self) -> float:
        """Seconds until the next poll; shorter when the rings are fuller."""
        return self._objects.rings.interval

    def part(self) -> None:
        """Start a new batch: what is polled from now on belongs to it."""
        self._objects.rings.part()

    def owner_comms(self, keys: Iterable[int]) -> dict[int, tuple[str, int]]:
        """Owner key to (comm, cgroup id)."""
        return self._objects.owner_comms(keys)

    def cgroup_names(self, ids: Iterable[int]) -> dict[int, str]:
        """cgroup id to the end of its path."""
        return self._objects.cgroup_names(ids)

    def look(self, entries: Iterable[int]) -> None:
        """Ask for SAMPLED records of these entries (``ct``), where they still live."""
        self._objects.look(entries)

    def run_time(self) -> int:
        """Nanoseconds spent in our programs, where the kernel measures it."""
        return self._objects.run_time()

    def close(self) -> None:
        """Detach everything; safe to call twice."""
        self._objects.close()
