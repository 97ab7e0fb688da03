"""What text dumps show, in sentences: how each is known, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any, Optional

from ctrace.model.causes.room import HIGH
from ctrace.model.causes.words import when, where
from ctrace.recording.format.evidence import log_of
from ctrace.view import format as fmt

KNOWN_BY = {
    "told": "as the text says",
    "file": "by the file's date",
    "now": "when it was imported",
    "clock": "by the times between dumps",
    "countdown": "by how far timeouts went down",
}
RULES = (
    "nft list ruleset, iptables-save -c, ip -d addr, ip route show table all, ip rule, tc qdisc "
    "and sysctl -a (ctrace collect gathers all of it)"
)


def sentences(data: dict[str, Any]) -> list[tuple[str, str]]:
    """(heading, text) of all that the texts tell, most telling first."""
    found: list[tuple[str, Optional[str]]] = [
        ("Full", _full(data)),
        ("Kernel", _kernel(data)),
        *(("Table", text) for text in _tables(data)),
        ("Memory", _memory(data)),
        ("Read", _when(data)),
        ("Holds", _holds(data)),
        ("States", _states(data)),
        *(("Time left", text) for text in _left(data)),
        ("Status", _status(data)),
        ("Events", _events(data)),
        ("Modules", _modules(data)),
        ("Rules", _rules(data)),
        *(("May help", text) for text in _helps(data)),
        ("Not read", _unread(data)),
    ]
    return [(head, fmt.prose(text)) for head, text in found if text]


def imported(data: dict[str, Any], path: str, events: int) -> Iterator[str]:
    """The summary that ``ctrace import`` prints."""
    what = ["no list of entries"]
    if data.get("dumps"):
        what = [f"{fmt.plural(data.get('entries', 0), 'entry', 'entries')} in the last dump"]
    if data.get("inserts") is not None:
        what = [_came_and_went(data)]
    yield fmt.clean(
        f"{path}: {fmt.plural(data.get('lines', 0), 'line')}, {', '.join(what)}, "
        f"{fmt.plural(events, 'record')}"
    )
    unread = _unread(data)
    if unread:
        yield fmt.clean(unread)


def _came_and_went(data: dict[str, Any]) -> str:
    return f"{fmt.plural(data['inserts'], 'insert')}, {fmt.plural(data['destroys'], 'end')}"


def _share(part: int, whole: int) -> str:
    return f"{fmt.count(part)} ({fmt.share(part / whole)})" if whole else fmt.count(part)


def _full(data: dict[str, Any]) -> Optional[str]:
    log = log_of(data)
    if log is None:
        return None
    text = f"the kernel logged {fmt.plural(log.full, 'time')} that the table was full"
    hosts = (data.get("log") or {}).get("hosts") or []
    if len(hosts) > 1:
        shown = ", ".join(hosts[:5]) + (", ..." if len(hosts) > 5 else "")
        text += f", in the logs of {len(hosts)} hosts ({shown}) together"
    text += f"{where(log)}, {when(log)}"
    hidden = log.refused - log.full
    if hidden:
        text += f", and kept {fmt.plural(hidden, 'message')} back"
    text += f": at least {fmt.plural(log.refused, 'packet')} refused"
    if hidden:
        text += " (its limit, net_ratelimit, counts all of networking's warnings)"
    return text


def _utc(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return "an unknown time"


def _kernel(data: dict[str, Any]) -> Optional[str]:
    counted = {name: n for name, n in (data.get("kernel_counted") or {}).items() if n}
    if not counted:
        return None
    parts = ", ".join(f"{name} {fmt.count(n)}" for name, n in counted.items())
    text = f"since the module was loaded it counted {parts}"
    between = data.get("counted_between")
    if between:
        seconds = between["seconds"]
        up = [
            f"{name} {fmt.count(n)}" + (f" ({fmt.rate(n / seconds)}/s)" if seconds else "")
            for name, n in between["counts"].items()
            if n
        ]
        apart = f", {seconds:g} s apart" if seconds else ""
        text += f"; from the first reading to the last{apart}: {', '.join(up) or 'none of them'}"
    return text


def _tables(data: dict[str, Any]) -> Iterator[Optional[str]]:
    tables = data.get("tables") or []
    if not tables:
        yield _table(data)
    for one in tables:
        yield f"{one['netns']}: {_table({**one, 'dumps': [one] if one['entries'] else []})}"


def _table(data: dict[str, Any]) -> Optional[str]:
    entries, count, limit = data.get("entries") or None, data.get("count"), data.get("max")
    dumps = data.get("dumps") or []
    held = entries if count is None else count
    if held is None:
        if limit is None:
            return None
        most = f"at most {fmt.plural(limit, 'entry', 'entries')}" if limit else "no maximum is set"
        return f"{most}; how many it held is not in the texts"
    text = fmt.plural(held, "entry", "entries")
    if count is None and dumps and dumps[-1].get("cut"):
        most = f" of the {fmt.count(limit)} that may be" if limit else ""
        verb = "is" if held == 1 else "are"
        return f"{text} {verb} shown{most}: a part of the table, and how many it held is not told"
    if limit:
        text += f" of {fmt.count(limit)} ({fmt.share(held / limit)})"
    elif limit is None:
        text += "; the maximum is not in the texts, so neither is the fill"
    else:
        text += "; no maximum is set"
    if data.get("counts"):
        n, least, most = data["counts"]
        text += f"; {n} readings of its count, from {fmt.count(least)} to {fmt.count(most)}"
    if entries is None:
        text += "; none of them is listed in the texts" if held else ""
    elif entries < 0.9 * held:
        text += f"; the dump shows {fmt.count(entries)} of them"
    elif entries > 1.1 * held:
        text += f"; the dump, of another moment, shows {fmt.count(entries)}"
    return text


def _memory(data: dict[str, Any]) -> Optional[str]:
    size, limit = data.get("entry_bytes"), data.get("max")
    if not size:
        return None
    text = f"an entry takes {fmt.plural(size, 'byte')} there, by slabinfo"
    return text + (f": a full table {fmt.count(size * limit >> 20)} MiB" if limit else "")


def _when(data: dict[str, Any]) -> Optional[str]:
    dumps = data.get("dumps") or []
    if not dumps:
        return None
    last = dumps[-1]
    text = f"{fmt.plural(len(dumps), 'dump')}, "
    text += f"the last of {_utc(last['at'])} UTC, {KNOWN_BY.get(last['known_by'], '')}"
    apart = [one["apart"] for one in dumps if one.get("apart")]
    if apart:
        low, high = min(apart), max(apart)
        text += f"; {low:g} s apart" if low == high else f"; {low:g} to {high:g} s apart"
    said = last.get("said")
    if said is not None and said != last["entries"]:
        text += (
            f"; conntrack showed {fmt.plural(said, 'entry', 'entries')}, and the texts have "
            f"{fmt.count(last['entries'])}"
        )
    if data.get("left_out"):
        text += (
            f"; {fmt.plural(data['left_out'], 'dump')} left out, as nothing tells that it was this "
            "table, or how long before"
        )
    return text


def _holds(data: dict[str, Any]) -> Optional[str]:
    total = data.get("entries") or 0
    services = data.get("services") or []
    if not services:
        return None
    shown = [f"{name} {state}".strip() + f" {_share(n, total)}" for name, state, n in services[:6]]
    return ", ".join(shown)


def _states(data: dict[str, Any]) -> Optional[str]:
    total = data.get("entries") or 0
    by = data.get("by") or {}
    kinds = ", ".join(f"{kind} {_share(n, total)}" for kind, n in list(by.items())[:10])
    parts = [kinds] if kinds else []
    for name in ("dying", "unconfirmed", "deleted"):
        if data.get(name):
            parts.append(f"beside the table {fmt.count(data[name])} {name}")
    if data.get("expectations"):
        parts.append(f"{fmt.plural(data['expectations'], 'expectation')} of helpers")
    return "; ".join(parts) or None


def _left(data: dict[str, Any]) -> Iterator[str]:
    for row in (data.get("remaining") or [])[:5]:
        low, middle, high = row["left"]
        text = f"{row['kind']}: {_span(low, high)} until they expire"
        text += f", half within {middle} s" if low < high else ""
        if "idle" in row:
            text += (
                f"; so {_span(row['idle'][0], row['idle'][2])} since the last packet "
                f"(timeout {row['timeout']} s)"
            )
        else:
            text += "; since when is not known without the timeout"
        yield text


def _span(low: int, high: int) -> str:
    return f"{low} to {high} s" if low < high else f"{low} s"


def _status(data: dict[str, Any]) -> Optional[str]:
    total = data.get("entries") or 0
    if not total:
        return None
    parts = [
        f"{what} {_share(data.get(name, 0), total)}"
        for name, what in (
            ("src_nat", "source translated"),
            ("dst_nat", "destination translated"),
            ("unreplied", "without a reply"),
            ("assured", "ASSURED (never evicted)"),
            ("offloaded", "offloaded"),
            ("helped", "with a helper"),
        )
        if data.get(name) or name in ("unreplied", "assured")
    ]
    return ", ".join(parts)


def _events(data: dict[str, Any]) -> Optional[str]:
    if data.get("inserts") is None:
        return None
    text = _came_and_went(data)
    if data.get("losses_told"):
        text += "; conntrack said that it lost events, so these are lower bounds"
    return text


def _modules(data: dict[str, Any]) -> Optional[str]:
    held = data.get("held_by") or []
    if not held:
        return None
    return (
        f"nf_conntrack is held by {', '.join(held)}. None of them has to be removed: NOTRACK "
        "keeps flows out of the table while they stay loaded"
    )


def _rules(data: dict[str, Any]) -> Optional[str]:
    rules = data.get("rules") or {}
    if not (data.get("entries") or data.get("inserts")) or any(rules.values()):
        return None
    listed = " and ".join(data.get("rules_listed") or ())
    less = f" ({listed} of one table do not show all of them)" if listed else ""
    return (
        f"not in the texts{less}. Whether packets fare the same without tracking can only be "
        f"tried with them: add the output of {RULES}"
    )


def _helps(data: dict[str, Any]) -> Iterator[str]:
    """What could keep the table from filling, each with what would prove it."""
    services, total = data.get("services") or [], data.get("entries") or 0
    if not services or not _was_short(data):
        return
    name, state, n = services[0]
    proto, _, port = name.partition("/")
    if proto in ("tcp", "udp") and port:
        given = any((data.get("rules") or {}).values())
        proof = "" if given else ", once its rules are in the texts"
        yield (
            f"NOTRACK for {name}, by --dport {port} and --sport {port} in PREROUTING and OUTPUT of "
            f"the raw table: of the {fmt.plural(total, 'entry', 'entries')} shown it would keep "
            f"{fmt.count(n)} out. Whether packets fare the same, ctrace advise proves{proof}"
        )
    if state in ("TIME_WAIT", "CLOSE_WAIT", "FIN_WAIT", "LAST_ACK", "CLOSE"):
        proof = "two dumps some seconds apart prove"
        if any(one.get("apart") for one in data.get("dumps") or ()):
            proof = f"ctrace whatif --timeout tcp_{state.lower()}=30s tells from these dumps"
        yield (
            f"a shorter nf_conntrack_tcp_timeout_{state.lower()}: how many entries it would save, "
            f"{proof}"
        )
    yield (
        "a larger nf_conntrack_max: how many entries it takes, a look at the table while it is "
        "full, or a recording, proves"
    )


def _was_short(data: dict[str, Any]) -> bool:
    """Whether anything tells that the table was full, or nearly."""
    counted = data.get("kernel_counted") or {}
    tables = data.get("tables") or [data]
    return bool(
        data.get("full_seen")
        or counted.get("drop")
        or counted.get("early_drop")
        or any(one.get("max") and max(_held(one)) >= HIGH * one["max"] for one in tables)
    )


def _held(one: dict[str, Any]) -> list[int]:
    """Every number of entries that a table is told to have held."""
    return [one.get("count") or one.get("entries") or 0, *(one.get("counts") or ())[2:]]


def _unread(data: dict[str, Any]) -> Optional[str]:
    n = data.get("not_understood") or 0
    if not n:
        return None
    first = data.get("unread") or []
    shown = "; ".join(
        f"{file} line {line}: {why}" if line else why for file, line, why in first[:5]
    )
    files = any(not line for _, line, _ in first)
    words = ("line or file", "lines or files") if files else ("line",)
    return f"{fmt.plural(n, *words)} not understood" + (f": {shown}" if shown else "")
