"""A namespace's snapshot, and the stages that are made from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Optional

from ctrace.host.rawlink import split
from ctrace.rehearsal import constants, forced, nft_copy
from ctrace.rehearsal.nft_copy import CHAIN, ELEMENT, OBJECT, RULE, SET, TABLE, Thing
from ctrace.rehearsal.snapshot import Snapshot
from ctrace.rehearsal.stage import Script, Stage
from ctrace.ruleset.model import Ruleset
from ctrace.ruleset.notrack import TABLE as OUR_TABLE
from ctrace.ruleset.notrack import TAG


@dataclass(frozen=True)
class Setting:
    """What a stage is like beside the snapshot."""

    answer: bool = True
    """What conditions that depend on more than a packet say."""
    draw: bool = True
    """Whether translations draw ports by lot."""
    late_first: bool = False
    """Chains of one priority registered the other way round."""


class Room:
    """A namespace's snapshot, and what all services in it share."""

    def __init__(self, snapshot: Snapshot, ruleset: Optional[Ruleset]) -> None:
        """Raises CtraceError when there can be no stage."""
        self.snapshot = replace(
            snapshot, nft=_without_ours(snapshot.nft), legacy=_legacy_without_ours(snapshot.legacy)
        )
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
        self,
        setting: Setting,
        scripts: Sequence[Script] = (),
        *,
        untracked: bool = False,
        traced: bool = False,
    ) -> Stage:
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
