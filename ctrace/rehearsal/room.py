"""A namespace's snapshot, and the stages that are made from it."""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final, Optional

from ctrace.errors import CtraceError
from ctrace.host.rawlink import Interrupted, number, split
from ctrace.plan.plan import Notrack, alone
from ctrace.rehearsal import constants, nft_copy, nft_edit, play, surroundings
from ctrace.rehearsal.conditions import forced, legacy
from ctrace.rehearsal.conditions.needs import Needs, flags_in
from ctrace.rehearsal.nft_copy import CHAIN, ELEMENT, OBJECT, RULE, SET, TABLE, Thing
from ctrace.rehearsal.snapshot import Snapshot
from ctrace.rehearsal.stage import Script, Stage
from ctrace.ruleset import notrack_iptables, notrack_nft
from ctrace.ruleset.model import Ruleset
from ctrace.ruleset.notrack import TABLE as OUR_TABLE
from ctrace.ruleset.notrack import TAG

XT: Final = tuple(
    (tool, family) for tool in ("iptables-nft", "iptables-legacy") for family in ("ip", "ip6")
)
_TIMEOUT: Final = 0x10
"""NFT_SET_TIMEOUT: elements go by themselves."""


Learned = frozenset[tuple[str, bytes]]


@dataclass(frozen=True)
class Setting:
    """What a stage is like beside the snapshot."""

    answer: bool = True
    """What conditions that depend on more than a packet say."""
    packet: Optional[bool] = None
    """What those of them say instead that read something of a packet which is not varied. Then
    only they change later."""
    draw: bool = True
    """Whether translations draw ports by lot."""
    late_first: bool = False
    """Chains of one priority registered the other way round."""
    later: Optional[bool] = None
    """What those conditions say that change, once a conversation is open; None: the same."""
    expired: bool = False
    """Whether elements of sets that have a timeout are gone, once a conversation is open."""

    def says(self, late: bool) -> tuple[bool, Optional[bool], Optional[bool]]:
        """(the answer, what conditions say instead that do not change, and those that read
        something of a packet); ``late``: once open."""
        if not late or self.later is None:
            return self.answer, None, self.packet
        if self.packet is not None:
            return self.answer, self.packet, self.later
        return self.later, self.answer, None


@dataclass(frozen=True)
class Ours:
    """The rules of a lever, as they would be applied."""

    whole: tuple[Script, ...]
    accepts: tuple[Script, ...]
    untrack: tuple[Script, ...]
    track: tuple[Script, ...]
    """What takes the untracking rules away. Accepts may stay: only untracked packets meet them."""
    undo: tuple[Script, ...]
    """What takes legacy accepts away."""
    backend: str


def ours(lever: Notrack, backend: str) -> Ours:
    """The rules of a lever."""
    plan = alone(lever, backend=backend)
    accepts: list[Script] = []
    undo: list[Script] = []
    for tool, family in XT:
        text = notrack_iptables.accepts(plan, tool, family)
        if text:
            argv = notrack_iptables.restore_argv(tool, family)
            accepts.append((argv, text))
            if tool == "iptables-legacy":
                undo.append((argv, notrack_iptables.accepts(plan, tool, family, remove=True)))
    xt, native = list(accepts), notrack_nft.accepts(plan)
    nft = ("nft", "-f", "-")
    if native:
        accepts.append((nft, "\n".join(native) + "\n"))
    if backend == "nft":
        bare = alone(replace(lever, accepts=()), backend=backend)
        whole = [*xt, (nft, notrack_nft.script(plan, None))]
        untrack: list[Script] = [(nft, notrack_nft.script(bare, None))]
        track: list[Script] = [(nft, notrack_nft.remove_table() + "\n")]
    else:
        argvs = [(notrack_iptables.restore_argv(backend, f), f) for f in ("ip", "ip6")]
        untrack = [(argv, notrack_iptables.restore(plan, family)) for argv, family in argvs]
        track = [(argv, notrack_iptables.remove()) for argv, _ in argvs]
        whole = [*accepts, *untrack]
    return Ours(tuple(whole), tuple(accepts), tuple(untrack), tuple(track), tuple(undo), backend)


class Room:
    """A namespace's snapshot, and what all services in it share.

    A stage that a use is over with is emptied, and serves the next: to load the rules takes most
    of the time where there are many.
    """

    def __init__(self, snapshot: Snapshot, ruleset: Optional[Ruleset]) -> None:
        """Raises CtraceError when there can be no stage."""
        self._needs = Needs()
        things, meters = forced.unmetered(_without_ours(snapshot.nft))
        self._needs.meters.update(meters)
        self.snapshot = replace(snapshot, nft=things, legacy=_legacy_without_ours(snapshot.legacy))
        self._known: list[tuple[str, str]] = []
        self.names = constants.named(self.snapshot, ruleset, self._needs)
        self._batches: dict[tuple[object, ...], nft_copy.Batch] = {}
        old = [text for _, text in self.snapshot.legacy]
        self._depends = self._needs.depends or any(legacy.depends(text) for text in old)
        self._turns = self._needs.turns or any(legacy.depends(text, lots=False) for text in old)
        groups = [self._needs.groups, *(legacy.groups(text) for text in old)]
        self._mixed = any(one for one, _ in groups) and any(other for _, other in groups)
        flagged = self._needs.flags or any(flags_in(text) for text in old)
        self.rest, self.whole = play.rest(flagged=flagged), play.whole(flagged=flagged)
        self.draws = self._needs.draws or any(
            legacy.loaded(text, True) != legacy.loaded(text, True, draw=False) for text in old
        )
        self._apart = self._needs.counts or any(
            legacy.loaded(text, True) != legacy.loaded(text, True, untracked=True) for text in old
        )
        self._orders = nft_copy.equal_priorities(self.snapshot.nft)
        self._watched = sorted(self._needs.learns & self.names.asked)
        self._fills = self._needs.keeps or any(" -j SET " in text for text in old)
        self._lasting = nft_copy.lasting(self.snapshot.nft, self.names.asked)
        self._leaving = _leaving(self.snapshot.ipsets)
        self._refill = _changing(self.snapshot.nft, self._needs)
        for text in old:
            self._needs.recent.text(text)
            self._needs.classes |= " -j CLASSIFY " in text
        self._keeps = self._needs.keeps or self._needs.recent.filled or _keeps(self.snapshot)
        self._took = 0.0
        """Seconds that the last stage took to make."""
        self._idle: dict[tuple[Setting, bool, bool], Stage] = {}
        weakref.finalize(self, _close, self._idle).atexit = False
        with self.stage(Setting()) as stage:
            self.gaps = [*snapshot.gaps, *stage.gaps]
        if self.names.security:
            self.gaps.append("security marks that connections keep (ct secmark, CONNSECMARK)")

    def settings(self) -> list[Setting]:
        """Under which everything is rehearsed: ports are drawn in the first, compared in others."""
        found, kept = [Setting()], Setting(draw=not self.draws)
        if self._depends:
            found.append(replace(kept, answer=False))
        if self._mixed:  # a limit that holds hides what a length decides, say
            found += [replace(kept, answer=one, packet=not one) for one in (True, False)]
        if self.draws:
            found.append(kept)
        if self._orders:
            found.append(replace(kept, late_first=True))
        return found

    def turns(self) -> list[Setting]:
        """Further settings, in which a limit, a quota, an hour or an element ends while
        conversations are open: it may be asked about each packet then that has no entry."""
        kept = Setting(draw=not self.draws)
        both = (True, False) if self._turns else ()
        found = [replace(kept, answer=one, later=not one) for one in both]
        if self._mixed:
            found += [replace(kept, answer=False, packet=one, later=not one) for one in both]
        if self._leaving or self._lasting != self.snapshot.nft:
            found.append(replace(kept, later=True, expired=True))
        return found

    def turn(
        self, stage: Stage, setting: Setting, rules: Optional[Ours], silent: bool = False
    ) -> None:
        """Such conditions say from now on what they say later; entries stay. Raises CtraceError."""
        apart = self._apart and rules is not None
        stage.turn(self._rules(setting, apart, late=True))
        if setting.expired and self._leaving:
            stage.space.run(["ipset", "restore"], self._leaving)
        surroundings.legacy(self._as(setting, apart, late=True), stage.space, silent)
        if rules is not None:
            stage.run(rules.accepts if rules.backend == "nft" else rules.whole)

    @contextmanager
    def stage(
        self,
        setting: Setting,
        rules: Optional[Ours] = None,
        *,
        untracked: bool = True,
        traced: bool = False,
    ) -> Iterator[Stage]:
        """A stage with ``rules``; ``untracked``: False has their accepts alone.

        Raises CtraceError.
        """
        apart = self._apart and rules is not None and untracked
        key = setting, apart, traced and bool(self.snapshot.legacy)
        stage = self._idle.pop(key, None) or self._new(*key)
        good = False
        try:
            if traced:
                stage.trace()
            if rules is not None:
                stage.run(rules.whole if untracked else rules.accepts)
            yield stage
            begin = time.monotonic()
            good = not self._keeps and setting.later is None and key not in self._idle
            good = good and self._emptied(stage, rules)
            self._keeps |= good and not self._worth_it(time.monotonic() - begin)
        finally:
            if good:
                self._idle[key] = stage
            else:
                stage.close()

    @property
    def learns(self) -> bool:
        """Whether packets fill sets that rules ask."""
        filled = self._fills and self.snapshot.ipset_index
        return bool(self._watched or filled or self._needs.recent.watched)

    def learned(self, stage: Stage) -> Learned:
        """The elements of sets, and of lists of recent, that packets fill and that rules ask:
        (``set NAME`` or ``list NAME``, key)."""
        found = {(f"list {name}", key) for name, key in self._needs.recent.held(stage.space)}
        for name, body in nft_edit.elements(stage.space.path, self._watched):
            for _, one in split(dict(split(body))[3]):
                found.add((f"set {name}", dict(split(one)).get(1, b"")))
        if self._fills and self.snapshot.ipset_index:
            for line in stage.space.run(["ipset", "save"]).splitlines():
                word, *rest = line.split()
                if word == "add":
                    found.add((f"set {rest[0]}", rest[1].encode()))
        return frozenset(found)

    def _emptied(self, stage: Stage, rules: Optional[Ours]) -> bool:
        """Make a stage as it was; False when that cannot be."""
        if rules is not None and rules.backend != "nft":
            return False
        with suppress(CtraceError, OSError, Interrupted):
            back = [*nft_edit.refilled(self._refill)]
            if rules is not None:
                stage.run(rules.undo)
                back += nft_edit.without_table(1, OUR_TABLE)
            stage.reset(back)
            return True
        return False

    def _new(self, setting: Setting, apart: bool, silent: bool) -> Stage:
        snapshot, rules = self._as(setting, apart), self._rules(setting, apart)
        begin = time.monotonic()
        classed = self._needs.classes
        stage = Stage(snapshot, rules, self._known, silent=silent, classed=classed)
        self._took = time.monotonic() - begin
        return stage

    def _as(self, setting: Setting, apart: bool, late: bool = False) -> Snapshot:
        """The snapshot with its legacy tables as a setting wants them."""
        says, kept, packet = setting.says(late)
        tables = tuple(
            (
                family,
                legacy.loaded(
                    text, says, untracked=apart, draw=setting.draw, kept=kept, packet=packet
                ),
            )
            for family, text in self.snapshot.legacy
        )
        return replace(self.snapshot, legacy=tables)

    def _worth_it(self, emptying: float) -> bool:
        """Whether a new stage would take longer. To forget entries the kernel walks the table of
        all namespaces: where that is full, few rules are loaded sooner."""
        return emptying < self._took

    def _rules(self, setting: Setting, apart: bool, late: bool = False) -> nft_copy.Batch:
        """nftables as a setting wants it, prepared once."""
        changed, (says, kept, packet) = self._needs.changed, setting.says(late)
        expired = late and setting.expired
        forced_to = says, kept, packet, setting.draw, apart
        key = (setting.late_first, expired, bool(changed) and forced_to)
        if key not in self._batches:
            change = None
            if changed:
                change = forced.change(
                    says,
                    untracked=apart,
                    draw=setting.draw,
                    kept=kept,
                    packet=packet,
                    maps=self._needs.maps,
                    meters=self._needs.meters,
                )
            things = self._lasting if expired else self.snapshot.nft
            if setting.late_first:
                things = nft_copy.late_first(things)
            self._batches[key] = nft_copy.batch(things, change, changed)
        return self._batches[key]


def _close(stages: dict[tuple[Setting, bool, bool], Stage]) -> None:
    for stage in stages.values():
        stage.close()


def _leaving(lines: Sequence[str]) -> str:
    """Input for ipset: without the elements that expire by themselves, by what it saved."""
    timed = (re.match(r"add (\S+ \S+) .*\btimeout [1-9]", line) for line in lines)
    return "".join(f"del {found[1]}\n" for found in timed if found)


def _changing(things: Sequence[Thing], needs: Needs) -> list[Thing]:
    """Sets whose elements come and go, and then their elements as they were."""
    sets, elements = {}, []
    for thing in things:
        kind, family, body = thing
        if kind == SET:
            of = dict(split(body))
            name = family, of[1], of[2]
            if name in needs.learns or number(of.get(3, b"")) & _TIMEOUT:
                sets[name] = thing
        elif kind == ELEMENT:
            of = dict(split(body))
            if (family, of[1], of[2]) in sets:
                elements.append(thing)
    return [*sets.values(), *elements]


def _keeps(snapshot: Snapshot) -> bool:
    """Whether packets change state that is not restored: quota and limit objects, sets of ipset,
    and sets whose elements count."""
    return any(
        (kind == OBJECT and number(dict(split(body)).get(3, b"")) in forced.MEASURES)
        or (kind in (SET, ELEMENT) and (b"limit\0" in body or b"quota\0" in body))
        for kind, _, body in snapshot.nft
    ) or any(f" -j {name} " in text for name in ("SET", "RATEEST") for _, text in snapshot.legacy)


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
