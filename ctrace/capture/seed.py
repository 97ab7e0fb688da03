"""The table as it was when the hooks came on: a dump, freed of what events already tell.

A dump takes time, and is read after the hooks are in place, so an entry may be in
both. What an entry's *first* event says settles it:

- INSERT: it was not there before; a row of the dump is that same new entry.
- DESTROY: it was there before, also when the dump came too late to see it.
- none: it was there before if the dump has it.

With that, existing + inserts - destroys is the table at the end of ``events``, entry
by entry, provided that ``events`` holds everything from the hooks' start to after the
end of the dump.
"""

from __future__ import annotations

import numpy as np

from ctrace.record import RECORD, Events, Kind, Reason, identity, words


def seed(existing: Events, events: Events, at: int, *, same_ids: bool = False) -> Events:
    """The entries older than the hooks, as EXISTING records with time ``at``.

    ``existing`` is a dump (also of several namespaces, one after another), ``events``
    everything captured since ``at``, in time order. The result's ``ct`` is the one that
    the entry's DESTROY carries where that was seen; else 0, or the dump's with
    ``same_ids`` (when events come from ctnetlink too). Owner fields are zero.

    An entry is known by both its tuples, protocol, zone and namespace: after a NAT
    clash two entries share the original one.
    """
    ends = (events["kind"] == Kind.INSERT) | (events["kind"] == Kind.DESTROY)
    told = words(events)[ends]
    rows = np.concatenate([told, words(existing)])
    _, first = np.unique(identity(rows), return_index=True)
    first.sort()
    out: Events = rows[first].view(RECORD).reshape(-1)
    out = out[out["kind"] != Kind.INSERT]  # a copy
    dumped = out["kind"] == Kind.EXISTING
    if not same_ids:
        out["ct"][dumped] = 0
    out["ts"] = at
    out["kind"] = Kind.EXISTING
    out["reason"] = Reason.NONE
    out["owner"] = 0
    out["cgroup"] = 0
    return out
