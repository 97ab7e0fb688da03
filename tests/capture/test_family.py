"""The interface of the hook families: what it declares is all that its users need."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import pytest

from ctrace.batch import Counts, HookInfo
from ctrace.capture.family import Capture
from ctrace.capture.hooks import function_hooks
from ctrace.capture.hooks.function_hooks import HOOKS, Hook, arguments, fits
from ctrace.capture.live import LiveSource
from ctrace.host.netns import Namespace
from ctrace.kernel import bpf, layout
from ctrace.record import Events, empty


class Least(Capture):
    """No more than the interface demands."""

    def __init__(self) -> None:
        self.info = HookInfo("least")
        self.polls = 0
        self.closed = False

    def poll(self) -> tuple[Events, int]:
        self.polls += 1
        return empty(), 0

    def counts(self) -> dict[int, Counts]:
        return {}

    def follow(self, namespaces: Sequence[Namespace]) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_the_least_that_is_declared_serves_a_source() -> None:
    capture = Least()
    source = LiveSource(capture, sample=True, seed=False)
    batch = next(source.batches(0.05))
    assert not len(batch.events)
    assert source.hooks.family == "least"
    source.close()
    assert capture.closed
    polled = capture.polls
    time.sleep(3 * capture.interval)
    assert capture.polls == polled > 0


ALLOC = next(hook for hook in HOOKS if hook.function == "__nf_conntrack_alloc")


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.function)
@pytest.mark.parametrize("appended", [(), ("one",), ("one", "two")])
def test_appended_arguments_move_the_result_behind_them(
    hook: Hook, appended: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function_hooks, "known_args", lambda _: (*hook.args, *appended))
    assert fits(hook)
    assert arguments(hook) == len(hook.args) + len(appended)


@pytest.mark.parametrize(
    "args",
    [("skb",), ALLOC.args[:-1], ("new", *ALLOC.args), (*ALLOC.args[:-2], "hash", "gfp"), ()],
    ids=["another", "fewer", "put before", "swapped", "none"],
)
def test_another_signature_is_refused(
    args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function_hooks, "known_args", lambda _: args)
    assert not fits(ALLOC)


@pytest.mark.parametrize(("defines", "taken"), [({}, True), ({"TASK_BTF": 1}, False)])
def test_a_signature_that_nothing_tells_is_taken_of_old_kernels_only(
    defines: Mapping[str, int], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 5.11 no module has BTF; a later kernel without it may have any signature."""
    monkeypatch.setattr(function_hooks, "known_args", lambda _: None)
    monkeypatch.setattr(layout, "running", lambda: layout.Layout(defines))
    assert fits(ALLOC) is taken


def test_the_kernels_own_not_supported_has_words() -> None:
    """524 is no number of the C library: arm64 before 6.4 answers with it."""
    said = str(bpf.BpfError("cannot attach to function", 524))
    assert "not supported" in said
    assert "524" not in said
