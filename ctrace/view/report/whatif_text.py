"""What would have happened, as text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Optional

from ctrace.model.snapshot import Rising
from ctrace.view import format as fmt
from ctrace.whatif.answer import FORETOLD, TRUST, Place, WhatIf, memory_of


def whatif_text(answer: WhatIf) -> str:
    """The whole answer, lines ended."""
    return "\n".join(_render(answer)) + "\n"


def _render(answer: WhatIf) -> Iterator[str]:
    yield f"What if: {answer.levers}, over {answer.seconds:.0f} s"
    for place in answer.places:
        then, model, would = place.recorded, place.modelled, place.changed
        yield ""
        yield f"{place.name}"
        yield f"  {'':24}{'mean':>10}{'peak':>10}{'of max':>9}{'refused':>10}{'evicted':>10}"
        for label, outcome, limit in (
            ("then, as counted", then, place.limit),
            ("then, in the model", model, place.limit),
            ("with the change", would, place.new_limit),
        ):
            fill = (
                f"{100 * (outcome.peak / limit):.0f} %"
                if limit and not math.isnan(outcome.peak)
                else "-"
            )
            yield (
                f"  {label:24}{_whole(outcome.mean):>10}{_whole(outcome.peak):>10}{fill:>9}"
                f"{_number(outcome.drops):>10}{_number(outcome.evictions):>10}"
            )
        low, high = would.mean_range
        if high >= 1:
            least, most = would.peak_range
            yield (
                f"  with the change the mean lies between {_whole(low)} and {_whole(high)}, the "
                f"peak between {_whole(least)} and {_whole(most)}"
            )
            yield f"  the kernel collects expired entries about every {answer.interval_s:.0f} s"
            if vague_text(place):
                yield f"  {vague_text(place)}"
        if place.rising is not None:
            yield f"  {rising_text(place.rising)}"
        if place.new_limit not in (0, place.limit):
            least, most = memory_of(place.new_limit, answer.levers.buckets)
            yield f"  a full table of {place.new_limit:,} takes {least >> 20} to {most >> 20} MiB"
        yield f"  {trust_text(place)}"
    for note in answer.notes:
        yield f"Note: {note}"


def trust_text(place: Place) -> str:
    """The model's error where it could be checked, in words."""
    if place.replay_error is None:
        return "the model could not be checked against this recording: do not trust it"
    if place.replay_error > TRUST:
        return (
            f"the events match the kernel's counts only to within {_percent(place.replay_error)}"
            f": above {_percent(TRUST)}, do not trust it"
        )
    if place.error is None:
        return (
            "the recording is too short, or too little happened, to predict its second half from "
            "its first: the model's error is unknown, so do not trust it"
        )
    text = (
        "predicting the second half of the recording from the first was off by "
        f"{_percent(place.error)} of the count, {100 * (place.drop_error or 0.0):+.1f} % of all "
        "tries refused"
    )
    if place.trusted:
        return text
    return f"{text}: above {_percent(FORETOLD)} and {_percent(TRUST)}, do not trust it"


def vague_text(place: Place) -> str:
    """Says that a range is wider than the predicted change; empty where none is."""
    if not place.vague:
        return ""
    which = " and of the ".join(place.vague)
    many = "s" if len(place.vague) > 1 else ""
    wide = "may be wider than twice the change"
    return f"the range{many} of the {which} {wide}: a longer recording tells more"


def rising_text(rising: Rising) -> str:
    """``still rising, by 38 to 42 entries a second; full in 90 to 110 min``."""
    slow, fast = rising.per_s
    rate = _between(fmt.count(slow), fmt.count(fast))
    text = f"still rising, by {rate} entries a second"
    if rising.full_s is None:
        return text
    soon, late = rising.full_s
    return f"{text}; full in {_between(fmt.duration(soon), fmt.duration(late))}"


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %".replace(".0 %", " %")


def _number(value: Optional[int]) -> str:
    return fmt.UNKNOWN if value is None else f"{value:,}"


def _whole(value: float) -> str:
    return "-" if math.isnan(value) else fmt.count(value)
