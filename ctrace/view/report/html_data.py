"""What the charts of a report's page draw, as its script takes it."""

from __future__ import annotations

import html
import json
from typing import Any, Optional

from ctrace.model.snapshot import Histogram
from ctrace.recording.review import Review
from ctrace.view import format as fmt

FILLS = 8
LIVES = 6


def escaped(text: str) -> str:
    """Text that is text in HTML, too."""
    return html.escape(fmt.clean(text))


def script_json(data: Any) -> str:
    """JSON that no HTML parser takes for an end of the script."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def chart_data(review: Review) -> dict[str, Any]:
    """What the charts draw. Labels are escaped: the library reads markup in them."""
    line, hooks = review.timeline, review.final.hooks
    names = {str(table.netns): table.name for table in review.final.tables}
    fullest = sorted(line.fill, key=lambda name: -max((v or 0) for v in line.fill[name]))
    stack = review.shares.stacked() if review.shares.ts else {}
    return {
        "timeline": {
            "ts": line.ts,
            "insert": _known(hooks.changes, line.insert),
            "destroy": _known(hooks.changes, line.destroy),
            "drop": _known(hooks.refusals, line.drop),
            "early_drop": _known(hooks.refusals, line.early_drop),
            "lost": line.lost,
            "fill": [
                {"name": "fill " + escaped(names.get(name, name)), "values": line.fill[name]}
                for name in fullest[:FILLS]
            ],
        },
        "drops": review.drops[:200],
        "shares": {
            "ts": review.shares.ts,
            "stack": [{"name": escaped(key), "values": values} for key, values in stack.items()],
        },
        "lives": [
            {
                "name": escaped(culprit.key),
                "life": _histogram(culprit.life_histogram),
                "residence": _histogram(culprit.residence_histogram),
            }
            for culprit in review.final.culprits
            if sum(culprit.residence_histogram.counts)
        ][:LIVES],
    }


def _histogram(histogram: Histogram) -> dict[str, list[float]]:
    """Steps as shares, from the first bin used to the last."""
    counts, edges = histogram.counts, histogram.edges
    used = [i for i, n in enumerate(counts) if n]
    if not used:
        return {"x": [], "y": []}
    first, last, total = used[0], used[-1], sum(counts)
    x = list(edges[first : last + 2])
    x[0] = x[0] or x[1] / 4  # the axis is logarithmic
    y = [counts[i] / total for i in range(first, last + 1)]
    return {"x": [x[0], *x], "y": [0.0, *y, 0.0]}


def _known(seen: bool, values: list[float]) -> list[Optional[float]]:
    """A curve, or a gap where nothing could see it."""
    return [value if seen else None for value in values]
