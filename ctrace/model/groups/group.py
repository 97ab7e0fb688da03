"""The keys of a group as views show them."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, Optional

import numpy as np

from ctrace.model import histogram
from ctrace.model.groups.entries import Entries
from ctrace.model.groups.sums import way
from ctrace.model.keys.scatter import Rows
from ctrace.model.snapshot import Culprit, Ends, OwnerView, Tuple5
from ctrace.model.victims import owner_view, tuple5
from ctrace.record import TCP, Status, address_text, proto_name


class Group(Entries):
    """All keys of one grouping: sums, entries, and the rows that views show."""

    def label(self, at: int) -> str:
        """The key as shown."""
        return str(self._show(at, 0)["key"])

    def culprits(self, sort: str, limit: int) -> tuple[Culprit, ...]:
        """The first keys by a sort, as views show them."""
        return tuple(self.culprit(int(at)) for at in self.order(sort, limit))

    def culprit(self, at: int) -> Culprit:
        """One key as views show it: rows and causes share it."""
        if at not in self._rows:
            self._rows[at] = self._culprit(at)
        return self._rows[at]

    def _culprit(self, at: int) -> Culprit:
        s = {name: int(column[at]) for name, column in self.sums.items()}
        key = self.key[at]
        meta = int(key[2])
        netns = meta >> 32
        members = self._members[self._bounds[at] : self._bounds[at + 1]]
        flags, error, first, owner = self._marks(members)
        missed, stale = self._missed(netns)
        life, looked, residence = self._detail(at)
        # one or the other: together they would count entries twice
        life = looked if looked.sum() > life.sum() else life
        ended = s["destroys"]
        held = int(self.held[at])
        made_of = self.composition(at)
        assured, unreplied, closed = self._shares(at, made_of)
        tcp = not self.service(at)[0] or self.service(at)[0] == TCP
        shown = self._show(at, flags)
        samples = self._samples(at)
        destroyed_other = max(0, ended - s["expired"] - s["evicted"] - s["deleted"])
        process = shown.pop("owner", None) or self._owner(owner, meta)
        return Culprit(
            **shown,
            netns=netns,
            netns_name=self._context.netns_name(netns) if netns else "",
            held=held,
            share=held / self.total_held if self.total_held else 0.0,
            table_seconds=float(self.table_seconds[at]),
            inserts=s["inserts"],
            new_per_s=float(self.rate[at]),
            destroys=ended,
            drops=s["drops"],
            drop_per_s=float(self.drop_rate[at]),
            error=error + missed,
            stale=stale,
            older=min(max(s["older"], 0), held),
            life=self.lives(at),
            residence=self.residence(at),
            ends=Ends(s["expired"], s["evicted"], s["deleted"], destroyed_other),
            nat=_nat(flags),
            composition=made_of,
            assured=assured,
            unreplied=unreplied,
            closed=closed if tcp else None,
            distinct_src=self.sources(at),
            owner=process,
            trend=self._trend(at),
            first_seen=self._context.clock.utc(first) / 1e9 if first else None,
            life_histogram=histogram.view(life),
            residence_histogram=histogram.view(residence),
            states=made_of.states,
            ended_states=self.states(at),
            samples=samples,
        )

    def opened(self, at: int) -> tuple[str, Optional[OwnerView]]:
        """How a key's flows are translated, and the process that opened them, as its row says."""
        flags, _, _, owner = self._marks(self._members[self._bounds[at] : self._bounds[at + 1]])
        found = self._owner(owner, int(self.key[at, 2]))
        return _nat(flags), found if found and found.role == "opened" else None

    def unreplied(self, at: int) -> float:
        """The share of a key's entries that never saw a reply; 0 where it is not known."""
        return self._shares(at, self.composition(at))[1] or 0.0

    def _marks(self, members: Rows) -> tuple[int, int, int, int]:
        """Flags seen, error bound, time of the first event, latest owner."""
        flags = owner = 0
        first: Optional[int] = None
        error = 0 if len(self._parts) == 1 else self.floor
        for number, part in enumerate(self._parts):
            rows = self._row_of[members[self._level_of[members] == number]]
            if not rows.size:
                continue
            table = part.level.table
            flags |= int(np.bitwise_or.reduce(table.flags[rows]))
            times = table.first[rows]
            times = times[times > 0]
            if times.size:
                first = int(times.min()) if first is None else min(first, int(times.min()))
            owners = table.owner[rows]
            owners = owners[owners != 0]
            if owners.size:
                owner = int(owners[0])
            if number == len(self._parts) - 1 and self.name not in ("netns", "container"):
                error = int(table.error[rows].max())
        if self._beyond is not None:
            missed = self._parts[0].level.table.error[self._row_of[members]]
            error = self._beyond + int(missed.sum())
        return flags, error, first or 0, owner

    def _owner(self, owner: int, meta: int) -> Optional[OwnerView]:
        if self._said or self.name in ("netns", "container", "dst", "src"):
            return None
        found = owner_view(owner, self._context.owners, "opened")
        if found is None and self.name in ("service", "pair"):
            listener = self._listener(meta)
            if listener:
                return OwnerView(
                    listener.pid, listener.comm, listener.unit, listener.cmdline, "listens"
                )
        return found

    def _samples(self, at: int) -> tuple[Tuple5, ...]:
        found = []
        for level, slots in self._rich(at):
            for slot in slots[:3]:
                records = level.rich.samples[slot]
                found += [tuple5(record) for record in records if record["kind"]]
        return tuple(found[:3])

    def _show(self, at: int, flags: int) -> dict[str, Any]:
        name, key = self.name, self.key[at]
        if self._said or name in ("netns", "container"):
            whole = (
                self._said[at]
                if self._said
                else (
                    self._context.netns_name(int(key[2]) >> 32)
                    if name == "netns"
                    else self._names[int(key[0])]
                )
            )
            return {"key": whole, "direction": way(flags)}
        if name == "process":
            return self._show_process(at, flags)
        proto, port = self.service(at)
        service = f"{proto_name(proto)}/{port}" if port is not None else proto_name(proto)
        address = self.address(at) if name != "service" else ""
        direction = "loopback" if address and ip_address(address).is_loopback else way(flags)
        if name == "service":
            found = self._one_target(at)
            if found and ip_address(found).is_loopback:
                direction = "loopback"
            return {
                "key": service,
                "proto": proto_name(proto),
                "port": port,
                "dst": found,
                "direction": direction,
            }
        if name == "pair":
            return {
                "key": f"{address} -> {service}",
                "proto": proto_name(proto),
                "port": port,
                "src": address,
                "direction": direction,
            }
        return {"key": address, name: address, "direction": direction}

    def _one_target(self, at: int) -> str:
        """The service's address when it has just one."""
        members = self.members(at)
        if len(members) > 2:
            return ""
        found = {
            address_text(level.table.key[row, :2].tobytes())
            for level, row in members
            if level.table.key[row, :2].any()
        }
        return found.pop() if len(found) == 1 else ""

    def _show_process(self, at: int, flags: int) -> dict[str, Any]:
        key = self.key[at]
        owner, netns = int(key[0]), int(key[2]) >> 32
        role = "listens" if key[1] else "opened"
        shown = owner_view(owner, self._context.owners, role)
        if shown is not None and role == "listens":
            listener = next(
                (known for known in self._context.listeners.values() if known.key == owner), None
            )
            if listener:
                shown = OwnerView(
                    listener.pid, listener.comm, listener.unit, listener.cmdline, role
                )
        if shown is None:
            took = way(flags)
            text = "forwarded" if took == "forward" else "no local process"
            return {"key": f"({text} in {self._context.netns_name(netns)})", "direction": took}
        # What it opened and what it listens for are two rows: their keys differ, too.
        name = f"{shown.comm or '?'}[{shown.pid}]" + (" listens" if role == "listens" else "")
        return {"key": name, "owner": shown, "direction": way(flags)}


def _nat(flags: int) -> str:
    """``src``, ``dst``, both or ``no``."""
    both = (("src", Status.SRC_NAT), ("dst", Status.DST_NAT))
    return ",".join(name for name, bit in both if flags & int(bit)) or "no"
