"""Which names the batches have already carried, and the new ones."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from ctrace.batch import Names, Netns, Owner
from ctrace.capture.family import Capture
from ctrace.errors import CtraceError
from ctrace.host import netns, process
from ctrace.host.netns import Namespace
from ctrace.record import Events, Kind

ADDRESSES: Final = 30.0
"""Seconds between two readings of a namespace's addresses."""
OWNERS_KNOWN: Final = 65536


class NameBook:
    """What a source has reported about owners, namespaces and listeners."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._listeners = process.Listeners()
        self._owners: OrderedDict[int, None] = OrderedDict()
        self._netns: dict[int, Netns] = {}
        self._addresses_at: dict[int, float] = {}

    def came(self, fresh: Sequence[Namespace]) -> None:
        """These were not there at the last look: their numbers may have been those of others."""
        for space in fresh:
            self._addresses_at.pop(space.inum, None)
            self._netns.pop(space.inum, None)

    def learn(
        self, events: Events, spaces: Sequence[Namespace], every: Sequence[Namespace], look: bool
    ) -> Names:
        """Names not reported before: listeners, and those of ``every`` namespace itself, if
        ``look``."""
        owners = self._new_owners(events)
        if not look:
            return Names(owners=owners, cgroups=_units(owners))
        return Names(
            netns=self._new_netns(every, {space.inum for space in spaces}),
            owners=owners,
            cgroups=_units(owners),
            listeners=self._listeners.look(spaces),
        )

    def _new_owners(self, events: Events) -> dict[int, Owner]:
        kinds = events["kind"]
        packets = (kinds != int(Kind.DESTROY)) & (kinds != int(Kind.EXISTING))
        keys = np.unique(events["owner"][packets])
        fresh = [key for key in keys.tolist() if key and key not in self._owners]
        found = {}
        captured = self._capture.owner_comms(fresh)
        paths = self._capture.cgroup_names({cgroup for _, cgroup in captured.values()})
        for key, (comm, cgroup) in captured.items():
            found[key] = process.owner(key, comm, cgroup, paths.get(cgroup, ""))
            self._owners[key] = None
        while len(self._owners) > OWNERS_KNOWN:
            self._owners.popitem(last=False)
        return found

    def _new_netns(
        self, spaces: Sequence[Namespace], followed: Collection[int]
    ) -> dict[int, Netns]:
        now = time.monotonic()
        fresh = {}
        for space in spaces:
            if now - self._addresses_at.get(space.inum, -ADDRESSES) < ADDRESSES:
                continue
            self._addresses_at[space.inum] = now
            try:
                addresses = netns.local_addresses(space.path)
            except (OSError, CtraceError):
                addresses = ()
            told, name = self._netns.get(space.inum), space.name
            if told and name == f"netns:{space.inum}":
                name = told.name  # it lost its mount, not its name
            known = Netns(space.inum, name, addresses, space.inum in followed)
            if told != known:
                fresh[space.inum] = self._netns[space.inum] = known
        gone = self._addresses_at.keys() - {space.inum for space in spaces}
        for inum in gone:
            del self._addresses_at[inum]
            fresh[inum] = replace(self._netns.pop(inum), addresses=())
        return fresh


def _units(owners: dict[int, Owner]) -> dict[int, str]:
    return {owner.cgroup: owner.unit for owner in owners.values() if owner.cgroup and owner.unit}
