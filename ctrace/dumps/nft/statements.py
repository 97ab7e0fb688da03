"""Statements of rules by their first word: what is not known here is said to be so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from ctrace.dumps.nft.expressions import PAYLOADS, Json, Unknown, elements, joined, match, verdict
from ctrace.dumps.nft.words import Tokens, value

LOG: Final = ("prefix", "level", "group", "snaplen", "queue-threshold", "flags")
NAT_FLAGS: Final = ("random", "fully-random", "persistent")


def statement(tokens: Tokens) -> Iterator[Any]:
    """The next statement. Raises Unknown, or IndexError where the line ends too early."""
    word = str(tokens.peek())
    then = verdict(tokens)
    if then is not None:
        yield then
    elif word in _KNOWN:
        tokens.take()
        yield _KNOWN[word](tokens)
    elif (
        word == "ct"
        and tokens.peek(2) == "set"
        and tokens.peek(1) in ("helper", "timeout", "expectation")
    ):
        tokens.take()
        kind = str(tokens.take())
        tokens.take()
        yield {f"ct {kind}": str(tokens.take())}
    elif word == "ct" and tokens.peek(1) == "count":
        tokens.take()
        tokens.take()
        over = tokens.skip("over")
        yield {"ct count": {"val": value(tokens.take()), **({"inv": True} if over else {})}}
    else:
        yield match(tokens)


def _counter(tokens: Tokens) -> Json:
    if tokens.skip("name"):
        return {"counter": str(tokens.take())}
    found = {}
    while tokens.peek() in ("packets", "bytes"):
        name = str(tokens.take())
        found[name] = value(tokens.take())
    return {"counter": found or None}


def _log(tokens: Tokens) -> Json:
    found: Json = {}
    while tokens.peek() in LOG:
        name = str(tokens.take())
        found[name] = tokens.take()
        while name == "flags" and tokens.peek() in (",", "sequence", "options"):
            tokens.take()
            if tokens.last_taken == ",":
                tokens.take()
    return {"log": found or None}


def _limit(tokens: Tokens) -> Json:
    if tokens.skip("name"):
        return {"limit": str(tokens.take())}
    tokens.skip("rate")
    over = tokens.skip("over")
    rate = str(tokens.take())
    if "/" not in rate:  # 10 mbytes/second
        rate += str(tokens.take())
    number = re.match(r"\d+", rate)
    found: Json = {
        "rate": int(number[0]) if number else 0,
        "burst": 5,
        "per": rate.partition("/")[2],
    }
    if tokens.skip("burst"):
        found["burst"] = value(tokens.take())
        tokens.take()
    return {"limit": {**found, "inv": True} if over else found}


def _quota(tokens: Tokens) -> Json:
    if tokens.skip("name"):
        return {"quota": str(tokens.take())}
    over = tokens.skip("over")
    found = {"val": value(tokens.take()), "val_unit": str(tokens.take())}
    if tokens.skip("used"):
        found |= {"used": value(tokens.take()), "used_unit": str(tokens.take())}
    return {"quota": {**found, "inv": True} if over else found}


def _nat(kind: str) -> Any:
    def read(tokens: Tokens) -> Json:
        found: Json = {}
        while tokens.peek() in ("ip", "ip6", "prefix", "to", "interval"):
            if tokens.take() == "to":
                found |= _target(tokens)
        flags: list[str] = []
        while tokens.peek() in NAT_FLAGS or (flags and tokens.peek() == ","):
            word = tokens.take()
            flags += [str(word)] if word != "," else []
        if flags:
            found["flags"] = flags if len(flags) > 1 else flags[0]
        return {kind: found or None}

    return read


def _target(tokens: Tokens) -> Json:
    """Where NAT sends to: ``10.0.0.2:8080``, ``:8081``, ``[fd00::1]:80``, or by a map."""
    word = str(tokens.peek())
    if word in PAYLOADS or word in ("ct", "meta", "numgen", "jhash", "symhash"):
        if word not in PAYLOADS and word not in ("ct", "meta"):
            raise Unknown(word)
        key = joined(tokens)
        if not tokens.skip("map"):
            raise Unknown(word)
        data = tokens.take() if str(tokens.peek()).startswith("@") else {"set": elements(tokens)}
        return {"addr": {"map": {"key": key, "data": data}}}
    tokens.take()
    end = re.fullmatch(r"(?:\[([^\]]+)\]|([^:]*|[^:]*:[^:]*:.*?))(?::(\d+(?:-\d+)?))?", word)
    if end is None:
        raise Unknown(word)
    address = end[1] or end[2]
    found: Json = {"addr": value(address)} if address else {}
    return {**found, "port": value(end[3])} if end[3] else found


def _all(kind: str) -> Any:
    """A statement whose words reach to the rule's end, or to its comment."""

    def read(tokens: Tokens) -> Json:
        words = []
        while not tokens.done and tokens.peek() != "comment":
            words.append(str(tokens.take()))
        return {kind: {"text": " ".join(words)} if words else None}

    return read


def _to_set(op: str) -> Any:
    def read(tokens: Tokens) -> Json:
        name = str(tokens.take())
        if not name.startswith("@"):
            raise Unknown(name)
        tokens.skip("{")
        elem: Any = joined(tokens)
        made: list[Any] = []
        if tokens.skip("timeout"):
            elem = {"elem": {"val": elem, "timeout": str(tokens.take())}}
        while tokens.peek() not in ("}", ":", ""):
            made += statement(tokens)
        if tokens.peek() == ":":
            raise Unknown(":")
        tokens.skip("}")
        return {"set": {"op": op, "elem": elem, "set": name, **({"stmt": made} if made else {})}}

    return read


def _xt(tokens: Tokens) -> Json:
    return {"xt": {"type": str(tokens.take()), "name": str(tokens.take())}}


def _flow(tokens: Tokens) -> Json:
    return {"flow": {"op": str(tokens.take()), "flowtable": str(tokens.take())}}


def _last(tokens: Tokens) -> Json:
    return {"last": str(tokens.take()) if tokens.skip("used") else None}


_KNOWN: Final[dict[str, Any]] = {
    "counter": _counter,
    "log": _log,
    "limit": _limit,
    "quota": _quota,
    "last": _last,
    "notrack": lambda _: {"notrack": None},
    "xt": _xt,
    "flow": _flow,
    **{name: _nat(name) for name in ("dnat", "snat", "masquerade", "redirect")},
    **{
        name: _all(name)
        for name in ("reject", "queue", "synproxy", "tproxy", "dup", "fwd", "meter")
    },
    **{name: _to_set(name) for name in ("add", "update", "delete")},
}
