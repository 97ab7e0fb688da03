"""Turns a lever that breaks something into one that does not: accepts, one more role, others'
ports.

Every attempt is rehearsed; what the kernel does not confirm is not proposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import ip_address
from itertools import zip_longest
from typing import Final, Optional

from ctrace.errors import CtraceError
from ctrace.plan.plan import MAX_ACCEPTS, Notrack
from ctrace.rehearsal.compare import BREAKS, OPENS, OWN, Difference
from ctrace.rehearsal.play import ERRORS, Run, Talk, throw
from ctrace.rehearsal.rehearse import Found, Service
from ctrace.rehearsal.room import Setting, ours
from ctrace.rehearsal.stage import Hit, on_one_processor
from ctrace.rehearsal.ways import legacy
from ctrace.rehearsal.ways.place import Map, Need, Place, candidates, of_stage
from ctrace.ruleset.model import Ruleset

ROUNDS: Final = 8
MAX_PEERS: Final = 64
"""Servers that rules list one by one, at most."""
Ways = Sequence[Sequence[Hit]]
"""By step."""
AT_ONCE: Final = 6
"""Differences examined closely in one round."""


@dataclass
class Settled:
    """The best lever found, and the differences that remain with it."""

    lever: Notrack
    found: Found
    reasons: dict[str, str] = field(default_factory=dict)
    """By the accept's place: what would drop the packet that it lets in."""
    path_mtu: bool = False
    """Whether path MTU discovery depends only on the rules about ICMP errors."""
    deciders: list[tuple[Difference, str]] = field(default_factory=list)
    """The remaining differences, each with the rule that decides it, in words."""
    counts: bool = False
    """Whether any remains because limits and the like are asked about each packet then."""
    lacks_nft: bool = False
    """Whether rules of nftables might spare what breaks: connections that share the port."""


class Mender:
    """Works on one service's lever."""

    def __init__(self, service: Service, ruleset: Optional[Ruleset], backend: str) -> None:
        self._service, self._ruleset, self._backend = service, ruleset, backend
        self._reasons: dict[str, str] = {}
        self._lacks_nft = False

    def settle(self, lever: Notrack) -> Settled:
        """Mend until nothing breaks any more, a mend would open something, or none helps.

        Raises CtraceError.
        """
        found = self._service.with_lever(lever, self._backend)
        best = lever, found
        for _ in range(ROUNDS):
            better = self._sharing(lever, found) or self._narrower(lever, found)
            if better is None and (found.of(OPENS) or not _talks(found, BREAKS)):
                break
            better = better or self._accepting(lever, found)
            if better is None or len(better.accepts) > MAX_ACCEPTS:
                break
            lever, found = better, self._service.with_lever(better, self._backend)
            best = lever, found
        lever, found = self._sparing(*best)
        if not found.of(OPENS) and not found.of(BREAKS):
            self._service.coming_and_going(lever, self._backend, found)
        deciders = self._deciders(lever, found)
        path_mtu = self._needs_icmp(lever)
        counts = any(
            found.settings[id(one)].later is not None
            for kind in (BREAKS, OPENS)
            for one in found.of(kind)
        )
        return Settled(lever, found, self._reasons, path_mtu, deciders, counts, self._lacks_nft)

    def _sparing(self, lever: Notrack, found: Found) -> tuple[Notrack, Found]:
        """The lever that leaves calls from the service's port tracked: those of others, and those
        of this host to which a translation gives random ports."""
        if lever.shared or found.of(OPENS) or found.of(BREAKS):
            return lever, found
        lot = "server" in lever.roles and self._service.own_ports()
        if self._backend != "nft":
            self._lacks_nft |= lot
            return lever, found
        if not lot and (lever.proto != "tcp" or not found.of(OWN)):
            return lever, found
        for icmp in dict.fromkeys((lever.icmp and not lot, False)):
            sparing = replace(lever, shared=True, icmp=icmp)
            tried = self._service.with_lever(sparing, self._backend)
            if not tried.of(OPENS) and not tried.of(BREAKS):
                return sparing, tried
        return lever, found

    def _needs_icmp(self, lever: Notrack) -> bool:
        if not lever.icmp:
            return False
        return self._service.loses_path_mtu(replace(lever, icmp=False), self._backend)

    def _narrower(self, lever: Notrack, found: Found) -> Optional[Notrack]:
        """A narrower lever, without packets of other servers and clients that the service has
        nothing to do with."""
        wrong = [*found.of(OPENS), *found.of(BREAKS)]
        if lever.icmp and any(d.name in ERRORS and d.how == "translated" for d in wrong):
            return replace(lever, icmp=False)  # it is about somebody else's, translated flow
        if lever.peers or not {"client", "forward"} & set(lever.roles):
            return None
        servers = self._service.servers(lever.roles)
        mine = {address for address, _ in self._service.cast.local}
        for one in wrong:
            what = one.what
            if isinstance(what, Talk):  # accepts may mend calls of its own that are only refused
                to, own = what.server, what.role == "client" and one.kind == OPENS
                of_ours = own or what.role == "forward"
            else:
                to, of_ours = what.dst, what.dst not in mine
            if of_ours and (to not in servers or what.sport == self._service.port):
                peers = tuple(sorted(str(ip_address(server)) for server in servers))
                return replace(lever, peers=peers) if 0 < len(peers) <= MAX_PEERS else None
        return None

    def _sharing(self, lever: Notrack, found: Found) -> Optional[Notrack]:
        """For others' connections made from the service's port, or translated to it: accepts could
        not mend those, because half of each is untracked."""
        if lever.shared:
            return None
        port, served = self._service.port, "server" in lever.roles
        moved = self._service.moved()
        for one in (*found.of(OPENS), *found.of(BREAKS)):
            what = one.what
            talk = isinstance(what, Talk)
            other = what.sport == port or (talk and (what.dport != port or what in moved))
            if other and (lever.proto == "tcp" or (served and talk)):
                if self._backend != "nft":
                    self._lacks_nft = True
                    return None
                # ICMP errors don't show which flow they quote: no rule of a served port may catch
                # them.
                return replace(lever, shared=True, icmp=lever.icmp and not served)
        return None

    def _accepting(self, lever: Notrack, found: Found) -> Optional[Notrack]:
        """The lever with more accepts; None when none helps."""
        kinds: dict[tuple[object, ...], Difference] = {}
        for one in found.of(BREAKS):
            if isinstance(one.what, Talk) and one.how == "lost":
                key = (
                    one.what.role,
                    one.name,
                    len(one.what.client),
                    one.what.client_at,
                    one.what.server_at,
                    one.what.uid,
                    one.what.answering,
                    found.settings[id(one)],
                )
                kinds.setdefault(key, one)
        better = lever
        for one in list(kinds.values())[:AT_ONCE]:
            setting = found.settings[id(one)]
            assert isinstance(one.what, Talk)
            more = self._accept_for(better, one.what, setting)
            if more is not None:
                better = more
        return better if better != lever else None

    def _accept_for(self, lever: Notrack, talk: Talk, setting: Setting) -> Optional[Notrack]:
        role = talk.role
        if role not in lever.roles or self._service.port != talk.dport:
            return None
        with on_one_processor():
            before, tracked = self._looked(setting, None, talk)
            after, untracked = self._looked(setting, lever, talk)
            at = _lost(before, after)
            if at is None:
                return None
            for (known, ways), (there, lost) in zip_longest(tracked, untracked):
                need = _need(before, at, role, self._service, ways, lost)
                for accept in candidates(need, known, there):
                    better = replace(lever, accepts=(*lever.accepts, accept))
                    dropped = there.dropped(need.untracked)[-1].hits[-1]
                    if accept not in lever.accepts and self._helps(
                        better, talk, setting, at, there.place(dropped)
                    ):
                        where = there.where(dropped, self._service.port)
                        self._reasons.setdefault(where, before.steps[at].name)
                        return better
        return None

    def _looked(
        self, setting: Setting, lever: Optional[Notrack], talk: Talk
    ) -> tuple[Run, list[tuple[Map, Ways]]]:
        """A conversation, and its ways through nf_tables and legacy tables."""
        rules = ours(lever, self._backend) if lever else None
        with self._service.room.stage(setting, rules, traced=True) as stage:
            if not self._service.room.snapshot.legacy:
                run = self._service.played(stage, setting, rules, [talk])[0]
                return run, [(of_stage(stage, self._ruleset, run.ways), run.ways)]
            turn = partial(self._service.room.turn, stage, setting, rules, silent=True)
            between = None if setting.later is None else turn
            run, ways, tables = legacy.ways(stage, talk, self._service.room.whole, between)
            return run, [
                (of_stage(stage, self._ruleset, run.ways), run.ways),
                (legacy.known(tables, self._ruleset), ways),
            ]

    def _helps(self, lever: Notrack, talk: Talk, setting: Setting, at: int, dropped: Place) -> bool:
        """Whether the packet now passes, or gets as far as another chain that drops it."""
        try:
            run, looked = self._looked(setting, lever, talk)
        except CtraceError:  # a rule that the tool does not take
            return False
        if len(run.outcomes) > at and run.outcomes[at] is not None:
            return True
        ends = [
            p.place
            for known, ways in looked
            if len(ways) > at
            for p in known.passages(ways[at])
            if p.verdict == 0
        ]
        return bool(ends) and ends[-1] != dropped

    def _deciders(self, lever: Notrack, found: Found) -> list[tuple[Difference, str]]:
        """The rule that decides each of the gravest differences, one of a kind."""
        kinds: dict[tuple[object, ...], Difference] = {}
        for kind in (OPENS, BREAKS):
            for one in found.of(kind):
                role = one.what.role if isinstance(one.what, Talk) else "stray"
                kinds.setdefault((kind, role, one.how, one.name), one)
        out = []
        for one in list(kinds.values())[:4]:
            setting = found.settings[id(one)]
            out.append((one, self._decider(lever, one, setting)))
        return out

    def _decider(self, lever: Notrack, one: Difference, setting: Setting) -> str:
        """What drops, stops or translates it, in words; empty when the trace does not show it."""
        with_it = lever if one.how == "lost" else None
        port = self._service.port
        with on_one_processor():
            if isinstance(one.what, Talk):
                _, looked = self._looked(setting, with_it, one.what)
            else:
                rules = ours(lever, self._backend) if with_it else None
                with self._service.room.stage(setting, rules, traced=True) as stage:
                    way = [throw(stage, [one.what])[0][1]]
                    looked = [(of_stage(stage, self._ruleset, way), way)]
        for known, ways in looked:
            if one.how == "translated":
                every = [hit for way in ways[: one.step + 1] for hit in way]
                nat = [
                    p
                    for p in known.passages(every)
                    if "nat" in self._type(p.place) and p.hits[-1].kind == 3
                ]
                if nat:
                    return known.where(nat[-1].hits[-1], port)
            elif one.step < len(ways):
                dropped = known.dropped(ways[one.step])
                if dropped:
                    return known.where(dropped[-1].hits[-1], port)
        return ""

    def _type(self, place: tuple[str, str, str]) -> str:
        for chain in self._ruleset.chains if self._ruleset else ():
            if (chain.family, chain.table, chain.name) == place:
                return chain.type + chain.table
        return ""


def _talks(found: Found, kind: str) -> list[Talk]:
    return [one.what for one in found.of(kind) if isinstance(one.what, Talk)]


def _lost(before: Run, after: Run) -> Optional[int]:
    for at, step in enumerate(before.steps):
        del step
        x = before.outcomes[at]
        y = after.outcomes[at] if at < len(after.outcomes) else "-"
        if y is None and x is not None and x != "-":
            return at
    return None


def _need(
    before: Run, at: int, role: str, service: Service, tracked: Ways, untracked: Ways
) -> Need:
    step = before.steps[at]
    flow = "icmp" if step.who in "CS" else "to" if step.who == "c" else "from"
    opening = tracked[0] if flow == "to" and at else ()
    return Need(tracked[at], opening, untracked[at], role, flow, service.proto, service.port)
