"""The ``netfilter`` hook family: no function hooks, links around conntrack's own.

For kernels (6.4 and later) that offer neither fentry nor kprobes. Links belong to a
network namespace and keep it alive, so they are made as namespaces appear and let
go when nobody but us holds one. See bpf/netfilter_hooks.c for what each hook sees.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from ctrace.batch import Counts, HookInfo
from ctrace.capture.family import NO_OWNERS, BpfCapture
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.host import netns
from ctrace.host.netns import Namespace
from ctrace.kernel import bpf, layout, percpu, programs
from ctrace.kernel.objects import BASELINE, Objects, filter_constants
from ctrace.record import Events, Kind, Reason, empty

# IPv6 confirms on LOCAL_IN at INT_MAX - 1 (NF_IP6_PRI_LAST - 1), everything else at
# INT_MAX: the last place before all of them. Below it, room for other tracers.
PRIORITIES: Final = range(2**31 - 1 - 2, 2**31 - 1 - 66, -1)
HOOKS: Final = tuple((family, hook) for family in (2, 10) for hook in (1, 4))

RETRACT: Final = 0
"""Record kind: the candidate with this ``ct`` never entered the table."""

HOLD: Final = 0.012
"""Seconds that records wait for a possible retraction. One follows within microseconds, unless its
task is preempted between two neighbouring hooks."""

_FUNCTIONS: Final = ("nf_conntrack_free", "early_drop", "gc_worker")
_LEARNED: Final = (6, 7, 8)
"""Settings: struct net, and where the size of its table and the limit are."""
_TABLE: Final = tuple(f"/proc/sys/net/netfilter/nf_conntrack_{name}" for name in ("count", "max"))
_BASELINE: Final = 16
"""Bytes of ``struct baseline``, which begins with a flag that says whether it is valid."""
_PROGRAMS: Final = {
    "nf_confirm": (bpf.ProgType.NETFILTER, bpf.AttachType.NETFILTER),
    "nf_free": (bpf.ProgType.RAW_TRACEPOINT, bpf.AttachType.NONE),
    "nf_drop": (bpf.ProgType.RAW_TRACEPOINT, bpf.AttachType.NONE),
    "nf_baseline": (bpf.ProgType.RAW_TRACEPOINT, bpf.AttachType.NONE),
    "nf_forget": (bpf.ProgType.RAW_TRACEPOINT, bpf.AttachType.NONE),
    "look": (bpf.ProgType.RAW_TRACEPOINT, bpf.AttachType.NONE),
}


class NetfilterCapture(BpfCapture):
    """Implements :class:`ctrace.capture.family.Capture`."""

    hold = HOLD

    def __init__(self, wanted: Filter, *, ring_bytes: int = 1 << 21) -> None:
        """Load and attach what is global; :meth:`follow` attaches the namespaces.

        Raises CtraceError (BpfError) when this kernel cannot.
        """
        where = layout.running()
        if "BPF_NF_STATE" not in where:
            raise CtraceError("this kernel has no BPF netfilter links (they need 6.4)")
        ranges = [layout.function_range(name) for name in _FUNCTIONS]
        if ranges[0] is None:
            raise CtraceError(
                "nf_conntrack_free is not in /proc/kallsyms: load nf_conntrack (modprobe "
                "nf_conntrack), and check that CAP_SYSLOG is held and kptr_restrict is not 2"
            )
        code = programs.instructions(
            "netfilter_hooks.c",
            tuple(_PROGRAMS),
            {**where.constants, **filter_constants(wanted), "SLOT_BITS": programs.SLOT_BITS},
        )
        self._blind = _blind(ranges[1] is not None)
        self._refused: dict[int, str] = {}
        self.info = HookInfo(
            family="netfilter",
            attached=("netfilter confirm links", "kmem_cache_free", "kfree_skb"),
            blind=self._blind,
            evictions=ranges[1] is not None,
        )
        self._links: dict[int, list[int]] = {}
        self._learned: dict[int, tuple[int, ...]] = {}
        """By namespace: its struct net, and the addresses of its table's size and of the limit."""
        self._objects = Objects(ring_bytes)
        try:
            for name, (kind, attach_type) in _PROGRAMS.items():
                self._objects.load(name, code[name], kind, attach_type=attach_type)
            located = percpu.locate(self._objects)
            if not located.counters:
                raise CtraceError(
                    "the kernel does not tell where its per-CPU counters are, which "
                    "--hooks netfilter needs: use another hook family"
                )
            if not located.tasks:
                self._blind = (*self._blind, NO_OWNERS)
                self.info = replace(self.info, owners=False, blind=self._blind)
            settings: list[int] = []
            for found in ranges:
                start, end = found or (0, 0)
                settings += [start, end - start]
            self._objects.set(settings)
            for program, tracepoint in (("nf_free", "kmem_cache_free"), ("nf_drop", "kfree_skb")):
                fd = bpf.raw_tracepoint_open(self._objects.programs[program], tracepoint)
                self._objects.keep(fd)
        except BaseException:
            self.close()
            raise

    def poll(self) -> tuple[Events, int]:
        """New records in time order, without the candidates that lost, and how many were lost."""
        return self._objects.poll(self.hold, without_retracted)

    def counts(self) -> dict[int, Counts]:
        """Exact counters; candidates that never entered the table are subtracted."""
        found = super().counts()
        for counts in found.values():
            # NONE counts the retractions
            counts[Reason.NEW] -= counts[Reason.NONE]
            counts[Reason.NONE] = 0
        return found

    # -- namespaces ------------------------------------------------------------------------

    def follow(self, namespaces: Sequence[Namespace]) -> None:
        """Attach to namespaces not seen before; let go of those that are gone.

        ``namespaces`` must not list one that only our links keep alive: found through
        processes and mounts, none is. Raises CtraceError when the first attachment
        fails; later failures are told in ``info.blind``.
        """
        self._meet(percpu.meet(self._objects))
        current = {namespace.inum: namespace for namespace in namespaces}
        for inum in self._links.keys() - current.keys():
            self._detach(inum)
        for inum in self._refused.keys() - current.keys():
            del self._refused[inum]
        for inum in current.keys() - self._links.keys() - self._refused.keys():
            try:
                self._attach(current[inum])
            except CtraceError as error:
                if not os.path.exists(current[inum].path):
                    continue  # gone between listing and entering
                if not self._links:
                    raise
                self._refused[inum] = f"nothing in {current[inum].name} is seen: {error}"
        blind = (*self._blind, *self._refused.values())
        if blind != self.info.blind:
            self.info = replace(self.info, blind=blind)

    def _attach(self, namespace: Namespace) -> None:
        with netns.enter(namespace.path):
            # the path may by now open another namespace: processes come and go
            if netns.here() == namespace.inum:
                learned = self._baseline()
                self._links[namespace.inum] = self._link_hooks(namespace)
                self._learned[namespace.inum] = learned

    def _link_hooks(self, namespace: Namespace) -> list[int]:
        program = self._objects.programs["nf_confirm"]
        links: list[int] = []
        for family, hook in HOOKS:
            for priority in PRIORITIES:
                try:
                    links.append(bpf.link_netfilter(program, family, hook, priority))
                    break
                except bpf.BpfError as error:
                    if error.errno != errno.EBUSY:
                        self._close_links(links)
                        raise
            else:
                self._close_links(links)
                raise CtraceError(
                    f"other tracers hold every netfilter priority from {PRIORITIES[0]} down to "
                    f"{PRIORITIES[-1]} in {namespace.name}: stop one of them"
                )
        return links

    def _meet(self, fresh: Collection[int]) -> None:
        """For CPUs that came online: count the kernel's counters from now on, unless they already
        were."""
        if not fresh:
            return
        size = _BASELINE * bpf.possible_cpus()
        for inum, learned in self._learned.items():
            raw = bpf.map_lookup(self._objects.maps[BASELINE], inum.to_bytes(4, "little"), size)
            valid = np.frombuffer(raw or bytes(size), np.uint32)[:: _BASELINE // 4]
            lacking = [cpu for cpu in fresh if not valid[cpu]]
            percpu.run(self._objects.programs["nf_baseline"], learned, lacking)

    def _baseline(self) -> tuple[int, ...]:
        """Take the kernel's counters of the entered namespace as the baseline, CPU by CPU.

        Returns its struct net, and the addresses of its table's size and of the limit.
        """
        program = self._objects.programs["nf_baseline"]
        files = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in _TABLE]
        try:
            bpf.prog_run(program, (0, *files))
        finally:
            for fd in files:
                os.close(fd)
        learned = tuple(self._objects.setting(index) for index in _LEARNED)
        percpu.run(program, learned, self._objects.cpus)
        return learned

    def _detach(self, inum: int) -> None:
        percpu.run(self._objects.programs["nf_forget"], (inum,), bpf.online_cpus())
        self._close_links(self._links.pop(inum))
        del self._learned[inum]
        bpf.map_delete(self._objects.maps[BASELINE], inum.to_bytes(4, "little"))

    @staticmethod
    def _close_links(links: Iterable[int]) -> None:
        for fd in links:
            os.close(fd)

    def close(self) -> None:
        """Detach everything; safe to call twice."""
        links, self._links = self._links, {}
        for fds in links.values():
            self._close_links(fds)
        super().close()


def without_retracted(events: Events) -> Events:
    """Drop each candidate that the next record of its entry retracts, and the retractions.

    An entry's records come as INSERT, then DESTROY; or INSERT (INSERT_FAILED) RETRACT
    when the table refused it or the packet went on with another entry.
    """
    if not len(events):
        return events
    kinds = events["kind"]
    retractions = kinds == RETRACT
    if not retractions.any():
        return events
    related = np.flatnonzero(np.isin(events["ct"], events["ct"][retractions]))
    order = related[np.argsort(events["ct"][related], kind="stable")]
    entry, kind = events["ct"][order], kinds[order]
    followed = np.zeros(len(order), bool)
    followed[:-1] = (entry[1:] == entry[:-1]) & np.isin(
        kind[1:], (RETRACT, int(Kind.INSERT_FAILED))
    )
    keep = ~retractions
    keep[order[followed & (kind == int(Kind.INSERT))]] = False
    return events[keep] if keep.any() else empty()


def _blind(evictions: bool) -> tuple[str, ...]:
    """What this family cannot see, as plain sentences."""
    blind = [
        "entries created by conntrack -I, act_ct, Open vSwitch or a BPF program, until they end",
        "whether a refused packet that came in was to be forwarded",
        "NAT clashes: they look like ordinary inserts",
        "inserts in a new namespace's first tenth of a second (first second, if no name is mounted "
        "for it): those entries are listed as older ones",
    ]
    if "PROC_SYSCTL_ENTRY" not in layout.running():
        blind.append("a packet refused for lack of memory looks like one refused by a full table")
    if not evictions:
        blind.append("evictions by early_drop look like other deletions: no symbol early_drop")
    return tuple(blind)
