"""``nft -j list ruleset`` as chains of the common model."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, Optional

from ctrace.ruleset.model import CT_OTHER, Chain, Match, Rule, Use, Value, Verdict
from ctrace.ruleset.nft_fields import Unclear, compared, field_of, flags_of, value_of
from ctrace.ruleset.nft_words import as_text
from ctrace.ruleset.notrack import TABLE, TAG

PRIORITIES: Final = {
    "raw": -300,
    "mangle": -150,
    "dstnat": -100,
    "filter": 0,
    "security": 50,
    "srcnat": 100,
}
VERDICTS: Final = ("accept", "drop", "reject", "return", "jump", "goto", "continue", "queue")
HARMLESS: Final = ("counter", "log", "comment", "quota", "last", "dup", "secmark")
"""Statements that neither decide nor depend on tracking (quota is a match: see below)."""
MAX_ELEMENTS: Final = 8192
MAX_ALTERNATIVES: Final = 256
"""Elements of concatenated fields that are read one by one."""

UNKNOWN: Final = Match("")


Objects = list[dict[str, Any]]


@lru_cache(maxsize=1)
def objects_of(text: str) -> Objects:
    """What ``nft -j`` listed, read-only, parsed once for consecutive callers.

    Raises ValueError, KeyError, TypeError. A large listing takes much memory: call
    ``objects_of.cache_clear()`` when nobody needs it any more.
    """
    found: Objects = json.loads(text)["nftables"]
    return found


def parse(objects: Objects, told: Collection[tuple[str, str, str]] = ()) -> list[Chain]:
    """Chains of all ip, ip6 and inet tables except ctrace's own. Raises ValueError.

    Those in ``told`` (family, table, name) are left out: another listing has them.
    """
    tables = _Tables(objects)
    chains: dict[tuple[str, str, str], Chain] = {}
    rules: dict[tuple[str, str, str], list[Rule]] = {}
    places: dict[tuple[str, str, str], int] = {}
    for item in objects:
        if "chain" in item:
            chain = item["chain"]
            key = (chain["family"], chain["table"], chain["name"])
            if key in told:
                continue
            if key[0] in ("ip", "ip6", "inet") and key[:2] != ("inet", TABLE):
                chains[key] = Chain(
                    tool="nft",
                    family=key[0],
                    table=key[1],
                    name=key[2],
                    hook=chain.get("hook", ""),
                    priority=_priority(chain.get("prio", 0)),
                    policy=chain.get("policy", "accept"),
                    type=chain.get("type", "filter"),
                )
        elif "rule" in item:
            rule = item["rule"]
            key = (rule["family"], rule["table"], rule["chain"])
            if key in told or str(rule.get("comment", "")).startswith(TAG):
                continue
            place = places[key] = places.get(key, -1) + 1
            parts = tables.rules(rule["family"], rule["table"], rule["expr"])
            packets = _packets(rule["expr"])
            rules.setdefault(key, []).extend(
                replace(part, position=place, packets=packets) for part in parts
            )
    return [replace(chain, rules=tuple(rules.get(key, ()))) for key, chain in chains.items()]


def bridged(objects: Objects) -> Iterator[str]:
    """A sentence for each ``table bridge`` that tracks: our rules don't see what it tracks.

    Raises ValueError.
    """
    rules = (item["rule"] for item in objects if "rule" in item)
    tables = {r["table"] for r in rules if r["family"] == "bridge" and _mentions(r["expr"], "ct")}
    for table in sorted(tables):
        yield f"table bridge {table} tracks bridged packets by itself (nf_conntrack_bridge)"


def _packets(expr: list[Any]) -> Optional[int]:
    """Packets of the rule's first counter; named counters are shared with other rules.

    None also where the number is missing, as in a text that was cut off.
    """
    for part in expr:
        if isinstance(part, dict) and isinstance(part.get("counter"), dict):
            n = part["counter"].get("packets", 0)
            return n if isinstance(n, int) else int(n) if str(n).isdecimal() else None
    return None


def _priority(value: Any) -> int:
    if isinstance(value, str) and value in PRIORITIES:
        return PRIORITIES[value]
    return int(value)


class _Tables:
    """Named sets and maps, and the translation of rules that refer to them."""

    def __init__(self, objects: Iterable[dict[str, Any]]) -> None:
        self.sets: dict[tuple[str, str, str], dict[str, Any]] = {}
        for item in objects:
            for kind in ("set", "map"):
                if kind in item:
                    found = item[kind]
                    self.sets[found["family"], found["table"], found["name"]] = found

    def rules(self, family: str, table: str, expr: list[Any]) -> list[Rule]:  # noqa: PLR0912
        """One nft rule as one or, with a map or fields that are compared together, several."""
        matches: list[Match] = []
        uses: list[Use] = []
        verdict: Optional[Verdict] = None
        cases: list[tuple[tuple[Match, ...], Optional[Verdict]]] = []
        either: list[list[Match]] = [[]]
        text = as_text(expr)
        for part in expr:
            kind: str = next(iter(part)) if isinstance(part, dict) else str(part)
            body: Any = part[kind] if isinstance(part, dict) else None
            if kind == "match":
                each = self._each(family, table, body)
                several = 1 < len(each) <= MAX_ALTERNATIVES and len(either) == 1
                either = each if several else either
                matches += [] if several else self._match(family, table, body)
            elif kind == "vmap":
                cases = [*self._vmap(family, table, body)]
            elif kind in VERDICTS:
                verdict = _verdict(kind, body)
            elif kind in ("limit", "quota"):
                matches.append(Match("", text=as_text([part])))
            elif kind == "set":
                # Adding to a set fails when it is full, and its statements may be matches.
                matches.append(Match("", text=as_text([part])))
                for statement in body.get("stmt", ()):
                    uses += _statement(next(iter(statement)), None)
            elif kind in ("jhash", "xt"):
                matches.append(Match("", text=as_text([part])))
                verdict = verdict or Verdict("unknown", "xt")
            elif kind == "mangle":
                uses += _mangle(body)
            elif kind not in HARMLESS:
                found = _statement(kind, body)
                uses += found
                if kind == "ct count":
                    matches.append(Match("", text=as_text([part])))
                if not found:
                    verdict = verdict or Verdict("unknown", kind)
        made = [
            Rule((*matches, *one, *extra), then, tuple(uses), text)
            for one in either
            for extra, then in cases[:MAX_ELEMENTS] or [((), verdict)]
        ]
        if len(cases) > MAX_ELEMENTS:
            made.append(Rule(tuple(matches), Verdict("unknown", "map"), tuple(uses), text))
        return made

    def _vmap(self, family: str, table: str, body: Any) -> list[tuple[tuple[Match, ...], Verdict]]:
        elements = self._elements(family, table, body["data"])
        if elements is None:
            return [((UNKNOWN,), Verdict("unknown", "map"))]
        cases: list[tuple[tuple[Match, ...], Verdict]] = []
        for element in elements:
            value, then = element[0], element[1]
            kind = then if isinstance(then, str) else next(iter(then))
            target = _verdict(kind, None if isinstance(then, str) else then[kind])
            if target is None:
                continue
            if value in ("*", {"*": None}):
                cases.append(((), target))
                continue
            matches = self._match(
                family, table, {"op": "==", "left": body["key"], "right": {"set": [value]}}
            )
            cases.append((tuple(matches), target))
        return cases

    def _elements(self, family: str, table: str, data: Any) -> Optional[list[Any]]:
        """Elements of an anonymous or named set; None when they come and go by themselves."""
        if isinstance(data, dict) and "set" in data:
            return _plain(data["set"])
        if isinstance(data, str) and data.startswith("@"):
            found = self.sets.get((family, table, data[1:]))
            if found is None or {"dynamic", "timeout"} & set(found.get("flags", ())):
                return None
            if "size" in found and "elem" not in found:
                return None  # filled by rules: old versions do not print the flag
            return _plain(found.get("elem", []))
        return None

    def _match(self, family: str, table: str, body: dict[str, Any]) -> list[Match]:
        text = as_text([{"match": body}])
        implied: list[Match] = []
        try:
            left, right, op = body["left"], body["right"], body["op"]
            if isinstance(left, dict) and "concat" in left:
                each = self._each(family, table, body)
                return each[0] if len(each) == 1 else [Match("", text=text)]
            key, implied, mask = field_of(left)
            if not key:
                return [*implied, Match("", text=text)]
            values = self._values(family, table, key, mask, right, op)
            negate = op == "!="
            if op in ("<", ">", "<=", ">="):
                values, negate = compared(op, values, key), False
            return [*implied, Match(key, values, negate, text)]
        except (Unclear, KeyError, TypeError, ValueError):
            return [*implied, Match("", text=text)]

    def _each(self, family: str, table: str, body: dict[str, Any]) -> list[list[Match]]:
        """The alternatives of ``a . b == { x . y, z . w }``; none where it is something else, or a
        set with a name, which may be another tomorrow."""
        left, right = body.get("left"), body.get("right")
        if not isinstance(left, dict) or "concat" not in left or body.get("op") != "==":
            return []
        one = isinstance(right, dict) and "concat" in right
        elements = [right] if one else self._elements(family, table, right) or []
        elements = elements if len(elements) == 1 or not isinstance(right, str) else []
        return [
            [
                match
                for field, value in zip(left["concat"], element["concat"])
                for match in self._match(
                    family, table, {"op": "==", "left": field, "right": {"set": [value]}}
                )
            ]
            for element in elements
            if isinstance(element, dict) and "concat" in element
        ]

    def _values(
        self, family: str, table: str, key: str, mask: Optional[int], right: Any, op: str
    ) -> tuple[Value, ...]:
        if key == CT_OTHER:
            return ()
        elements: Optional[list[Any]]
        if (isinstance(right, dict) and "set" in right) or (
            isinstance(right, str) and right.startswith("@")
        ):
            elements = self._elements(family, table, right)
            if elements is None:
                raise Unclear
        elif isinstance(right, list) and op == "in":
            elements = right
        else:
            elements = [right]
        if key == "flags":
            return flags_of(mask, right, op)
        if key == "mark":
            return tuple((0xFFFFFFFF if mask is None else mask, int(e)) for e in elements)
        if mask is not None:
            raise Unclear
        if key == "ct.state" and isinstance(right, dict) and "|" in right:
            # Compared as a whole, and a packet has one state: never equal.
            return ()
        return tuple(value_of(key, element) for element in elements)


def _plain(elements: list[Any]) -> list[Any]:
    """Elements without the wrapping that comments and counters bring."""
    found = []
    for element in elements:
        if isinstance(element, dict) and "elem" in element:
            element = element["elem"]["val"]  # noqa: PLW2901
        elif isinstance(element, list) and isinstance(element[0], dict) and "elem" in element[0]:
            element = [element[0]["elem"]["val"], *element[1:]]  # noqa: PLW2901
        found.append(element)
    return found


def _verdict(kind: str, body: Any) -> Optional[Verdict]:
    if kind in ("jump", "goto"):
        return Verdict(kind, body["target"])
    if kind in ("drop", "reject"):
        return Verdict("drop")
    if kind in ("accept", "return"):
        return Verdict(kind)
    return None if kind == "continue" else Verdict("unknown", kind)


def _statement(kind: str, body: Any) -> list[Use]:
    simple = {
        "notrack": "notrack",
        "synproxy": "synproxy",
        "ct helper": "helper",
        "ct timeout": "timeout",
        "ct count": "connlimit",
        "ct expectation": "helper",
        "flow": "flow",
        "tproxy": "tproxy",
    }
    if kind in simple:
        return [Use(simple[kind], kind)]
    if kind in ("dnat", "snat", "masquerade", "redirect"):
        port = body.get("port") if isinstance(body, dict) else None
        flags = body.get("flags", ()) if isinstance(body, dict) else ()
        words = [flags] if isinstance(flags, str) else [str(flag) for flag in flags]
        text = " ".join([as_text([{kind: body}]), *words])
        return [Use(kind, text, port if isinstance(port, int) else None)]
    return []


def _mangle(body: dict[str, Any]) -> list[Use]:
    key, value = body.get("key", {}), body.get("value")
    text = as_text([{"mangle": body}])
    uses = []
    if "ct" in json.dumps(value, default=str) and _mentions(value, "ct"):
        uses.append(Use("ct-mark", text))
    if "ct" in key:
        name = key["ct"].get("key", "")
        uses.append(Use({"zone": "zone", "helper": "helper"}.get(name, "ct-set"), text))
    elif "meta" in key and key["meta"].get("key") == "mark":
        bits = (0xFFFFFFFF, value) if isinstance(value, int) else None
        uses.append(Use("mark", text, bits=bits))
    return uses


def _mentions(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_mentions(inner, key) for inner in value.values())
    if isinstance(value, list):
        return any(_mentions(inner, key) for inner in value)
    return False
