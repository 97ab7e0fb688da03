"""The kernel objects of a BPF family: its maps, rings, programs and attachments.

Everything lives in file descriptors of this process and nothing is pinned, so all
of it goes away with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Optional

import numpy as np

from ctrace.batch import Counts
from ctrace.filters import Filter, network_words
from ctrace.kernel import bpf, layout, programs
from ctrace.kernel.rings import Rings
from ctrace.record import N_REASONS, Events, Reason, Status


@dataclass(frozen=True)
class MapSpec:
    """A map to create; no entries: one per possible CPU, or :func:`namespaces`."""

    name: str
    kind: bpf.MapType
    key: int
    value: int
    entries: int


NAMESPACES: Final = (1024, 4096)
"""How many namespaces are counted separately, at least and at most; the rest are counted together
under 0. Each takes some 200 bytes for every possible CPU,"""
COUNTED: Final = 16 << 20
"""bytes in total."""


def namespaces() -> int:
    """How many namespaces are counted separately on this machine."""
    least, most = NAMESPACES
    return max(least, min(most, COUNTED // (200 * bpf.possible_cpus())))


TALLY_WORDS: Final = N_REASONS + 2
"""``struct tally``: the counters, and two words that only the hooks use."""
NEAR_PLACES: Final = 64
"""How many of them are counted where their number tells, on each CPU."""
NEAR_WORDS: Final = 2 + TALLY_WORDS
"""A place: the namespace, who claimed it, ``struct tally``."""
_NEAR_BYTES: Final = 8 * NEAR_PLACES * NEAR_WORDS

# In the order of bpf/maps.h, after the rings. Hashes are preallocated: a hook must
# never allocate. SCRATCH is a plain LRU: an entry is needed for microseconds.
MAPS: Final = (
    MapSpec("counts", bpf.MapType.PERCPU_HASH, 4, 8 * TALLY_WORDS, 0),
    MapSpec("owners", bpf.MapType.LRU_HASH, 8, 24, 16384),
    MapSpec("scratch", bpf.MapType.LRU_HASH, 8, 56, 16384),
    MapSpec("baseline", bpf.MapType.PERCPU_HASH, 4, 16, 0),
    MapSpec("settings", bpf.MapType.ARRAY, 4, 16 * 8, 1),
    MapSpec("cpus", bpf.MapType.ARRAY, 4, 16, 0),
    MapSpec("cgroups", bpf.MapType.LRU_HASH, 8, 2 * 96, 2048),
    MapSpec("blank", bpf.MapType.ARRAY, 4, 2 * 96, 1),
    MapSpec("near", bpf.MapType.PERCPU_ARRAY, 4, _NEAR_BYTES, 1),
    MapSpec("slots", bpf.MapType.ARRAY, 4, 56, 1 << 12),
)
COUNTS, OWNERS, SCRATCH, BASELINE, SETTINGS, CPUS, CGROUPS, _, NEAR = range(1, 10)
SETTING_WORDS: Final = 16


def _entries(kind: bpf.MapType) -> int:
    return namespaces() if kind is bpf.MapType.PERCPU_HASH else bpf.possible_cpus()


class Objects:
    """Maps, rings, programs and attachments, closed together."""

    def __init__(self, ring_bytes: int) -> None:
        """Create the maps. Raises BpfError (without CAP_BPF: EPERM)."""
        self._fds: list[int] = []
        self.programs: dict[str, int] = {}
        self.cpus: frozenset[int] = frozenset()
        """Those that ran when :mod:`ctrace.kernel.percpu` last looked."""
        self._lost = 0
        self._checked = time.monotonic()
        self.rings = Rings(ring_bytes, own="FETCH_ADD" in layout.running())
        self.maps = [self.rings.map]
        try:
            for spec in MAPS:
                self.maps.append(
                    self.keep(
                        bpf.map_create(
                            spec.kind,
                            spec.key,
                            spec.value,
                            spec.entries or _entries(spec.kind),
                            name=spec.name,
                        )
                    )
                )
            # the rest: bpf/ct.h counts here when the map is full
            zeros = bytes(8 * TALLY_WORDS * bpf.possible_cpus())
            bpf.map_update(self.maps[COUNTS], struct.pack("<I", 0), zeros)
        except BaseException:
            self.close()
            raise

    def keep(self, fd: int) -> int:
        """Close this descriptor with the rest."""
        self._fds.append(fd)
        return fd

    def release(self, fd: int) -> None:
        """Close this descriptor now."""
        self._fds.remove(fd)
        os.close(fd)

    def load(
        self,
        name: str,
        instructions: bytes,
        kind: bpf.ProgType,
        *,
        attach_type: bpf.AttachType = bpf.AttachType.NONE,
        attach_btf_id: int = 0,
        attach_btf_fd: int = 0,
    ) -> int:
        """Link and load one program. Raises BpfError."""
        fd = bpf.prog_load(
            programs.link(instructions, self.maps, fetch_add="FETCH_ADD" in layout.running()),
            kind,
            name,
            attach_type=attach_type,
            attach_btf_id=attach_btf_id,
            attach_btf_fd=attach_btf_fd,
        )
        self.programs[name] = self.keep(fd)
        return fd

    def set(self, values: Sequence[int]) -> None:
        """Fill SETTINGS from the start."""
        words = [*values, *([0] * (SETTING_WORDS - len(values)))]
        bpf.map_update(
            self.maps[SETTINGS], struct.pack("<I", 0), struct.pack(f"<{SETTING_WORDS}Q", *words)
        )

    def setting(self, index: int) -> int:
        """One word of SETTINGS."""
        value = bpf.map_lookup(self.maps[SETTINGS], struct.pack("<I", 0), 8 * SETTING_WORDS)
        return int(struct.unpack_from("<Q", value or bytes(8 * SETTING_WORDS), 8 * index)[0])

    # -- what every family answers alike ---------------------------------------------------

    def poll(
        self, hold: float = 0.002, settle: Optional[Callable[[Events], Events]] = None
    ) -> tuple[Events, int]:
        """New records by time (all older than ``hold`` seconds), and how many were lost.

        ``settle`` may take out records, also those that are still held back.
        """
        events = self.rings.poll(hold, settle)
        # Counting is 0.2 ms, so only when a ring was full; and once a second, because a
        # processor may look at the producer before its own store to the consumer is seen.
        now = time.monotonic()
        if not self.rings.take_was_full() and now - self._checked < 1:
            return events, 0
        self._checked = now
        lost = self.total(Reason.RING_FULL)
        fresh, self._lost = lost - self._lost, lost
        return events, fresh

    def total(self, reason: Reason) -> int:
        """One reason's exact count over all namespaces."""
        return int(sum(int(counts[reason]) for counts in self.counts().values()))

    def counts(self) -> dict[int, Counts]:
        """Exact cumulative counters per namespace, summed over CPUs."""
        keys, values = bpf.map_items(
            self.maps[COUNTS], 4, 8 * TALLY_WORDS * bpf.possible_cpus(), namespaces()
        )
        tallies = values.view(np.uint64).reshape(len(keys), bpf.possible_cpus(), TALLY_WORDS)
        near = np.frombuffer(
            bpf.map_lookup(self.maps[NEAR], bytes(4), _NEAR_BYTES * bpf.possible_cpus()) or b"",
            np.uint64,
        ).reshape(-1, NEAR_WORDS)
        spaces = np.concatenate([keys.view(np.uint32)[:, 0], near[:, 0].astype(np.uint32)])
        counts = np.concatenate([tallies[:, :, :N_REASONS].sum(axis=1), near[:, 2 : 2 + N_REASONS]])
        counted = counts.any(axis=1)
        names, which = np.unique(spaces[counted], return_inverse=True)
        sums = np.zeros((len(names), N_REASONS), np.uint64)
        np.add.at(sums, which, counts[counted])
        return dict(zip(names.tolist(), sums))

    def owner_comms(self, keys: Iterable[int]) -> dict[int, tuple[str, int]]:
        """Owner key to (comm, cgroup id), for those still in the map."""
        found = {}
        for key in keys:
            value = bpf.map_lookup(self.maps[OWNERS], struct.pack("<Q", key), 24)
            if value is not None:
                comm = value[:16].split(b"\0")[0].decode(errors="replace")
                found[key] = (comm, int(struct.unpack_from("<Q", value, 16)[0]))
        return found

    def cgroup_names(self, ids: Iterable[int]) -> dict[int, str]:
        """cgroup id to the last two parts of its path, as they were at the first packet."""
        found = {}
        for number in ids:
            value = bpf.map_lookup(self.maps[CGROUPS], struct.pack("<Q", number), 192)
            if value is not None:
                parts = (
                    value[at : at + 96].split(b"\0")[0].decode(errors="replace") for at in (96, 0)
                )
                found[number] = "/" + "/".join(part for part in parts if part)
        return found

    def look(self, entries: Iterable[int]) -> None:
        """Run bpf/look.h on each entry; its records come with the next poll. Raises BpfError."""
        for entry in entries:
            bpf.prog_run(self.programs["look"], (entry,))

    def run_time(self) -> int:
        """Nanoseconds spent in the programs, where the kernel measures it."""
        return sum(bpf.prog_info(fd).run_time_ns for fd in self.programs.values())

    def close(self) -> None:
        """Detach and free everything; safe to call twice."""
        fds, self._fds = self._fds, []
        for fd in reversed(fds):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.rings.close()


def filter_constants(wanted: Filter) -> Mapping[str, int]:
    """The filter as constants for bpf/ct.h: what is not asked for is not there."""
    constants: dict[str, int] = {}
    for name in ("proto", "sport", "dport", "zone", "family", "netns"):
        value = getattr(wanted, name)
        if value is not None:
            constants[f"F_{name.upper()}"] = value
    status = int(wanted.status)
    status |= Status.SRC_NAT if wanted.src_nat else 0
    status |= Status.DST_NAT if wanted.dst_nat else 0
    if status:
        constants["F_STATUS"] = int(status)
    if wanted.unreplied:
        constants["F_UNREPLIED"] = 1
    if wanted.kinds:
        constants["F_KINDS"] = sum(1 << int(kind) for kind in wanted.kinds)
    for side, network in (("SRC", wanted.src), ("DST", wanted.dst)):
        if network is None:
            continue
        constants.setdefault("F_FAMILY", 2 if network.version == 4 else 10)
        value_words, mask_words = (w.view(np.uint32).tolist() for w in network_words(network))
        if network.version == 4:  # in the kernel's union an IPv4 address comes first
            value_words = [value_words[3], 0, 0, 0]
            mask_words = [mask_words[3], 0, 0, 0]
        constants[f"F_{side}"] = 1
        for i in range(4):
            constants[f"F_{side}_VALUE{i}"] = value_words[i] & mask_words[i]
            constants[f"F_{side}_MASK{i}"] = mask_words[i]
    return constants
