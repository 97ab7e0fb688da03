"""The parts of advice: candidates, tables and plans, as JSON and as rules to paste."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Optional

from ctrace.advice.in_place import InPlace
from ctrace.change import shell_lines, steps
from ctrace.dropping import Drop
from ctrace.errors import CtraceError
from ctrace.host import commands
from ctrace.model.snapshot import Remedy, Rising
from ctrace.plan.plan import Lever, Notrack, Plan, alone
from ctrace.ruleset import notrack_iptables, notrack_nft

GOOD: Final = ("safe", "safe-with-rules")


@dataclass(frozen=True)
class Candidate:
    """NOTRACK for one service in one namespace."""

    netns: int
    netns_name: str
    proto: str
    port: int
    role: tuple[str, ...]
    verdict: str
    reasons: tuple[str, ...]
    frees: int
    """Entries held now that will go in time; none where open connections keep them."""
    share: float
    """Of all entries in its table."""
    fill_after: Optional[tuple[float, float]]
    lever: Notrack
    chosen: bool = False
    """Part of the smallest set that reaches the target."""
    in_place: bool = False
    """Such rules exist already: what it holds is from before, or beyond them."""
    enter: tuple[str, ...] = ()
    """The prefix of a command that makes it run in its namespace."""
    backend: str = "nft"
    """The kind of rules that the host takes."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """From the rehearsal: what was tried, what differed, what could not be copied."""
    rising: Optional[Rising] = None
    """What the table does without it, where it goes on rising all the same."""
    remarks: tuple[str, ...] = ()
    """Those of the reasons for which it is not proposed, though it may be safe: it gains nothing
    or little, or lets a flood through."""

    @property
    def proposed(self) -> bool:
        """Whether a plan may include it unasked: it is safe, and worth doing."""
        return self.verdict in GOOD and not self.remarks

    def held_back(self, why: str) -> Candidate:
        """The same with one more remark, before the others."""
        return replace(self, reasons=(why, *self.reasons), remarks=(why, *self.remarks))


@dataclass(frozen=True)
class TableAdvice:
    """One namespace: its fill now, and its fill with the chosen levers."""

    netns: int
    name: str
    count: int
    max: Optional[int]
    """None where it is not known; then so is everything derived from it."""
    fill: Optional[float]
    drops: Optional[int]
    """New flows refused; None where they cannot be seen."""
    needed: Optional[int]
    """Entries above the target; 0 when there are none."""
    levers: tuple[Lever, ...]
    fill_after: Optional[tuple[float, float]]
    reached: bool
    """Whether the table is below the target then, and stays so."""
    rising: Optional[Rising] = None
    """With the levers; None: it does not go on rising."""
    read: bool = True
    """Whether ``count`` is what it held; otherwise it held at least so many."""


@dataclass(frozen=True)
class Choice:
    """The fewest levers for a table, and its fill with them."""

    levers: tuple[Lever, ...] = ()
    fill_after: Optional[tuple[float, float]] = None
    reached: bool = True
    rising: Optional[Rising] = None


@dataclass(frozen=True)
class Asked:
    """One requested drop in one namespace."""

    netns: int
    drop: Drop
    seen: Optional[int]
    """New entries seen of its service or sources; None where only one moment was seen."""
    dropped: Optional[int]
    """How many of those it would have dropped, at least."""
    text: str
    """The same in words."""


@dataclass(frozen=True)
class Advice:
    """The whole answer."""

    host: str
    created: int
    target: float
    tables: tuple[TableAdvice, ...]
    candidates: tuple[Candidate, ...]
    alternatives: tuple[Remedy, ...]
    notes: tuple[str, ...]
    persist: tuple[str, ...] = ()
    """Where the rules have to stand to survive a reload and a reboot."""
    in_place: tuple[tuple[int, InPlace], ...] = ()
    """(namespace, what is there already)."""
    plans: tuple[Plan, ...] = ()
    """One for each namespace with levers to apply and a known ruleset."""
    asked: tuple[Asked, ...] = ()
    """Requested drops that are in the plans."""

    def plan(self, netns: Optional[int] = None) -> Plan:
        """The plan for a namespace (or the only one). Raises CtraceError when there is none."""
        found = [plan for plan in self.plans if netns in (None, plan.netns)]
        if not found:
            full = any(table.needed for table in self.tables if netns in (None, table.netns))
            good = any(
                c.verdict in GOOD and not c.in_place
                for c in self.candidates
                if netns in (None, c.netns)
            )
            safe = "what is safe is not proposed, the advice says why"
            why = (safe if good else "no lever is safe") if full else "no table is above the target"
            raise CtraceError(f"there is nothing to apply: {why}")
        if len(found) > 1:
            names = ", ".join(plan.netns_name or str(plan.netns) for plan in found)
            raise CtraceError(f"several namespaces need a plan: choose one with --netns ({names})")
        return found[0]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: candidates with the rules as text, alternatives, tables, notes."""
        return {
            "host": self.host,
            "created": self.created,
            "target": self.target,
            "tables": [
                {**asdict(table), "levers": [_lever_json(lever) for lever in table.levers]}
                for table in self.tables
            ],
            "candidates": [candidate_json(candidate) for candidate in self.candidates],
            "alternatives": [asdict(item) for item in self.alternatives],
            "asked": [{**asdict(one), "kind": one.drop.option} for one in self.asked],
            "in_place": [{"netns": netns, **asdict(done)} for netns, done in self.in_place],
            "persist": list(self.persist),
            "notes": list(self.notes),
        }


# ---- JSON -----------------------------------------------------------------------


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """One candidate with its rules as text, and the commands that remove them."""
    texts: dict[str, Any] = {"nft": "", "iptables": "", "ip6tables": ""}
    undo = ""
    if _has_rules(candidate):
        texts = rule_texts(candidate.lever)
        undo = commands.inside(candidate.enter, shell_lines.undo_line(alone(candidate.lever)))
    return {
        "service": {"proto": candidate.proto, "port": candidate.port},
        "netns": candidate.netns,
        "netns_name": candidate.netns_name,
        "role": list(candidate.role),
        "verdict": candidate.verdict,
        "reasons": list(candidate.reasons),
        "remarks": list(candidate.remarks),
        "frees": candidate.frees,
        "share": round(candidate.share, 4),
        "fill_after": candidate.fill_after,
        "rules": texts,
        "undo": undo,
        "flush": flush_lines(candidate),
        "chosen": candidate.chosen,
        "in_place": candidate.in_place,
        "evidence": candidate.evidence,
    }


def flush_lines(candidate: Candidate) -> list[str]:
    """The commands that delete the remaining old entries, once its rules are in place."""
    if not _has_rules(candidate):
        return []
    lines = shell_lines.flush_commands(alone(candidate.lever))
    return [commands.inside(candidate.enter, " ".join(argv)) for argv in lines]


def _has_rules(candidate: Candidate) -> bool:
    return bool(candidate.role) and candidate.verdict not in ("unsafe", "cannot-say")


def blocks(candidate: Candidate) -> dict[str, str]:
    """Its rules to paste into a shell, each whole with its undo, by kind: this host's first."""
    if not _has_rules(candidate):
        return {}
    kinds = [candidate.backend]
    if not candidate.lever.shared:
        kinds.append("iptables-nft" if candidate.backend == "nft" else "nft")
    return {
        kind: steps.block(alone(candidate.lever, backend=kind), candidate.enter) for kind in kinds
    }


def rule_texts(lever: Lever) -> dict[str, str]:
    """The rules of one lever: ``nft``, ``iptables`` and ``ip6tables`` restore input.

    The accepts in other tables follow in the form of the tool that owns the table.
    """
    plan = alone(lever)
    texts = {"nft": notrack_nft.script(plan, None), "iptables": "", "ip6tables": ""}
    if isinstance(lever, Notrack):
        for name, family in (("iptables", "ip"), ("ip6tables", "ip6")):
            texts[name] = "" if lever.shared else notrack_iptables.restore(plan, family)
            for tool in ("iptables-nft", "iptables-legacy"):
                texts[name] += notrack_iptables.accepts(plan, tool, family)
    return texts


def _lever_json(lever: Lever) -> dict[str, Any]:
    return {"kind": lever.kind, **asdict(lever)}
