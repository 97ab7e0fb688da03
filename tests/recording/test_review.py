"""What a review looks at: the moments that a report tells of, and no more."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kit.synthetic import NETNS, write

from ctrace.batch import Batch
from ctrace.dumps.opened import open_any
from ctrace.model.model import Model
from ctrace.record import Kind
from ctrace.recording.review import Review, review

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def looks() -> list[str]:
    return []


@pytest.fixture(scope="module")
def found(file: Path, looks: list[str]) -> Review:
    whole = Model.snapshot

    def counted(self: Model, *arguments: Any, **options: Any) -> Any:
        looks.append(str(options.get("group")))
        return whole(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, closing(open_any([str(file)])) as source:
        patch.setattr(Model, "snapshot", counted)
        return review(source)


def test_the_moment_before_the_first_refusal_is_just_before_it(
    found: Review, truth: list[Batch]
) -> None:
    before = found.before_drop
    assert before is not None
    assert found.first_drop is not None
    assert before.totals.drop == 0
    assert 0 <= found.first_drop - before.ts / 1e9 <= 0.3
    refused = [bool((b.events["kind"] == int(Kind.DROP)).any()) for b in truth]
    first = refused.index(True)
    held = sum(
        int((b.events["kind"] == int(Kind.INSERT)).sum())
        - int((b.events["kind"] == int(Kind.DESTROY)).sum())
        for b in truth[:first]
    )
    assert sum(c.held for c in before.culprits) <= held


def test_the_fullest_moment_is_where_the_table_was_fullest(
    found: Review, truth: list[Batch]
) -> None:
    read = [t.count for b in truth for t in b.tables if t.netns == NETNS]
    assert found.peak_fill == max(read) / 65536
    assert found.peak is not None
    assert found.peak.tables[0].count >= 0.98 * max(read)


def test_a_host_is_looked_at_as_a_whole_only_where_a_report_tells_of_it(
    found: Review, looks: list[str]
) -> None:
    """Each look explains every namespace: a thousand of them would take minutes."""
    assert found.events
    assert len(looks) <= 30
    moments = found.groupings["service"]
    assert len(moments.ts) > 15
    for held, total in zip(moments.held, moments.total):
        assert sum(held.values()) <= total


def test_what_is_held_over_time_is_what_was_made_and_has_not_gone(
    found: Review, truth: list[Batch]
) -> None:
    moments = found.groupings["service"]
    end = 0
    for batch in truth:
        end += int((batch.events["kind"] == int(Kind.INSERT)).sum())
        end -= int((batch.events["kind"] == int(Kind.DESTROY)).sum())
    assert sum(moments.held[-1].values()) == end


@pytest.mark.parametrize("batches", [7, 8])
def test_no_table_ends_fuller_than_it_ever_was(
    truth: list[Batch], tmp_path: Path, batches: int
) -> None:
    """A rising table is read each second; the recording ends between two readings, or at one."""
    held = sum(
        int((b.events["kind"] == int(Kind.INSERT)).sum())
        - int((b.events["kind"] == int(Kind.DESTROY)).sum())
        for b in truth[:batches]
    )
    with closing(open_any([str(write(tmp_path / "rising.data", truth[:batches]))])) as source:
        found = review(source)
    assert found.final.tables[0].count == held
    assert found.peak_fill == held / 65536 == max(v or 0 for v in found.timeline.fill[str(NETNS)])
