"""What ctrace has applied in a namespace, read from the kernel's own ruleset.

Everything of ours is recognisable in the ruleset itself: the table ``inet
ctrace``, the iptables chains ``CTRACE_*`` and the jumps to them, and rules in
other tables whose comment begins with ``ctrace:``.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final, Optional

from ctrace.dropping import told
from ctrace.errors import CtraceError
from ctrace.host import commands
from ctrace.ruleset.notrack import CHAINS, KEPT, TABLE, TAG

XT_TOOLS: Final = ("iptables-nft", "iptables-legacy")
_LEARNED: Final = re.compile(
    r"(\tset (?:others[46]|calls[46]|armed|(?:tcp|udp)_\d+_v[46]) \{\n(?:\t\t.*\n)*?)"
    r"\t\telements = \{[^}]*\}\n"
)
_LEASE: Final = re.compile(r" -m time --datestart \S+ --datestop \S+")
_OURS: Final = re.compile(rf"{TAG}[a-z0-9.:/_-]+")
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+ [A-Za-z0-9_.-]+")
"""Comments and places of our rules. Whoever has a namespace of his own names things there as he
likes: what looks different is none of ours, and is neither shown nor deleted."""
PERMANENT, TRIAL, EXPIRED, NOTHING = "permanent", "trial", "expired", "nothing"


@dataclass(frozen=True)
class Rule:
    """One rule of ours."""

    tool: str
    """``nft``, ``iptables-nft`` or ``iptables-legacy``."""
    family: str
    table: str
    chain: str
    tag: str
    """Its comment: ``ctrace:ROLE:PROTO:PORT:FLOW``; for a rule that drops, ``ctrace:KIND:WHAT``."""
    handle: Optional[int] = None
    text: str = ""
    """As iptables-save prints it; empty for nft."""
    packets: Optional[int] = None
    until: Optional[float] = None
    """UTC seconds at which it stops matching (iptables)."""
    lease: bool = False
    """Whether that time is extended again and again."""

    @property
    def own(self) -> bool:
        """In a table or chain of ours, rather than an accept in somebody else's."""
        if self.tool == "nft":
            return (self.family, self.table) == ("inet", TABLE)
        return self.chain in CHAINS or self.tag == f"{TAG}jump"

    @property
    def drops(self) -> str:
        """``limit-source tcp/80``, ``drop-source 192.0.2.1`` for a rule that drops; otherwise
        empty."""
        return told(self.tag.removeprefix(TAG))

    @property
    def service(self) -> tuple[str, str, int]:
        """(role, protocol, port) from the tag; ("", "", 0) for a jump or a rule that drops."""
        parts = self.tag.removeprefix(TAG).split(":")
        if self.drops or len(parts) < 3 or not parts[2].isdecimal():
            return "", "", 0
        return parts[0], parts[1], int(parts[2])

    @property
    def flow(self) -> str:
        """``to``, ``from``, ``lo``, ``icmp``: the tag's last part."""
        return self.tag.rsplit(":", 1)[-1]


@dataclass(frozen=True)
class Installed:
    """Everything of ours in one namespace."""

    rules: tuple[Rule, ...]
    table: bool
    """Whether ``table inet ctrace`` exists (it may be empty)."""
    chains: tuple[tuple[str, str, str], ...]
    """(iptables tool, family, name) of our chains."""
    seconds_left: Optional[float]
    """Seconds until the kernel disarms the rules; 0 when it has; None when they stay."""
    lease: Optional[float] = None
    """Seconds until rules that must be renewed would stop; None for others."""

    @property
    def state(self) -> str:
        """``nothing``, ``trial``, ``expired`` or ``permanent``."""
        if not self.rules and not self.table and not self.chains:
            return NOTHING
        if self.seconds_left is None:
            return PERMANENT
        return TRIAL if self.seconds_left > 0 else EXPIRED

    @property
    def services(self) -> tuple[str, ...]:
        """``server tcp/80``, ``drop-source 192.0.2.1``... of what is applied, each once."""
        found = dict.fromkeys((rule.drops, *rule.service) for rule in self.rules)
        return tuple(
            drops or f"{role} {proto}/{port}" for drops, role, proto, port in found if drops or port
        )


def read_installed(now: float) -> Installed:
    """What is ours in the namespace that this thread is in; ``now`` in UTC seconds.

    Raises CtraceError when a ruleset that exists can't be read.
    """
    rules: list[Rule] = []
    chains: list[tuple[str, str, str]] = []
    saved: set[tuple[str, str]] = set()
    for tool in XT_TOOLS:
        for family in ("ip", "ip6"):
            text = saved_rules(tool, family)
            if tool == "iptables-nft":
                saved |= {(family, name) for name in re.findall(r"^\*(\S+)$", text, re.M)}
            found = list(tagged_lines(text, tool, family))
            rules += found
            chains += [(tool, family, name) for name in CHAINS if f"\n:{name} " in text]
    table, left, lease, native = False, None, None, []
    if commands.have("nft"):
        ruleset = nft_ruleset()
        native = list(tagged_rules(ruleset.get("nftables", ()), saved))
        table, left, lease = _own_table(ruleset)
    old, old_lease = _ends(rules, now)
    left = min((one for one in (left, old) if one is not None), default=None)
    return Installed(tuple(native + rules), table, tuple(chains), left, lease or old_lease)


def read_own(tool: str, now: float) -> Installed:
    """The untracking rules alone, where ``tool`` keeps them: as cheap on a host with 50,000 rules
    as on one with ten. Raises CtraceError."""
    if tool == "nft":
        ruleset = _own_listing()
        table, left, lease = _own_table(ruleset)
        return Installed(
            tuple(tagged_rules(ruleset.get("nftables", ()), set())), table, (), left, lease
        )
    rules: list[Rule] = []
    for family in ("ip", "ip6"):
        rules += tagged_lines(saved_rules(tool, family, "raw"), tool, family)
    return Installed(tuple(rules), False, (), *_ends(rules, now))


def _ends(rules: Iterable[Rule], now: float) -> tuple[Optional[float], Optional[float]]:
    """Seconds until iptables' rules stop matching, and until their lease is over."""
    ends = [rule.until - now for rule in rules if rule.until is not None and not rule.lease]
    leases = [rule.until - now for rule in rules if rule.until is not None and rule.lease]
    if leases and min(leases) <= 0:
        ends.append(0.0)
    return max(0.0, min(ends)) if ends else None, min(leases) if leases else None


def _own_listing() -> dict[str, Any]:
    """Our table, and of its sets only what arms it: others may hold many addresses."""
    found: list[dict[str, Any]] = []
    for argv in (["-t", "list", "table", "inet", TABLE], ["list", "set", "inet", TABLE, "armed"]):
        status, text, _ = commands.output(["nft", "-j", *argv])
        found += json.loads(text)["nftables"] if status == 0 else []
    return {"nftables": found}


def saved_rules(tool: str, family: str, table: str = "") -> str:
    """``iptables-save -c`` of one variant and family (and table); empty when it is not
    installed."""
    command = tool.replace("iptables", "ip6tables" if family == "ip6" else "iptables") + "-save"
    if not commands.have(command):
        return ""
    only = ["-t", table] if table else []
    status, text, complaint = commands.output([command, "-c", *only])
    if status != 0:
        raise CtraceError(f"{command} failed: {complaint}")
    return "\n" + text


def nft_ruleset() -> dict[str, Any]:
    """``nft -j list ruleset`` with handles, parsed."""
    try:
        document: dict[str, Any] = json.loads(commands.run(["nft", "-j", "-a", "list", "ruleset"]))
    except ValueError:
        raise CtraceError("nft -j printed something that is not JSON: update nftables") from None
    return document


def listing() -> str:
    """Our rules as text without counters and without what the kernel adds to our sets by itself,
    to tell whether they are still the same."""
    parts = []
    if commands.have("nft"):
        status, text, _ = commands.output(["nft", "-s", "list", "table", "inet", TABLE])
        parts.append(_LEARNED.sub(r"\1", text) if status == 0 else "")
    for tool in XT_TOOLS:
        for family in ("ip", "ip6"):
            found = tagged_lines(saved_rules(tool, family), tool, family)
            lines = [_LEASE.sub("", rule.text) for rule in found]
            parts.append("\n".join(lines))
    return "\n".join(parts)


def tagged_rules(objects: Iterable[dict[str, Any]], skip: set[tuple[str, str]]) -> Iterator[Rule]:
    """Our rules in nft's JSON, except in the (family, table) pairs in ``skip``."""
    for item in objects:
        body = item.get("rule")
        if not isinstance(body, dict) or (body["family"], body["table"]) in skip:
            continue
        tag = body.get("comment", "")
        if _OURS.fullmatch(tag) and _NAME.fullmatch(f"{body['table']} {body['chain']}"):
            counters = [
                part["counter"]["packets"]
                for part in body.get("expr", ())
                if isinstance(part.get("counter"), dict)
            ]
            yield Rule(
                "nft",
                body["family"],
                body["table"],
                body["chain"],
                tag,
                handle=body.get("handle"),
                packets=sum(counters) if counters else None,
            )


def _own_table(ruleset: dict[str, Any]) -> tuple[bool, Optional[float], Optional[float]]:
    """Whether our table exists, the seconds until it is disarmed, and until its lease is over."""
    table, armed = False, None
    for item in ruleset.get("nftables", ()):
        (what, body), *_ = item.items()
        if not isinstance(body, dict) or body.get("family") != "inet":
            continue
        if what == "table" and body.get("name") == TABLE:
            table = True
        if what == "set" and (body.get("table"), body.get("name")) == (TABLE, "armed"):
            armed = body.get("elem", [])
    if armed is None:
        return table, None, None
    if not armed:
        return table, 0.0, None
    # An element that stays is a plain string; others say when they expire.
    timed = [part["elem"] for part in armed if isinstance(part, dict)]
    # nft leaves out an end that is just now.
    ends = [float(part.get("expires", 0)) for part in timed if "timeout" in part]
    soonest = min(ends) if ends else None
    if any(part.get("comment") == KEPT for part in timed):
        return table, None, soonest
    return table, soonest, None


def tagged_lines(text: str, tool: str, family: str) -> Iterator[Rule]:
    """Our rules in the text of ``iptables-save -c``."""
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        found = re.match(r"\[(\d+):\d+\] (-A .*)", line)
        if not found or TAG not in line:
            continue
        try:
            words = shlex.split(found[2])
        except ValueError:  # somebody's comment holds the end of a line
            continue
        tag = _value(words, "--comment")
        if not (_OURS.fullmatch(tag) and _NAME.fullmatch(f"{table} {words[1]}")):
            continue
        stop = _value(words, "--datestop")
        until = None
        if stop:
            until = datetime.fromisoformat(stop).replace(tzinfo=timezone.utc).timestamp()
        yield Rule(
            tool,
            family,
            table,
            words[1],
            tag,
            text=found[2],
            packets=int(found[1]),
            until=until,
            lease="--datestart" in words,
        )


def _value(words: list[str], flag: str) -> str:
    where = words.index(flag) + 1 if flag in words else len(words)
    return words[where] if where < len(words) else ""
