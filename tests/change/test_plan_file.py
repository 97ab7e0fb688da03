"""Whose file a plan is: pipes are refused, and -y takes nobody else's word."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrace.change import plan_file
from ctrace.errors import CtraceError, UsageError
from ctrace.plan import plan as plans
from ctrace.plan.plan import Notrack, Plan

PLAN = Plan(1, "host", 4026531840, "init", "0" * 64, "nft", (Notrack("tcp", 80, ("server",)),))
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A plan in a folder of ours, all the way from a place that others cannot change."""
    path = tmp_path / "plan.json"
    path.write_text(plans.to_json(PLAN))
    path.chmod(0o644)
    return path


def test_ours_is_taken(file: Path) -> None:
    assert plan_file.read(str(file), unasked=True) == PLAN


@given(st.text(max_size=200))
def test_a_plan_of_a_host_or_namespace_of_any_name_can_be_read(name: str) -> None:
    clean = plans.clean_text(name)
    plan = replace(PLAN, host=clean, netns_name=clean)
    assert plans.from_json(plans.to_json(plan)) == plan


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/null")):
        with pytest.raises(CtraceError, match="not a regular file"):
            plan_file.read(str(path))


def given_away(file: Path) -> Path:
    os.chown(file, 65534, 65534)
    return file


def writable(file: Path) -> Path:
    file.chmod(0o666)
    return file


def foreign_link(file: Path) -> Path:
    link = file.parent / "link"
    link.symlink_to(file)
    os.lchown(link, 65534, 65534)
    return link


def link_to_a_foreign_link(file: Path) -> Path:
    link = file.parent / "outer"
    link.symlink_to(foreign_link(file).name)
    return link


def open_folder(file: Path) -> Path:
    file.parent.chmod(0o777)
    return file


def foreign_folder(file: Path) -> Path:
    os.chown(file.parent, 65534, 65534)
    return file


@root_only
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (given_away, "belongs to user 65534"),
        (writable, "may be written to by others"),
        (foreign_link, "a link of user 65534"),
        (link_to_a_foreign_link, "a link of user 65534"),
        (open_folder, "where others may exchange it"),
        (foreign_folder, "a folder of user 65534"),
    ],
)
def test_what_others_may_change_needs_a_look(
    file: Path, make: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SUDO_UID", raising=False)
    path = make(file)  # type: ignore[operator]
    assert plan_file.read(str(path)) == PLAN, "a person looks at it"
    with pytest.raises(UsageError, match=said):
        plan_file.read(str(path), unasked=True)
    monkeypatch.setenv("SUDO_UID", "65534")
    if make not in (writable, open_folder):  # who called sudo may say what is done
        assert plan_file.read(str(path), unasked=True) == PLAN
