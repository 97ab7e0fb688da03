"""Two recordings side by side: keys that came, went, or are not listed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kit import shapes, synthetic

import ctrace
from ctrace.recording import compare as compared
from ctrace.recording.compare import Comparison, Side, compare
from ctrace.recording.review import review
from ctrace.recording.writer import Writer

SECONDS = 40
CALLS, LINGER = 100, 5.0
STRANGERS = 0x0A010000


def recorded(
    path: Path, strangers: int, *, first: int = STRANGERS, failures: int = 0, beside: bool = False
) -> Path:
    """Calls of one client that end long before the recording does; strangers open one
    connection each, and hold it."""
    load = shapes.Trace()
    load.flows(np.arange(CALLS * 20) / CALLS, 0.01, LINGER - 0.01)
    load.flows(
        np.linspace(30, 38, strangers), 0.01, 60, src=first + np.arange(strangers), dport=443
    )
    if beside:
        load.flows(np.arange(20.0), 0.01, LINGER, netns=shapes.NETNS + 7)
    if failures:
        load.failures(np.linspace(5, 20, failures), dport=443)
    with Writer(str(path), synthetic.header(shapes.START)) as writer:
        for batch in load.batches(SECONDS):
            writer.write(batch)
    return path


def sides(before: Path, after: Path, group: str) -> tuple[Comparison, dict[str, tuple[Side, Side]]]:
    with ctrace.open(str(before)) as first, ctrace.open(str(after)) as second:
        found = compare(first, second, group)
    return found, {change.key: (change.before, change.after) for change in found.changes}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("many") / "r", 3000, failures=80)


@pytest.mark.slow
def test_what_filled_the_table_and_has_gone_is_first_in_the_report(many: Path) -> None:
    """More keys than a report ranks hold something at the end."""
    with ctrace.open(str(many)) as recording:
        found = review(recording, group="src")
    first = found.final.culprits[0]
    assert first.key == "10.0.0.7"
    assert first.held == 0
    assert first.table_seconds == pytest.approx(CALLS * 20 * LINGER, rel=0.05)


@pytest.mark.slow
def test_sums_are_of_all_keys_and_one_not_listed_is_unknown(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = recorded(tmp_path / "few", 2, first=STRANGERS + 2999)
    whole, _ = sides(many, few, "src")
    monkeypatch.setattr(compared, "KEYS", 2)
    found, keys = sides(many, few, "src")
    assert found.before == whole.before
    assert found.after == whole.after
    assert (whole.complete, found.complete) == (True, False)
    held = sum(c.before.held or 0.0 for c in whole.changes)
    assert found.before.held == pytest.approx(held, rel=0.01)
    before, after = keys["10.0.0.7"]
    assert before.held == pytest.approx(CALLS * 20 * LINGER / SECONDS, rel=0.05)
    assert after.held == pytest.approx(before.held)
    unlisted = [b for key, (b, _) in keys.items() if key == "10.1.11.183"]
    assert unlisted == [Side(None, None, held=None, share=None)]


def test_a_namespace_that_came_does_not_rename_what_was_there(many: Path, tmp_path: Path) -> None:
    _, keys = sides(many, recorded(tmp_path / "beside", 2, beside=True), "service")
    (name,) = [key for key, (b, a) in keys.items() if "8063" in key and b.held and a.held]
    assert str(shapes.NETNS) in name
    (new,) = [pair for key, pair in keys.items() if str(shapes.NETNS + 7) in key]
    assert new[0] == Side()


def test_inserts_that_failed_are_compared(many: Path, tmp_path: Path) -> None:
    found, _ = sides(many, recorded(tmp_path / "few", 2), "service")
    assert found.before.failed_per_s == pytest.approx(80 / SECONDS, rel=0.05)
    assert found.after.failed_per_s == 0
