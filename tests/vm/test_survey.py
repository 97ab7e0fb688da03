"""What a survey says of a table; test_families.py has the walk that it is made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kit.machines import ASSURED, OTHERS, Net

from ctrace.batch import TableReading
from ctrace.capture.table.assured import ENOUGH, Survey
from ctrace.record import Events

pytestmark = pytest.mark.kernel
ALL = ASSURED + OTHERS
BUCKETS = Path("/proc/sys/net/netfilter/nf_conntrack_buckets")


def test_a_survey_goes_round_and_counts_each_bucket_as_often(net: Net, entries: Events) -> None:
    """As often as any other bucket, so the share is the table's own."""
    buckets = int(BUCKETS.read_text())
    reading = (TableReading(net.client.inum, ALL, ALL + 200, buckets),)
    survey = Survey()
    survey.note(entries)
    try:
        assert survey.take(reading)[0].met == 0  # the first time it does not walk
        met = 0
        for _ in range(buckets // 64):
            (now,) = survey.take(reading)
            assert now.met > met or now.met - met < ENOUGH
            met = now.met
            if met >= 8 * ALL:  # eight rounds
                break
        assert met >= 8 * ALL
        assert now.met_assured / now.met == pytest.approx(ASSURED / ALL, abs=0.04)
    finally:
        survey.close()
    (after,) = survey.take(reading)
    assert (after.met, after.met_assured) == (now.met, now.met_assured)


def test_what_is_not_the_table_is_not_counted(net: Net, entries: Events) -> None:
    """A table of another size lies elsewhere; memory of something else says nothing."""
    buckets = int(BUCKETS.read_text())
    survey = Survey()
    survey.note(entries)
    try:
        wrong = (TableReading(net.client.inum, ALL, ALL + 200, 2 * buckets),)
        survey.take(wrong)
        for _ in range(buckets // 4096):
            survey.take(wrong)
        (met,) = survey.take(wrong)
        # up to the table's own end it was the table
        assert met.met_assured / met.met == pytest.approx(ASSURED / ALL, abs=0.05)
        gone = entries[:4].copy()
        gone["ct"] = np.uint64(0xFFFF888000000000)
        blind = Survey()
        blind.note(gone)
        blind.take(wrong)
        assert blind.take(wrong)[0].met == 0
        blind.close()
    finally:
        survey.close()
