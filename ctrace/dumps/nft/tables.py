"""``nft list ruleset`` as people print it, in the form of ``nft -j list ruleset``.

Only what ctrace.ruleset.nft reads is put over; a statement that is not known ends its rule as
one that may do anything (``xt``), so nothing is taken for understood that was not.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ctrace.dumps.nft.expressions import Json, Unknown, elements
from ctrace.dumps.nft.statements import statement
from ctrace.dumps.nft.words import Tokens, lines
from ctrace.ruleset.nft import PRIORITIES

FAMILIES: Final = ("ip", "ip6", "inet", "arp", "bridge", "netdev")


def to_json(text: str) -> Json:
    """The objects of all tables in the text, as ``nft -j`` orders them. Never raises."""
    reader = _Reader()
    for tokens in lines(text):
        reader.line(tokens)
    return {"nftables": [*reader.out, *reader.rules]}


class _Reader:
    """Where in the listing a line stands: in no table, in one, or in one of its objects."""

    def __init__(self) -> None:
        self.out: list[Json] = []
        self.rules: list[Json] = []
        """Of the table that is being read: they come behind all that it has."""
        self._depth = 0
        self._family = self._table = self._kind = self._name = ""
        self._body: Json = {}

    def line(self, tokens: Tokens) -> None:
        """One line, or the elements of a set on several."""
        first = tokens.peek()
        if first == "}":
            self._close()
        elif self._depth == 0 and first == "table":
            self._begin_table(tokens)
        elif self._depth == 1 and tokens.last() == "{":
            words = tokens.rest()
            self._kind, self._name = words[0], words[-2:][0]
            self._body = {"family": self._family, "table": self._table, "name": self._name}
            self._depth = 2
        elif self._depth == 2 and self._kind == "chain":
            self._in_chain(tokens)
        elif self._depth == 2 and self._kind in ("set", "map"):
            self._body.update(_of_set(tokens))

    def _begin_table(self, tokens: Tokens) -> None:
        words = [word for word in tokens.rest()[1:] if word != "{"] or [""]
        named = words[0] in FAMILIES and len(words) > 1
        self._family, self._table = (words[0], words[1]) if named else ("ip", words[0])
        self.out.append({"table": {"family": self._family, "name": self._table}})
        self._depth = 1

    def _in_chain(self, tokens: Tokens) -> None:
        if tokens.peek() == "type":
            self._body.update(_hook(tokens))
        elif tokens.peek() != "comment":
            place = {"family": self._family, "table": self._table, "chain": self._name}
            self.rules.append({"rule": {**place, **rule(tokens)}})

    def _close(self) -> None:
        if self._depth == 2 and self._kind in ("set", "map", "chain"):
            self.out.append({self._kind: self._body})
        self._depth = max(0, self._depth - 1)
        if not self._depth:
            self.out += self.rules
            self.rules = []


def _hook(tokens: Tokens) -> Json:
    """``type filter hook input priority filter - 5; policy drop;``"""
    words = [str(one) for one in tokens.rest()]
    found: Json = {}
    for at, word in enumerate(words[:-1]):
        if word in ("type", "hook", "policy"):
            found[word] = words[at + 1]
        elif word == "priority":
            level = words[at + 1 : [*words, ";"].index(";", at)]
            base = PRIORITIES.get(level[0], 0) if level else 0
            text = "".join(level if level and level[0] not in PRIORITIES else level[1:])
            found["prio"] = base + (int(text) if re.fullmatch(r"[+-]?\d{1,9}", text) else 0)
    return found


def _of_set(tokens: Tokens) -> Json:
    """One line of a set or map."""
    word = tokens.take()
    if word == "elements":
        tokens.skip("=")
        return {"elem": elements(tokens)}
    words = [str(one) for one in tokens.rest() if one not in (";", ",")]
    if word == "flags":
        return {"flags": words}
    if word in ("type", "typeof"):
        kind = " ".join(words).partition(" : ")
        return {"type": kind[0], **({"map": kind[2]} if kind[2] else {})}
    return {word: words[0]} if word in ("size", "timeout") and words else {}


def rule(tokens: Tokens) -> Json:
    """One rule: its statements, and its comment."""
    expr: list[Any] = []
    made: Json = {"expr": expr}
    while not tokens.done:
        if tokens.peek() == "comment":
            tokens.take()
            made["comment"] = str(tokens.take())
            continue
        rest = " ".join(str(one) for one in tokens.rest(keep=True))
        try:
            expr += statement(tokens)
        except (Unknown, IndexError, KeyError, TypeError, ValueError):
            expr.append({"xt": {"type": "text", "name": rest[:200]}})
            break
    return made
