"""The page about one culprit: everything known of it, in the order that it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from ctrace.batch import DUMP, HookInfo
from ctrace.model.snapshot import Culprit, Histogram, Percentiles, Snapshot, Tuple5
from ctrace.record import Status
from ctrace.view import format as fmt
from ctrace.view.palette import Palette
from ctrace.view.screen.parts import Piece, blank, joined, line, wrapped

LABEL = 10
BARS = 24
"""Longest bar of a histogram, in cells."""
BINS = 12
"""Rows of a histogram: its shape at a glance, and the page's end within reach."""
PEERS, ROWS = 12, 9
"""Peers; and lines of one sentence: the page scrolls, so a narrow one cuts nothing."""


def detail_lines(
    snapshot: Snapshot,
    culprit: Culprit,
    width: int,
    palette: Palette,
    *,
    stale: str = "",
    rates: Sequence[float] = (),
    advice: Sequence[Text] = (),
) -> list[Text]:
    """The page as lines. ``stale`` says why its numbers are not of this moment.

    ``rates`` are its new entries per second, oldest first, for as long as they were seen.
    """
    p = palette
    out = [_title(culprit, width, p)]
    if stale:
        out.append(_labelled("", [(stale, p.warn)], width, p))
    out.append(_labelled("HOLDS", _holds(culprit, snapshot.hooks, width, p), width, p))
    seen = snapshot.hooks.changes
    if seen:
        out.append(_labelled("RATE", _rate(culprit, width, p), width, p))
    else:
        out.append(_labelled("RATE", [("what came and went is not in the dump", p.dim)], width, p))
    if curves := _curves(culprit, rates, width, p):
        out.append(_labelled("", curves, width, p))
    out += _owner(culprit, width, p)
    out.append(_labelled("NAT", _nat(culprit, p), width, p))
    out.append(_labelled("SHAPE", _shape(culprit, width, p), width, p))
    if seen:
        out.append(_labelled("ENDS", _ends(culprit, p), width, p))
    if culprit.states:
        out.append(_labelled("STATES", _states(culprit, p), width, p))
    out.append(blank(width))
    out += _why(snapshot, culprit, width, p)
    out += _histograms(culprit, width, p) if seen else []
    out += advice
    out += _samples(culprit, width, p)
    out += _peers(snapshot, culprit, width, p)
    return out


def _labelled(label: str, pieces: Sequence[Piece], width: int, palette: Palette) -> Text:
    return line([(fmt.fit(label, LABEL), palette.accent), *pieces], width)


def _title(culprit: Culprit, width: int, palette: Palette) -> Text:
    p = palette
    where = fmt.cut(fmt.clean(culprit.netns_name or str(culprit.netns)), 24)
    seen = f"first seen {fmt.clock(culprit.first_seen)}" if culprit.first_seen else ""
    right: list[Piece] = [(f"in {where}  ", p.dim), (seen + " ", p.dim)]
    room = width - sum(len(text) for text, _ in right) - 3
    while right and cell_len(fmt.key(culprit.key, width)) > room and width < 80:
        room += len(right.pop()[0])
    # Here the name stands whole if it possibly can: this is where a cut name is looked up.
    text = line([(fmt.key(culprit.key, room), p.strong)], width, right)
    text.style = p.band
    return text


def _holds(culprit: Culprit, hooks: HookInfo, width: int, palette: Palette) -> list[Piece]:
    p, older = palette, "the first dump" if hooks.family == DUMP else "ctrace"
    stale, part = " (stale)" if culprit.stale else "", f", {fmt.share(culprit.share)} of all"
    groups: list[list[Piece]] = [
        [
            (fmt.held(culprit), p.strong),
            (f" entries now{stale}{part if width >= 60 else ''}", p.text),
        ],
        [(f"{fmt.count(culprit.older)} older than {older}", p.dim)] if culprit.older else [],
        [(f"{fmt.short(culprit.table_seconds)} table-seconds", p.dim)],
    ]
    if not hooks.changes:
        del groups[1:]
    return joined([one for one in groups if one], width - LABEL)


def _rate(culprit: Culprit, width: int, palette: Palette) -> list[Piece]:
    p = palette
    exact = f", at most {fmt.count(culprit.error)} missed" if culprit.error else ""
    groups: list[list[Piece]] = [
        [(fmt.per_second(culprit.new_per_s), p.strong), (" new", p.text)],
        [(f"{fmt.count(culprit.inserts)} made{exact}, {fmt.count(culprit.destroys)} gone", p.text)],
        [
            (f"{fmt.per_second(culprit.drop_per_s)} dropped", p.bad),
            (f", {fmt.count(culprit.drops)} in all", p.bad),
        ]
        if culprit.drops
        else [],
    ]
    return joined([one for one in groups if one], width - LABEL)


def _curves(culprit: Culprit, rates: Sequence[float], width: int, palette: Palette) -> list[Piece]:
    """Its rate, and the entries it holds, over time."""
    p = palette
    room = min(60, (width - LABEL) // 2 - 18)
    groups: list[list[Piece]] = []
    if len(rates) > 1 and room > 4:
        most = f" up to {fmt.per_second(max(rates))}"
        groups.append([("new ", p.dim), (fmt.sparkline(rates, room), p.area), (most, p.dim)])
    if culprit.trend and room > 4:
        curve = fmt.sparkline(culprit.trend, room)
        groups.append([("held ", p.dim), (curve, p.area), (" 1 min", p.dim)])
    return joined(groups, width - LABEL)


def _owner(culprit: Culprit, width: int, palette: Palette) -> list[Text]:
    p = palette
    owner = culprit.owner
    if owner is None:
        way = {"in": "it comes in from outside", "forward": "it is forwarded through this host"}
        why = way.get(culprit.direction, "no local process was seen to open it")
        known = fmt.clean(culprit.pod) or "unknown"
        return [
            _labelled(
                "OWNER", [(known, p.text if culprit.pod else p.dim), (f": {why}", p.dim)], width, p
            )
        ]
    role = "listens" if owner.role == "listens" else "opened these flows"
    pieces: list[Piece] = [
        (fmt.clean(owner.comm), p.strong),
        (f"[{owner.pid}]" if owner.pid else "", p.text),
        (f" {role}", p.dim),
    ]
    if owner.unit:
        pieces.append((f"   {fmt.clean(owner.unit)}", p.text))
    out = [_labelled("OWNER", pieces, width, p)]
    if owner.cmdline:
        for words in wrapped(fmt.clean(owner.cmdline), width - LABEL - 2, 2):
            out.append(_labelled("", [(words, p.dim)], width, p))
    return out


def _nat(culprit: Culprit, palette: Palette) -> list[Piece]:
    p = palette
    if culprit.nat in ("", "no"):
        seen = culprit.destroys + culprit.held
        return [("none seen", p.good), (f" on {fmt.plural(seen, 'entry', 'entries')}", p.dim)]
    names = {"src": "source", "dst": "destination"}
    sides = " and ".join(names.get(word, word) for word in culprit.nat.split(","))
    return [(f"{sides} rewritten", p.warn), (": NOTRACK would break these flows", p.text)]


def _shape(culprit: Culprit, width: int, palette: Palette) -> list[Piece]:
    p = palette
    groups: list[list[Piece]] = [
        [(name + " ", p.dim), (fmt.share(value), p.text)]
        for name, value in (
            ("pinned (ASSURED)", culprit.assured),
            ("never answered", culprit.unreplied),
            ("closed before the end", culprit.closed),
        )
        if value is not None
    ]
    if culprit.direction:
        groups.append([("way ", p.dim), (culprit.direction, p.text)])
    if culprit.distinct_src:
        about = "" if culprit.distinct_src < 20 else "about "
        groups.append([(about + fmt.plural(culprit.distinct_src, "source"), p.text)])
    return joined(groups, width - LABEL) or [(fmt.UNKNOWN, p.dim)]


def _ends(culprit: Culprit, palette: Palette) -> list[Piece]:
    p = palette
    ends = culprit.ends
    named = (
        ("expired", ends.expired, p.text),
        ("evicted", ends.evicted, p.warn),
        ("deleted", ends.deleted, p.text),
        ("other", ends.other, p.dim),
    )
    total = sum(number for _, number, _ in named)
    if not total:
        return [("none has ended yet", p.dim)]
    out: list[Piece] = []
    for name, number, style in named:
        if number:
            out.append((f"{name} ", p.dim))
            out.append((f"{fmt.count(number)} ({fmt.share(number / total)})   ", style))
    return out


def _states(culprit: Culprit, palette: Palette) -> list[Piece]:
    total = sum(number for _, number in culprit.states) or 1
    out: list[Piece] = []
    for name, number in culprit.states[:5]:
        out.append((f"{fmt.clean(name)} ", palette.text))
        out.append((f"{fmt.share(number / total)}   ", palette.dim))
    return out


def _histograms(culprit: Culprit, width: int, palette: Palette) -> list[Text]:
    p = palette
    beside = width >= 96
    each = width // 2 if beside else width
    lives, stays = culprit.life_histogram, culprit.residence_histogram
    life = _histogram("LIFE", "first to last packet", culprit.life, lives, each, p)
    stay = _histogram("IN TABLE", "from insert to destroy", culprit.residence, stays, each, p)
    if not beside:
        return [*life, blank(width), *stay, blank(width)]
    half = width // 2
    rows = max(len(life), len(stay))
    life += [blank(half)] * (rows - len(life))
    stay += [blank(half)] * (rows - len(stay))
    out = []
    for one, two in zip(life, stay):
        whole = Text("", no_wrap=True, end="").join([one, two])
        whole.truncate(width, pad=True)
        out.append(whole)
    return [*out, blank(width)]


def _histogram(
    label: str, what: str, values: Percentiles, histogram: Histogram, width: int, palette: Palette
) -> list[Text]:
    p = palette
    if not values.n:
        words = wrapped(f"{what}: none measured yet", width - LABEL - 2, 2)
        return [
            _labelled("" if y else label, [(one, p.dim)], width, p) for y, one in enumerate(words)
        ]
    groups: list[list[Piece]] = [
        [(f"{name} ", p.dim), (fmt.duration(value), p.strong)]
        for name, value in (("p50", values.p50), ("p90", values.p90), ("p99", values.p99))
    ]
    groups.append([(what, p.dim)])
    out = [_labelled(label, joined(groups, width - LABEL - 1, "  "), width, p)]
    edges, counts = _coarse(histogram)
    highest = max(counts, default=0)
    for index, number in enumerate(counts):
        bar = fmt.hbar(number / highest, min(BARS, width - 32))
        out.append(
            line(
                [
                    (f"{fmt.duration(edges[index]):>8} – ", p.dim),  # noqa: RUF001
                    (f"{fmt.duration(edges[index + 1]):<8}", p.dim),
                    (f"{fmt.short(number):>6} ", p.text if number else p.dim),
                    (bar, p.area),
                ],
                width,
            )
        )
    return out


def _coarse(histogram: Histogram) -> tuple[Sequence[float], Sequence[int]]:
    """Edges and counts from the first bin with anything in it to the last, in ``BINS`` at most."""
    filled = [index for index, number in enumerate(histogram.counts) if number]
    if not filled:
        return (), ()
    counts = histogram.counts[filled[0] : filled[-1] + 1]
    edges = histogram.edges[filled[0] : filled[-1] + 2]
    step = -(-len(counts) // BINS)
    summed = [sum(counts[at : at + step]) for at in range(0, len(counts), step)]
    return (*edges[:-1:step], edges[-1]), summed


def _why(snapshot: Snapshot, culprit: Culprit, width: int, palette: Palette) -> list[Text]:
    p = palette
    out: list[Text] = []
    for cause in snapshot.why:
        if culprit.port is None or (cause.proto, cause.port) != (culprit.proto, culprit.port):
            continue
        for index, words in enumerate(wrapped(fmt.prose(cause.text), width - LABEL - 2, ROWS)):
            out.append(_labelled("" if index else "WHY", [(words, p.strong)], width, p))
        for fact in cause.evidence:
            for words in wrapped(f"· {fmt.prose(fact)}", width - LABEL - 2, ROWS):
                out.append(_labelled("", [(words, p.dim)], width, p))
        if cause.remedy:
            for index, words in enumerate(
                wrapped(fmt.prose(cause.remedy), width - LABEL - 2, ROWS)
            ):
                out.append(_labelled("" if index else "HELPS", [(words, p.text)], width, p))
    return [*out, blank(width)] if out else out


def _samples(culprit: Culprit, width: int, palette: Palette) -> list[Text]:
    p = palette
    if not culprit.samples:
        return []
    out = [_section(f"SAMPLES  {fmt.plural(len(culprit.samples), 'flow')}", width, p)]
    for flow in culprit.samples:
        out.append(line(flow_pieces(flow, width, p), width))
    return [*out, blank(width)]


def flow_pieces(flow: Tuple5, width: int, palette: Palette) -> list[Piece]:
    """A flow as conntrack -L would tell it, in reading order."""
    p = palette
    state = " ".join(one for one in (fmt.clean(flow.state), _status(flow.status)) if one)
    way = f"{endpoint(flow.src, flow.sport)} {fmt.ARROW} {endpoint(flow.dst, flow.dport)}"
    groups: list[list[Piece]] = [
        [(f"{fmt.clean(flow.proto)} ", p.dim),
         (way, p.text)],
        [(state, p.dim)] if state else [],
        [("reply ", p.dim),
         (f"{endpoint(flow.reply_src, flow.reply_sport)} {fmt.ARROW} "
          f"{endpoint(flow.reply_dst, flow.reply_dport)}", p.dim)] if flow.reply_src else [],
    ]  # fmt: skip
    return joined([one for one in groups if one], width, "  ")


def endpoint(address: str, port: int) -> str:
    """``10.0.0.1:80`` and ``[fd00::1]:80``; without a port just the address."""
    address = fmt.clean(address)
    if not port:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _status(bits: int) -> str:
    shown = (Status.ASSURED, Status.SRC_NAT, Status.DST_NAT, Status.HELPER, Status.OFFLOAD)
    names = [flag.name or "" for flag in shown if bits & flag]
    if bits and not bits & Status.SEEN_REPLY:
        names.insert(0, "UNREPLIED")
    return " ".join(names)


def _peers(snapshot: Snapshot, culprit: Culprit, width: int, palette: Palette) -> list[Text]:
    """Others that share its source or its service: who it talks to, and who else does."""
    p = palette
    found = _others(snapshot, culprit)
    if not found:
        return []
    out = [_section(f"PEERS  {fmt.plural(len(found), 'row')} with its source or service", width, p)]
    room = max(10, width - 30)
    longest = min(room, max(len(key) for key, _, _ in found) + 1)
    for key, new, held in found:
        stays = f"{fmt.count(held)} held" if held is not None else ""
        out.append(
            line(
                [
                    (fmt.fit(fmt.key(key, longest), longest), p.text),
                    (f"{new:>10} new", p.dim),
                    (f"{stays:>16}", p.dim),
                ],
                width,
            )
        )
    return [*out, blank(width)]


def _others(snapshot: Snapshot, culprit: Culprit) -> list[tuple[str, str, Optional[int]]]:
    """(key, new per second, held if known), the busiest first."""
    service = f"{culprit.proto}/{culprit.port}" if culprit.port is not None else ""

    def shares(key: str) -> bool:
        src, _, target = key.partition(" -> ")
        return bool(culprit.src and src == culprit.src) or bool(service and target == service)

    seen = snapshot.hooks.changes
    found: dict[str, tuple[float, Optional[int]]] = {}
    if snapshot.group == "pair":
        found = {
            one.key: (one.new_per_s, one.held)
            for one in snapshot.culprits
            if shares(f"{one.src} -> {one.proto}/{one.port}")
        }
    for key, rate in snapshot.top.get("pair", ()):
        if shares(key):
            found.setdefault(key, (rate, None))
    found.pop(culprit.key, None)
    ranked = sorted(found.items(), key=lambda item: -item[1][0])[:PEERS]
    return [
        (key, fmt.per_second(rate) if seen else fmt.UNKNOWN, held) for key, (rate, held) in ranked
    ]


def _section(title: str, width: int, palette: Palette) -> Text:
    name, _, rest = title.partition("  ")
    text = line([(name, palette.accent), ("  " + rest, Style())], width)
    text.style = palette.band
    return text
