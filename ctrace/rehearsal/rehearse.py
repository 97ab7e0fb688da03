"""One service, one lever: every conversation and stray without it and with it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from ipaddress import ip_address
from itertools import zip_longest
from typing import Final, Optional

from ctrace.host import ctnetlink
from ctrace.plan.plan import Notrack
from ctrace.record import PROTO_NUMBERS, Events, Status
from ctrace.rehearsal import compare, talks
from ctrace.rehearsal.compare import BREAKS, OPENS, OWN, Difference
from ctrace.rehearsal.constants import evenly
from ctrace.rehearsal.flows import by_role, counted, entries, of_table, some
from ctrace.rehearsal.play import REST, SERVER_NEXT, Run, Steps, Talk, by_their_users, play, throw
from ctrace.rehearsal.room import Learned, Ours, Room, Setting, ours
from ctrace.rehearsal.stage import Outcome, Stage, on_one_processor
from ctrace.ruleset.notrack import far_ports

Flow = tuple[str, bytes, int, bytes, int]
"""Of the table: (role, source, port, destination, port)."""
MOST_TURNED: Final = 400
"""Conversations for which conditions change while they are open."""
EPHEMERAL: Final = 32768
"""First of the ports that most systems give to connections (ip_local_port_range)."""
CARRIED_S: Final = 600
"""Seconds. Timeout of an entry made before the rules go: longer than any rehearsal."""


@dataclass
class Tracked:
    """How everything fares without the lever, under one setting."""

    runs: list[Run]
    again: list[Run]
    strays: list[Optional[Outcome]]
    entries: Events


@dataclass
class Found:
    """The results of rehearsing one lever."""

    differences: list[Difference] = field(default_factory=list)
    entries: tuple[int, int] = (0, 0)
    """Of the service: tracked, and with the lever."""
    settings: dict[int, Setting] = field(default_factory=dict)
    """By a difference's id: the setting under which it appeared."""
    resets: list[Talk] = field(default_factory=list)
    """Conversations opened untracked that do not survive the end of the lever."""
    cut: list[Talk] = field(default_factory=list)
    """Conversations opened tracked that do not survive its start."""
    unlearned: list[str] = field(default_factory=list)
    """Sets that its packets fill otherwise, and that rules ask."""

    def of(self, kind: str) -> list[Difference]:
        """Those of a kind."""
        return [one for one in self.differences if one.kind == kind]


class Service:
    """One service's rehearsals."""

    def __init__(
        self,
        room: Room,
        proto: str,
        port: int,
        ephemeral: tuple[int, int],
        flows: Sequence[Flow],
        *,
        picked: bool = False,
    ) -> None:
        """``picked``: the kernel may give the port to this host's own calls. Raises CtraceError."""
        self.room, self.proto, self.port, self.picked = room, proto, port, picked
        number = PROTO_NUMBERS[proto]
        with room.stage(Setting()) as stage:
            seen = dict.fromkeys(a for _, src, _, dst, _ in flows for a in (src, dst))
            self.cast = talks.cast(room.snapshot, stage, room.names, seen, port)
        plot = talks.Plot(room.snapshot, self.cast, number, port, ephemeral)
        known = of_table(flows, number, port, self.cast, room.names)
        self.talks = plot.talks(room.names, known)
        if len(self.cast.uids) > 1:
            with on_one_processor(), room.stage(Setting()) as stage:
                self.talks = by_their_users(stage, self.talks, self.cast.uids)
        self.strays = plot.strays()
        self.left_out = self.cast.left_out, plot.ports_left_out
        """Addresses and ports named in rules that are represented by others like them."""
        self._tracked: dict[Setting, Tracked] = {}
        self._learned: dict[tuple[str, ...], Learned] = {}
        self.helped = False
        """Whether a rule gives its connections a conntrack helper."""

    @property
    def table_flows(self) -> tuple[int, int]:
        """Flows of the host's table, and how many of these are stood for by others."""
        kin = [talk.kin for talk in self.talks if talk.known]
        return len(kin) + sum(kin), sum(kin)

    @cached_property
    def usual(self) -> Setting:
        """The first setting, or another in which more of its conversations pass: where a limit
        drops what is over it, none do while every limit is over."""

        def mine(setting: Setting) -> list[Run]:
            return [run for run in self.tracked(setting).runs if run.talk.dport == self.port]

        settings = self.room.settings()
        runs = mine(settings[0])
        if any(run.first for run in runs) and all(run.first for run in runs if run.talk.known):
            return settings[0]
        return max(settings, key=lambda one: sum(run.first is not None for run in mine(one)))

    def tracked(self, setting: Setting) -> Tracked:
        """How all conversations fare without our rules; twice, where something is random."""
        if setting not in self._tracked:
            turns = setting.later is not None
            with self.room.stage(setting) as stage:
                runs = self.played(stage, setting, None)
                left = self._entries(stage)
                served = (left["dport"] == self.port) | (left["reply_sport"] == self.port)
                self.helped |= bool((left["status"][served] & Status.HELPER).any())
                strays = [end for end, _ in throw(stage, [] if turns else self.strays)]
            again: list[Run] = []
            if not turns and (self.room.names.nat or self.room.settings() != [Setting()]):
                with self.room.stage(setting) as stage:
                    again = play(stage, self.talks, self.room.whole)
            self._tracked[setting] = Tracked(runs, again, strays, left)
        return self._tracked[setting]

    def played(
        self,
        stage: Stage,
        setting: Setting,
        rules: Optional[Ours],
        some: Optional[Sequence[Talk]] = None,
    ) -> list[Run]:
        """All conversations, or some: under a setting that turns only those with the service."""
        if setting.later is None:
            return play(stage, self.talks if some is None else some, self.room.whole)
        if some is None:
            some = evenly([t for t in self.talks if t.dport == self.port], MOST_TURNED)
        return play(stage, some, self.room.rest, lambda: self.room.turn(stage, setting, rules))

    def with_lever(self, lever: Notrack, backend: str, settings: Sequence[Setting] = ()) -> Found:
        """Everything, with the very rules that would be applied. Raises CtraceError."""
        found = Found()
        rules = ours(lever, backend)
        trusted = self._trusted(lever)
        with on_one_processor():
            for setting in settings or [*self.room.settings(), *self.room.turns()]:
                before = self.tracked(setting)
                thrown = self.strays if setting.later is None else []
                with self.room.stage(setting, rules) as stage:
                    after = self.played(stage, setting, rules)
                    if setting == self.usual:
                        found.entries = (
                            counted(before.entries, self.talks, lever),
                            counted(self._entries(stage), self.talks, lever),
                        )
                    ends = [end for end, _ in throw(stage, thrown)]
                if setting == self.usual:
                    found.unlearned = self._unlearned(lever, rules)
                if lever.shared:  # what others' connections taught the rules is not for ours
                    after = self._apart(setting, rules, after)
                welcome = {
                    (r.talk.client, r.talk.server, r.talk.dport) for r in before.runs if r.first
                }
                new = compare.runs(
                    before.runs,
                    after,
                    before.again,
                    hears_mark=self.room.snapshot.hears_mark,
                    drawn=self.room.draws and setting.draw,
                    trusted=trusted,
                )
                new += compare.strays(thrown, before.strays, ends, welcome, trusted)
                plain = {r.talk for r in before.runs if r.first is None or r.untranslated}
                new = [replace(d, kind=OWN) if self._never_so_far(d, plain) else d for d in new]
                have = {(d.what, d.kind) for d in found.differences}
                for one in new:
                    if (one.what, one.kind) not in have:
                        found.differences.append(one)
                        found.settings[id(one)] = setting
        return found

    def _unlearned(self, lever: Notrack, rules: Ours) -> list[str]:
        """Sets in which its own conversations leave other elements: those in its roles alone, for
        others with the same hosts stay tracked, and would leave the same."""
        if not self.room.learns:
            return []
        if lever.roles not in self._learned:
            self._learned[lever.roles] = self._leaves(lever.roles, None)
        other = self._leaves(lever.roles, rules) ^ self._learned[lever.roles]
        return sorted({name for name, _ in other})

    def _leaves(self, roles: Collection[str], rules: Optional[Ours]) -> Learned:
        mine = [t for t in self.talks if t.dport == self.port != t.sport and t.role in roles]
        with self.room.stage(self.usual, rules) as stage:
            self.played(stage, self.usual, rules, mine)
            return self.room.learned(stage)

    def loses_path_mtu(self, lever: Notrack, backend: str) -> bool:
        """Whether errors of routers about packets of the service no longer arrive: tried with one
        conversation of each role, family and way."""
        kinds: dict[tuple[object, ...], Run] = {}
        for run in self.tracked(self.usual).runs:
            talk = run.talk
            if talk.role in lever.roles and talk.dport == self.port and _errors(run):
                key = talk.role, len(talk.client), talk.client_at, talk.server_at
                kinds.setdefault(key, run)
        before = list(kinds.values())
        rules = ours(lever, backend)
        with on_one_processor(), self.room.stage(self.usual, rules) as stage:
            after = play(stage, [run.talk for run in before], self.room.whole)
        return compare.lost(before, after, "path MTU error")

    def _never_so_far(self, one: Difference, plain: Collection[object]) -> bool:
        """Whether it concerns a call from the service's port of which the table has none: no kernel
        picks that port unless asked for it. ``plain``: conversations that are not translated."""
        what = one.what
        if isinstance(what, Talk):
            own, fits = what.role == "client", self._imagined(what, plain)
        else:
            own, fits = False, what.dst not in {address for address, _ in self.cast.local}
            fits = fits and what.sport == self.port != what.dport and self.port < EPHEMERAL
        return fits and (one.kind == BREAKS or (own and one.kind == OPENS and self.proto == "udp"))

    def _imagined(self, talk: Talk, plain: Collection[object]) -> bool:
        """Whether it is a call from the service's port of which the table has none."""
        return (
            talk in plain
            and not talk.known
            and talk.role in ("forward", "client")
            and talk.sport == self.port != talk.dport
            and self.port < EPHEMERAL
            and not (talk.role == "client" and self.picked)
        )

    def _trusted(self, lever: Notrack) -> compare.Trusted:
        """Whether a datagram passes for an answer to a client, from the servers that it names."""
        peers = {ip_address(peer).packed for peer in lever.peers}
        mine = {address for address, _ in self.cast.local}

        def trusted(src: bytes, dst: bytes, ports: tuple[int, int]) -> bool:
            role = "client" if dst in mine else "forward"
            low, high = far_ports(lever, role) or (0, -1)
            known = role in lever.roles and src in peers and ports[0] == self.port
            return known and low <= ports[1] <= high

        return trusted

    def _apart(self, setting: Setting, rules: Ours, after: Sequence[Run]) -> list[Run]:
        """Runs in which this host's own calls are on a stage of their own."""
        own = [run.talk for run in after if run.talk.role in ("client", "loopback")]
        with self.room.stage(setting, rules) as stage:
            again = {run.talk: run for run in self.played(stage, setting, rules, own)}
        return [again.get(run.talk, run) for run in after]

    def servers(self, roles: Collection[str]) -> set[bytes]:
        """Other hosts that flows in the table reach under their own address, in these roles."""
        return {
            run.talk.server
            for run in self.tracked(self.usual).runs
            if run.talk.known
            and run.talk.role in roles
            and run.talk.role in ("client", "forward")
            and run.talk.dport == self.port
            and run.untranslated
        }

    def translates(self) -> bool:
        """Whether any of the table's flows is translated in the rehearsal."""
        return any(
            run.talk.known and run.first is not None and not run.untranslated
            for run in self.tracked(self.usual).runs
        )

    def moved(self) -> set[Talk]:
        """Conversations that a translation leads to this host, though it has not the address."""
        return {
            run.talk
            for run in self.tracked(self.usual).runs
            if run.first is not None and run.first.way == "in" and run.first.dst != run.talk.server
        }

    def own_ports(self) -> bool:
        """Whether this host's calls leave from ports that a translation chose at random."""
        found = self.tracked(Setting())
        return any(
            run.talk.role == "client"
            and run.first is not None
            and twin.first is not None
            and run.first.sport not in (run.talk.sport, twin.first.sport)
            for run, twin in zip_longest(found.runs, found.again or found.runs)
        )

    def _entries(self, stage: Stage) -> Events:
        return entries(stage.space.path, PROTO_NUMBERS[self.proto], self.port)

    def entries_by_role(self) -> dict[str, str]:
        """What each role leaves without rules of ours (flows.by_role). Raises CtraceError."""
        with on_one_processor():
            tracked = self.tracked(self.usual)
        return by_role(tracked.runs, tracked.entries, self.port)

    def coming_and_going(self, lever: Notrack, backend: str, found: Found) -> None:
        """What the rules do to conversations that are open when they come, and when they go.

        Before they go, entries are made for this host's own open connections, as undo does.
        """
        rules = ours(lever, backend)
        own = [
            ctnetlink.Flow(t.client, t.server, t.sport, t.dport)
            for t in self.talks
            if t.proto == PROTO_NUMBERS["tcp"]
            and t.dport == self.port
            and t.role in lever.roles
            and t.role != "forward"
        ]
        with on_one_processor():
            works = some(
                [r.talk for r in self.tracked(self.usual).runs if len(r.outcomes) > 3 and r.whole]
            )
            for rest in (dict(REST), dict(SERVER_NEXT)):
                found.cut += self._changed(works, rules, rest)
                found.resets += self._changed(works, rules, rest, own)
        plain = {r.talk for r in self.tracked(self.usual).runs if r.untranslated}
        found.cut = [t for t in found.cut if not self._imagined(t, plain)]
        if lever.shared:
            found.cut = [t for t in found.cut if t.known or t.sport != self.port]

    def _changed(
        self,
        works: Sequence[Talk],
        rules: Ours,
        rest: Steps,
        carried: Optional[Sequence[ctnetlink.Flow]] = None,
    ) -> list[Talk]:
        """Conversations that are lost when the rules come; with ``carried``, the entries that are
        made before, when they go."""
        go = carried is not None
        with self.room.stage(self.usual, rules, untracked=go) as stage:

            def change() -> None:
                if carried:
                    ctnetlink.insert(stage.space.path, carried, CARRIED_S)
                stage.run(rules.track if go else rules.untrack)

            runs = play(stage, works, rest, change)
        return [run.talk for run in runs if not run.whole]


def _errors(run: Run) -> bool:
    """Whether an error of a router arrived in it."""
    return any(
        step.who in "CS" and isinstance(end, Outcome)
        for step, end in zip_longest(run.steps, run.outcomes)
    )
