"""The filter that is typed on the screen, and where a jump leads."""

from __future__ import annotations

from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import samples
from kit.loads import snapshots

from ctrace.cli.recordings.replay import parse_moment
from ctrace.errors import UsageError
from ctrace.live.filtering import filtered
from ctrace.live.jump import parse_jump
from ctrace.live.protocol import Position


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("dport=53", ["10.42.3.17 -> udp/53"]),
        ("udp/53", ["10.42.3.17 -> udp/53"]),
        ("proto=udp src=10.42.3.0/24", ["10.42.3.9 -> udp/8125", "10.42.3.17 -> udp/53"]),
        ("proto=17,telegraf", ["10.42.3.9 -> udp/8125"]),
        ("owner=KUBE", ["127.0.0.1 -> tcp/10248"]),
        ("nat=src", ["10.42.3.0 -> tcp/6379"]),
        ("netns=nowhere", []),
    ],
)
def test_which_rows_pass(text: str, keys: list[str]) -> None:
    snapshot = samples.incident()
    if "src=" in text:  # the samples name sources in their keys
        from dataclasses import replace

        named = (replace(one, src=one.key.split(" ")[0]) for one in snapshot.culprits)
        snapshot = replace(snapshot, culprits=tuple(named))
    assert [one.key for one in filtered(snapshot, text).culprits] == keys


def test_victims_are_filtered_too() -> None:
    assert [one.port for one in filtered(samples.incident(), "proto=udp dport=53").victims] == [53]


@pytest.mark.parametrize("text", ["dport=x", "dport=99999", "src=nothing", "proto=zzz", "what=1"])
def test_what_makes_no_sense_is_said(text: str) -> None:
    with pytest.raises(UsageError):
        filtered(samples.incident(), text)


@given(st.text(max_size=40))
def test_any_text_filters_or_is_refused(text: str) -> None:
    snapshot = snapshots.hostile()
    try:
        found = filtered(snapshot, text)
    except UsageError:
        return
    assert set(found.culprits) <= set(snapshot.culprits)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("+30", 1_000_130.0), ("-2m", 999_980.0), ("50%", 1_003_600.0), ("0%", 1_000_000.0),
        ("13:47:00", 1_000_020.0), ("14:00", 1_000_800.0),
    ],
)  # fmt: skip
def test_jumps(text: str, where: float) -> None:
    # 1 000 000 s after 1970 is 13:46:40 UTC.
    assert parse_jump(text, Position(1_000_100.0, 1_000_000.0, 1_007_200.0)) == where


@pytest.mark.parametrize("text", ["13:46:30", "16:00", "23:59:59", "101%"])
def test_a_moment_that_was_not_recorded_is_refused(text: str) -> None:
    """Not clamped: a local time would lead to an end of it without a word."""
    with pytest.raises(UsageError, match="from 1970-01-12 13:46:40 to 15:46:40 UTC"):
        parse_jump(text, Position(1_000_100.0, 1_000_000.0, 1_007_200.0))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("-5m", 1_006_900.0), ("+30", 1_000_030.0), ("100%", 1_007_200.0), ("14:00", 1_000_800.0),
        ("1970-01-12T14:00:00Z", 1_000_800.0), ("1970-01-12 16:00:00+02:00", 1_000_800.0),
        ("1970-01-12T14:00:00", 1_000_800.0),
        ("-3h", None), ("+3h", None), ("16:00", None), ("1970-01-12T16:00:00Z", None),
        ("2019-07-03", None), ("1970-01-12T14:00:00+02:00", None),
    ],
)  # fmt: skip
def test_where_a_replay_begins(text: str, where: Optional[float]) -> None:
    if where is not None:
        assert parse_moment(text, 1_000_000.0, 1_007_200.0) == where
        return
    with pytest.raises(UsageError, match="outside the recording"):
        parse_moment(text, 1_000_000.0, 1_007_200.0)


@given(st.text(max_size=12))
def test_any_text_is_a_jump_or_is_refused(text: str) -> None:
    try:
        where = parse_jump(text, Position(10.0, 0.0, 100.0))
    except UsageError:
        return
    assert isinstance(where, float)
