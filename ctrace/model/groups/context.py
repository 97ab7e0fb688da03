"""What is needed to name the keys of a group, and the time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from ctrace.batch import Clock, Owner
from ctrace.model.composition import Looks
from ctrace.model.groups.passes import Passes


@dataclass
class Context:
    """What names keys."""

    owners: Mapping[int, Owner]
    cgroups: Mapping[int, str]
    listeners: Mapping[tuple[int, int, int], Owner]
    netns_name: Callable[[int], str]
    clock: Clock
    until: int
    """Boot clock, ns."""
    uptime: float
    """Seconds observed until then."""
    looks: Looks
    """Results of the latest looks at living entries, newest first."""
    gone: Mapping[int, int] = field(default_factory=dict)
    """Namespaces that have gone, and when they went (boot clock >> TIME_SHIFT)."""
    missed: Mapping[int, int] = field(default_factory=dict)
    """Records lost, by namespace."""
    stale: Collection[int] = ()
    """Namespaces whose entries were not recounted since losses."""
    passes: Passes = field(default_factory=Passes)
    ticks: int = 0
    """The number of the last interval that is over,"""
    ticked: int = 0
    """when it ended (boot clock, ns),"""
    interval: float = 1.0
    """and how many seconds it took."""
