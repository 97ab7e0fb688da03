"""One service, one lever: every conversation and stray without it and with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from itertools import zip_longest
from typing import Final, Optional

from ctrace.change.plan import Notrack, alone
from ctrace.host import ctnetlink
from ctrace.host.rawlink import split
from ctrace.record import MAPPED_PREFIX, PROTO_NUMBERS, Events, Status
from ctrace.rehearsal import compare, constants, forced, nft_copy, talks
from ctrace.rehearsal.compare import Difference
from ctrace.rehearsal.nft_copy import CHAIN, ELEMENT, OBJECT, RULE, SET, TABLE, Thing
from ctrace.rehearsal.play import REST, SERVER_NEXT, Run, Steps, Stray, Talk, play, throw
from ctrace.rehearsal.snapshot import Snapshot
from ctrace.rehearsal.stage import Outcome, Script, Stage, on_one_processor
from ctrace.ruleset import notrack_iptables, notrack_nft
from ctrace.ruleset.model import Ruleset
from ctrace.ruleset.notrack import TABLE as OUR_TABLE
from ctrace.ruleset.notrack import TAG

Flow = tuple[str, bytes, int, bytes, int]
"""Of the table: (role, source, port, destination, port)."""
CARRIED_S: Final = 600
"""Timeout of an entry that is made before the rules go: longer than any rehearsal."""
XT: Final = tuple((tool, family) for tool in ("iptables-nft", "iptables-legacy")
                  for family in ("ip", "ip6"))  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a stage is like beside the snapshot."""

    answer: bool = True
    """What conditions that depend on more than a packet say."""
    draw: bool = True
    """Whether translations draw ports by lot."""
    late_first: bool = False
    """Chains of one priority registered the other way round."""


@dataclass
class Tracked:
    """How everything fares without the lever, under one setting."""

    runs: list[Run]
    again: list[Run]
    strays: list[Optional[Outcome]]
    entries: Events


@dataclass
class Found:
    """What a rehearsal of one lever showed."""

    differences: list[Difference] = field(default_factory=list)
    entries: tuple[int, int] = (0, 0)
    """Of the service: tracked, and with the lever."""
    settings: dict[int, Setting] = field(default_factory=dict)
    """By a difference's id: under which setting."""
    resets: list[Talk] = field(default_factory=list)
    """Conversations opened untracked that do not outlive the lever."""
    cut: list[Talk] = field(default_factory=list)
    """Conversations opened tracked that do not survive its coming."""

    def of(self, kind: str) -> list[Difference]:
        """Those of a kind."""
        return [one for one in self.differences if one.kind == kind]


class Room:
    """A namespace's snapshot, and what all services in it share."""

    def __init__(self, snapshot: Snapshot, ruleset: Optional[Ruleset]) -> None:
        """Raises CtraceError when there can be no stage."""
        self.snapshot = replace(snapshot, nft=_without_ours(snapshot.nft),
                                legacy=_legacy_without_ours(snapshot.legacy))  # fmt: skip
        self.names = constants.named(self.snapshot, ruleset)
        self._known: list[tuple[str, str]] = []
        self._needs = forced.needs(self.snapshot.nft)
        self._batches: dict[tuple[object, ...], nft_copy.Batch] = {}
        old = [text for _, text in self.snapshot.legacy]
        self._depends = self._needs.depends or any(
            forced.legacy(text, True) != forced.legacy(text, False) for text in old
        )
        self.draws = self._needs.draws or any(
            forced.legacy(text, True) != forced.legacy(text, True, draw=False) for text in old
        )
        self._orders = nft_copy.equal_priorities(self.snapshot.nft)
        with self.stage(Setting()) as stage:
            self.gaps = [*snapshot.gaps, *stage.gaps]

    def settings(self) -> list[Setting]:
        """Under which everything is rehearsed: ports are drawn in the first, compared in others."""
        found, kept = [Setting()], Setting(draw=not self.draws)
        if self._depends:
            found.append(replace(kept, answer=False))
        if self.draws:
            found.append(kept)
        if self._orders:
            found.append(replace(kept, late_first=True))
        return found

    def stage(
        self, setting: Setting, scripts: Sequence[Script] = (), *, untracked: bool = False,
        traced: bool = False,
    ) -> Stage:  # fmt: skip
        """A stage. Raises CtraceError."""
        legacy = tuple(
            (family, forced.legacy(text, setting.answer, untracked=untracked, draw=setting.draw))
            for family, text in self.snapshot.legacy
        )
        snapshot = replace(self.snapshot, legacy=legacy)
        rules = self._rules(setting, untracked)
        return Stage(snapshot, scripts, rules, self._known, traced=traced)

    def _rules(self, setting: Setting, untracked: bool) -> nft_copy.Batch:
        """nftables as a setting wants it, prepared once."""
        apart = untracked and self._needs.counts
        key = (setting.late_first, self._needs.changes and (setting.answer, setting.draw, apart))
        if key not in self._batches:
            change = None
            if self._needs.changes:
                change = forced.change(setting.answer, untracked=apart, draw=setting.draw)
            things = self.snapshot.nft
            if setting.late_first:
                things = nft_copy.late_first(things)
            self._batches[key] = nft_copy.batch(things, change)
        return self._batches[key]


class Service:
    """One service's rehearsals."""

    def __init__(
        self, room: Room, proto: str, port: int, ephemeral: tuple[int, int],
        flows: Sequence[Flow],
    ) -> None:  # fmt: skip
        """Raises CtraceError."""
        self.room, self.proto, self.port = room, proto, port
        number = PROTO_NUMBERS[proto]
        with room.stage(Setting()) as stage:
            seen = dict.fromkeys(a for _, src, _, dst, _ in flows for a in (src, dst))
            self.cast = talks.cast(room.snapshot, stage, room.names, seen)
        plot = talks.Plot(room.snapshot, self.cast, number, port, ephemeral)
        self.talks = plot.talks(room.names, talks.of_table(flows, number, port, self.cast))
        self.strays = plot.strays()
        self.left_out = self.cast.left_out, plot.ports_left_out
        """Addresses and ports that rules name, for which others of their kind stand."""
        self._tracked: dict[Setting, Tracked] = {}
        self.helped = False
        """Whether a rule gives its connections a conntrack helper."""

    def tracked(self, setting: Setting) -> Tracked:
        """How all fare without rules of ours; twice, where something is drawn by lot."""
        if setting not in self._tracked:
            with self.room.stage(setting) as stage:
                runs = play(stage, self.talks)
                entries = self._entries(stage)
                self.helped |= bool((entries["status"] & Status.HELPER).any())
                strays = [end for end, _ in throw(stage, self.strays)]
            again: list[Run] = []
            if self.room.names.nat or self.room.settings() != [Setting()]:
                with self.room.stage(setting) as stage:
                    again = play(stage, self.talks)
            self._tracked[setting] = Tracked(runs, again, strays, entries)
        return self._tracked[setting]

    def with_lever(self, lever: Notrack, backend: str, settings: Sequence[Setting] = ()) -> Found:
        """Everything, with the very rules that would be applied. Raises CtraceError."""
        found = Found()
        texts = scripts(lever, backend)
        trusted = self._trusted(lever)
        with on_one_processor():
            for setting in settings or self.room.settings():
                before = self.tracked(setting)
                with self.room.stage(setting, texts, untracked=True) as stage:
                    after = play(stage, self.talks)
                    entries = self._entries(stage)
                    ends = [end for end, _ in throw(stage, self.strays)]
                if lever.shared:  # what others' connections taught the rules is not for ours
                    after = self._apart(setting, texts, after)
                if setting == Setting():
                    found.entries = (self._count(before.entries, lever),
                                     self._count(entries, lever))  # fmt: skip
                welcome = {(r.talk.client, r.talk.server, r.talk.dport)
                           for r in before.runs if r.first}  # fmt: skip
                new = compare.runs(
                    before.runs, after, before.again,
                    hears_mark=self.room.snapshot.hears_mark,
                    drawn=self.room.draws and setting.draw,
                )  # fmt: skip
                new += compare.strays(self.strays, before.strays, ends, welcome, trusted)
                have = {(d.what, d.kind) for d in found.differences}
                for one in new:
                    if (one.what, one.kind) not in have:
                        found.differences.append(one)
                        found.settings[id(one)] = setting
        return found

    def _trusted(self, lever: Notrack) -> Callable[[Stray], bool]:
        """Whether a datagram passes for an answer to a client, by the servers that it names."""
        peers = {ip_address(peer).packed for peer in lever.peers if "client" in lever.roles}
        mine, (low, high) = {address for address, _ in self.cast.local}, lever.ephemeral
        return lambda p: (
            p.sport == self.port and p.src in peers and p.dst in mine and low <= p.dport <= high
        )

    def _apart(self, setting: Setting, texts: Sequence[Script], after: Sequence[Run]) -> list[Run]:
        """Runs in which this host's own calls are on a stage of their own."""
        own = [run.talk for run in after if run.talk.role in ("client", "loopback")]
        with self.room.stage(setting, texts, untracked=True) as stage:
            again = {run.talk: run for run in play(stage, own)}
        return [again.get(run.talk, run) for run in after]

    def servers(self, roles: Collection[str]) -> set[bytes]:
        """Other hosts that the table's flows reach under their own address, in these roles."""
        return {
            run.talk.server
            for run in self.tracked(Setting()).runs
            if run.talk.known
            and run.talk.role in roles
            and run.talk.role in ("client", "forward")
            and run.talk.dport == self.port
            and run.first is not None
            and (run.first.src, run.first.dst) == (run.talk.client, run.talk.server)
        }

    def translates(self) -> bool:
        """Whether any of the table's flows is translated in the rehearsal."""
        return any(
            run.talk.known
            and run.first is not None
            and (run.first.src, run.first.dst) != (run.talk.client, run.talk.server)
            for run in self.tracked(Setting()).runs
        )

    def own_ports(self) -> bool:
        """Whether calls of this host leave from ports that a translation drew by lot."""
        found = self.tracked(Setting())
        return any(
            run.talk.role == "client"
            and run.first is not None
            and twin.first is not None
            and run.first.sport not in (run.talk.sport, twin.first.sport)
            for run, twin in zip_longest(found.runs, found.again or found.runs)
        )

    def _entries(self, stage: Stage) -> Events:
        events = ctnetlink.dump(stage.space.path)
        number = PROTO_NUMBERS[self.proto]
        ours = (events["dport"] == self.port) | (events["sport"] == self.port)
        found: Events = events[(events["proto"] == number) & ours]
        return found

    def _count(self, entries: Events, lever: Notrack) -> int:
        """Entries of conversations that the lever's rules are meant for."""
        low, high = lever.ephemeral
        peers = {ip_address(peer).packed for peer in lever.peers}
        mine = {
            (_wide(t.client), t.sport)
            for t in self.talks
            if t.role in lever.roles
            and t.dport == self.port
            and (t.role != "client" or low <= t.sport <= high)
            and (t.role not in ("client", "forward") or not peers or t.server in peers)
        }
        return sum(
            (bytes(e["src"]), int(e["sport"])) in mine or (bytes(e["dst"]), int(e["dport"])) in mine
            for e in entries
        )

    def entries_by_role(self) -> dict[str, str]:
        """What each role's conversations leave in the table without rules of ours: ``none``,
        ``half`` (only entries that saw one direction), ``some``; of the two families the
        one that leaves less. Raises CtraceError."""
        with on_one_processor():
            tracked = self.tracked(Setting())
        entries = tracked.entries
        ends: dict[tuple[bytes, int], bool] = {}
        for e in entries:
            both = bool(e["status"] & Status.SEEN_REPLY)
            for side, port in (("src", "sport"), ("dst", "dport")):
                end = bytes(e[side]), int(e[port])
                ends[end] = ends.get(end, False) or both
        marks: dict[tuple[str, int], set[str]] = {}
        for run in tracked.runs:
            talk = run.talk
            if talk.dport == self.port and run.first is not None:
                end = _wide(talk.client), talk.sport
                made = "none" if end not in ends else "some" if ends[end] else "half"
                marks.setdefault((talk.role, len(talk.client)), set()).add(made)
        found: dict[str, str] = {}
        for (role, _), of in marks.items():
            # Rules may be for one family only.
            word = "some" if "some" in of else min(of)
            found[role] = min(found.get(role, word), word, key=("none", "half", "some").index)
        return found

    def coming_and_going(self, lever: Notrack, backend: str, found: Found) -> None:
        """What the rules do to conversations that are open when they come, and when they go.

        Before they go, entries are made for this host's own open connections, as undo does.
        """
        texts = scripts(lever, backend)
        going = removal(backend)
        own = [
            ctnetlink.Flow(t.client, t.server, t.sport, t.dport)
            for t in self.talks
            if t.proto == PROTO_NUMBERS["tcp"] and t.dport == self.port and t.role in lever.roles
            and t.role != "forward"
        ]  # fmt: skip
        with on_one_processor():
            works = talks.some([r.talk for r in self.tracked(Setting()).runs
                                if len(r.outcomes) > 3 and None not in r.outcomes])  # fmt: skip
            for rest in (dict(REST), dict(SERVER_NEXT)):
                found.cut += self._changed(works, (), texts, rest)
                found.resets += self._changed(works, texts, going, rest, own)
        if lever.shared:  # only those that there are, which subject.shared_now tells
            found.cut = [t for t in found.cut if t.known or t.sport != self.port]

    def _changed(
        self, works: Sequence[Talk], first: Sequence[Script], then: Sequence[Script],
        rest: Steps, carried: Sequence[ctnetlink.Flow] = (),
    ) -> list[Talk]:  # fmt: skip
        with self.room.stage(Setting(), first, untracked=bool(first)) as stage:

            def change() -> None:
                if carried:
                    ctnetlink.insert(stage.space.path, carried, CARRIED_S)
                for argv, stdin in then:
                    stage.space.run(argv, stdin)

            runs = play(stage, works, rest, change)
        return [
            run.talk
            for run in runs
            if any(run.outcomes[i] is None and s.who in "cs" for i, s in enumerate(run.steps))
        ]


def scripts(lever: Notrack, backend: str) -> list[Script]:
    """The rules of a lever as they would be applied: accepts first."""
    plan = alone(lever, backend=backend)
    found: list[Script] = []
    for tool, family in XT:
        text = notrack_iptables.accepts(plan, tool, family)
        if text:
            found.append((notrack_iptables.restore_argv(tool, family), text))
    if backend == "nft":
        found.append((("nft", "-f", "-"), notrack_nft.script(plan, None)))
        return found
    native = notrack_nft.accepts(plan)
    if native:
        found.append((("nft", "-f", "-"), "\n".join(native) + "\n"))
    return found + [
        (notrack_iptables.restore_argv(backend, family), notrack_iptables.restore(plan, family))
        for family in ("ip", "ip6")
    ]


def removal(backend: str) -> list[Script]:
    """What takes the untracking rules away. Accepts may stay: only untracked packets meet them."""
    if backend == "nft":
        return [(("nft", "-f", "-"), notrack_nft.remove_table() + "\n")]
    return [(notrack_iptables.restore_argv(backend, family), notrack_iptables.remove())
            for family in ("ip", "ip6")]  # fmt: skip


# ---- the snapshot as it would be after ctrace undo -----------------------------------------


def _without_ours(things: Iterable[Thing]) -> tuple[Thing, ...]:
    tag, table = TAG.encode(), OUR_TABLE.encode() + b"\0"
    kept = []
    for thing in things:
        kind, family, body = thing
        of = dict(split(body))
        name = of.get(1, b"")
        if family == 1 and name == table and kind in (TABLE, CHAIN, RULE, SET, ELEMENT, OBJECT):
            continue
        if kind == RULE and tag in body:
            continue
        kept.append(thing)
    return tuple(kept)


def _legacy_without_ours(found: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (family, "\n".join(line for line in text.splitlines() if TAG not in line) + "\n")
        for family, text in found
    )


def _wide(address: bytes) -> bytes:
    return MAPPED_PREFIX + address if len(address) == 4 else address
