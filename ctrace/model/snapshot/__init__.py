"""Everything that a view may show, as frozen dataclasses.

``None`` means unknown, and views show it as ``-``. ``ts`` is in nanoseconds since 1970, all other
moments are in seconds. A field is described where it stands, its unit first, and nowhere else:
``scripts/snapshot-page`` makes the tables of share/snapshot.md from this, and view/export/json.py
the JSON, where a lowest and highest value are an empty list instead of None.
"""

from __future__ import annotations

from ctrace.model.snapshot.causes import Cause as Cause
from ctrace.model.snapshot.causes import Remedy as Remedy
from ctrace.model.snapshot.causes import Rising as Rising
from ctrace.model.snapshot.figures import Composition as Composition
from ctrace.model.snapshot.figures import Counted as Counted
from ctrace.model.snapshot.figures import Histogram as Histogram
from ctrace.model.snapshot.figures import Percentiles as Percentiles
from ctrace.model.snapshot.figures import Rates as Rates
from ctrace.model.snapshot.figures import Reconciliation as Reconciliation
from ctrace.model.snapshot.figures import Residence as Residence
from ctrace.model.snapshot.keys import Culprit as Culprit
from ctrace.model.snapshot.keys import Ends as Ends
from ctrace.model.snapshot.keys import Holder as Holder
from ctrace.model.snapshot.keys import OwnerView as OwnerView
from ctrace.model.snapshot.keys import Tuple5 as Tuple5
from ctrace.model.snapshot.keys import Victim as Victim
from ctrace.model.snapshot.whole import History as History
from ctrace.model.snapshot.whole import Memory as Memory
from ctrace.model.snapshot.whole import Snapshot as Snapshot
from ctrace.model.snapshot.whole import Table as Table

GROUPS = (
    "who", "src", "prefix", "dst", "direction", "ports", "proto", "service", "pair", "process",
    "container", "pod", "pod-namespace", "netns",
)  # fmt: skip
"""Of culprits. ``pair`` is source to service, ``who`` the few keys of all that explain most."""

SORTS = ("held", "new", "life", "residence", "drops")
OVER_TIME = "table_seconds"  # how reports sort: not by what is held at the end
