"""A rule of ``nft -j`` roughly as nft prints it: to be recognised, not to be parsed."""

from __future__ import annotations

from typing import Any


def as_text(expr: list[Any]) -> str:
    """A rule roughly as nft prints it, so that its author recognises it; not to be parsed."""
    return " ".join(_words(part) for part in expr if not _is(part, "counter"))[:200]


def _is(part: Any, kind: str) -> bool:
    return isinstance(part, dict) and kind in part


def _words(part: Any) -> str:  # noqa: PLR0911, PLR0912
    if not isinstance(part, dict):
        if isinstance(part, list):
            return ",".join(_words(item) for item in part)
        return "" if part is None else str(part)
    kind, body = next(iter(part.items()))
    if kind == "match":
        op = "" if body["op"] in ("==", "in") else f"{body['op']} "
        return f"{_words(body['left'])} {op}{_words(body['right'])}"
    if kind == "payload":
        return " ".join(str(body[k]) for k in ("protocol", "field") if k in body) or (
            f"@{body.get('base')},{body.get('offset')},{body.get('len')}"
        )
    if kind in ("meta", "ct") and isinstance(body, dict):
        key = str(body.get("key", ""))
        return key if key.startswith(("iif", "oif")) else f"{kind} {key}"
    if kind == "fib":
        return "fib " + _words(body.get("flags")) + " " + str(body.get("result"))
    if kind == "set":
        items = body if isinstance(body, list) else [body.get("op", ""), body.get("set", "")]
        return "{ " + ", ".join(_words(item) for item in items[:8]) + " }"
    if kind == "prefix":
        return f"{body['addr']}/{body['len']}"
    if kind == "range":
        return "-".join(str(end) for end in body)
    if kind in ("|", "&"):
        return f" {kind} ".join(_words(item) for item in body)
    if kind == "concat":
        return " . ".join(_words(item) for item in body)
    if kind in ("jump", "goto"):
        return f"{kind} {body['target']}"
    if kind == "mangle":
        return f"{_words(body['key'])} set {_words(body['value'])}"
    if kind == "vmap":
        return f"{_words(body['key'])} vmap {_words(body['data'])}"
    if isinstance(body, dict):
        inner = " ".join(str(v) for v in body.values() if isinstance(v, (str, int)))
        return f"{kind} {inner}".strip()
    return f"{kind} {_words(body)}".strip()
