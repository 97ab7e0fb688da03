"""For every suite: what a run in the background, or beside others, must not change.

Programs under test can be interrupted, no example is timed, and what the whole machine sees
is changed by one test at a time, with no kernel test beside it. Several workers (``-n 6 --dist
loadgroup``) share the tests out one by one, for most of them wait; those that share a fixture
stay together. Those that run by themselves begin, one after the other by one worker; beside them
those that wait for nobody, the longest first.
"""

from __future__ import annotations

import builtins
import os
import resource
import signal
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from kit.turns import lowered, preferred, turn

if sys.version_info < (3, 10):
    # The tests compare lengths by it; the product must do without (tests/house/test_floor.py).
    def _zip(*rows: Iterable[Any], strict: bool = False) -> Iterator[tuple[Any, ...]]:
        if strict:
            rows = tuple(list(row) for row in rows)
            if len({len(row) for row in rows}) > 1:  # type: ignore[arg-type]
                raise ValueError("zip() arguments have different lengths")
        return _plain_zip(*rows)

    _plain_zip = builtins.zip
    builtins.zip = _zip  # type: ignore[assignment,misc]

os.environ.setdefault("LANG", "C.UTF-8")  # else views are plain ASCII

if "CTRACE_VM" not in os.environ:  # whose tests have none, and starting takes long in there
    from hypothesis import settings

    settings.register_profile("thorough", deadline=None)
    settings.register_profile("patient", deadline=None, max_examples=25)
    settings.register_profile("quick", deadline=None, max_examples=10)
    settings.load_profile("patient")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # what nohup sets, a recorder heeds
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _alone(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("machine", "clocks"))


def _shared(item: pytest.Item) -> bool:
    """Whether it uses something of ours that is made once for several tests."""
    found: dict[str, Any] = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
    return any(
        one.scope != "function" and not one.func.__module__.startswith("_pytest")
        for fixtures in found.values()
        for one in fixtures
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return
    longest = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        if item.path.parent.name == "house":
            _keep_with(item, "house")  # which parse our own text once
        elif _shared(item):
            of = getattr(item, "callspec", None)
            family = of.params.get("family", "") if of else ""
            _keep_with(item, f"{item.path.stem} {family}".strip())
        elif _alone(item):
            _keep_with(item, "alone")  # one worker's, while the others do what waits for nobody

    def turn(item: pytest.Item) -> int:
        slow = item.get_closest_marker("slow") is not None
        if _alone(item):
            return 0  # before there is anything that it would wait for
        if item.get_closest_marker("kernel") is None:
            return 1 if slow else 2  # which wait for none of these
        if _group(item.nodeid):
            return 3 if item.path in longest else 4
        return 3 if slow else 5

    items.sort(key=turn)


def _group(nodeid: str) -> str:
    """What stands behind the last @ that is in no parameter."""
    return nodeid.rpartition("@")[2] if nodeid.rfind("@") > nodeid.rfind("]") else ""


def _keep_with(item: pytest.Item, group: str) -> None:
    """Tests whose names end in the same @group stay together.

    The mark ``xdist_group`` writes that name where pytest looks for it no more since 9.2.
    """
    name, structured = f"{item.nodeid}@{group}", getattr(item, "_id", None)
    if structured is None:
        setattr(item, "_nodeid", name)  # noqa: B010
    else:
        setattr(item, "_id", structured.parse(name))  # noqa: B010


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker tells each by the name that it was sent
        config.pluginmanager.register(_PlainNames())


class _PlainNames:
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A group is no part of a test's name: what failed can be run again by that name."""
        if _group(report.nodeid):
            report.nodeid = report.nodeid.rpartition("@")[0]


@pytest.fixture
def few_places() -> Iterator[None]:
    """For a test that fills a table up to the host's limit, and is marked ``machine`` for it."""
    with lowered():
        yield


# -- what each test costs -------------------------------------------------------------------

_BEGAN = pytest.StashKey[float]()
_SHOWN = 20


def _processor() -> float:
    """Seconds of a processor that this process used, and its children that have ended."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in found)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_BEGAN] = _processor()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown" and _BEGAN in item.stash:
        report.user_properties.append(("processor", _processor() - item.stash[_BEGAN]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Beside the longest, those that work most: these are what a whole run takes so long for."""
    used = [
        (seconds, report.nodeid)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "teardown"
        for name, seconds in report.user_properties
        if name == "processor"
    ]
    if any(seconds >= 1 for seconds, _ in used):
        total = sum(seconds for seconds, _ in used)
        terminalreporter.section(f"most processor time ({_SHOWN}), of {total:.0f} s in all")
        for seconds, test in sorted(used, reverse=True)[:_SHOWN]:
            terminalreporter.write_line(f"{seconds:.1f} s  {test}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Kernel tests run beside each other, one marked ``machine`` or ``clocks`` by itself: with what
    it shares with others, whose making and end are part of a test's turn, too. All others wait for
    those by themselves, so what computes beside them gives way."""
    alone = _alone(item)
    if not alone and item.get_closest_marker("kernel") is None:
        return (yield)
    with turn(alone=alone), preferred() if alone else nullcontext():
        return (yield)
