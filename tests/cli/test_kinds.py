"""Times and sizes are written alike in every verb."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from ctrace.cli import VERBS, LazyGroup, cli
from ctrace.cli.kinds import Size, Time

UNITS = {
    **{"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0},
    **{" secs": 1.0, "mins": 60.0, " hours": 3600.0, "hrs": 3600.0, " day": 86400.0},
}


@given(st.integers(1, 10**9), st.sampled_from(sorted(UNITS)))
def test_a_time_is_its_number_times_its_unit(number: int, unit: str) -> None:
    assert Time().convert(f"{number}{unit}", None, None) == pytest.approx(number * UNITS[unit])


def test_times_of_several_units_are_their_sum() -> None:
    for text in ("1h30m", "1 h 30 min", "90m"):
        assert Time().convert(text, None, None) == 5400


@given(st.text(max_size=12))
@example("1\u0661m")
@example("1h30")
@example("5 5")
@example("5min5")
@example("1e5")
@example("0")
@example("9" * 400)
def test_any_text_is_a_time_or_one_line(text: str) -> None:
    for kind in (Time(1, 3600), Size(1 << 20)):
        said = ""
        value: float = 1
        try:
            value = kind.convert(text, None, None)
        except click.UsageError as error:
            said = error.format_message()
        assert value >= 1
        assert "\n" not in said


def test_every_option_that_is_a_time_takes_the_same_ones() -> None:
    """No verb has a time of its own grammar: none asks for seconds as a bare number."""
    group = LazyGroup()
    for verb in VERBS:
        command = group.get_command(click.Context(group), verb)
        if command is None:
            continue
        for option in command.params:
            if isinstance(option, click.Option) and option.name in (
                "duration",
                "interval",
                "keep",
                "before",
                "after",
                "step",
            ):
                assert isinstance(option.type, Time), (verb, option.name)


@pytest.mark.parametrize(
    ("typed", "meant"), [("tpo", "top"), ("TOP", "top"), ("advice", "advise"), ("xyzzy", "")]
)
def test_a_mistyped_verb_gets_the_nearest(typed: str, meant: str) -> None:
    done = CliRunner().invoke(cli, [typed])
    assert done.exit_code == 2
    near = re.search(r"the nearest is (\w+)", done.output)
    assert (near[1] if near else "") == meant
