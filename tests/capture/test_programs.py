"""The programs that were made before: of these sources, complete, and settled for any kernel."""

from __future__ import annotations

import errno
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrace.capture.hooks import fentry, kprobe
from ctrace.capture.hooks.function_hooks import HOOKS
from ctrace.errors import CtraceError
from ctrace.filters import Filter, parse_network
from ctrace.kernel import bpf, compiler, layout, programs
from ctrace.kernel.objects import filter_constants
from ctrace.record import Kind

BOTH = pytest.mark.parametrize("casts", [False, True], ids=["plain", "cast"])
EACH = pytest.mark.parametrize("source", programs.SOURCES)


def made(source: str, casts: bool) -> programs.Made:
    return programs.Made.from_bytes(programs.made_file(source, casts).read_bytes())


def test_every_source_is_listed() -> None:
    assert {path.name for path in compiler.source_dir().glob("*.c")} == set(programs.SOURCES)


@EACH
@BOTH
def test_they_are_of_these_sources(source: str, casts: bool) -> None:
    kept = made(source, casts)
    assert kept.digest == programs.digest(source), "run scripts/programs"
    assert kept.constants == programs.constant_names()


@pytest.mark.slow
@EACH
@BOTH
def test_compiling_again_gives_the_same(source: str, casts: bool) -> None:
    kept = made(source, casts)
    if compiler.version() != kept.compiler:
        pytest.skip(f"made with BCC {kept.compiler}")
    assert programs.make(source, casts) == kept


def test_a_family_takes_no_more_than_40_kilobytes() -> None:
    sizes = [programs.made_file(source, casts).stat().st_size
             for source in programs.SOURCES for casts in (False, True)]  # fmt: skip
    assert max(sizes) < 40_000


def stand_ins(code: bytes, count: int) -> int:
    """How many constants are still asked for."""
    rows = np.frombuffer(code, np.uint8).reshape(-1, 8)
    numbers, offsets = rows.view(np.int32)[:, 1], rows.view(np.int16)[:, 1]
    found = 0
    for base in (programs.NUMBER_BASE, programs.WORD_BASE, programs.KFUNC_BASE):
        found += int(((numbers >= base) & (numbers < base + count)).sum())
    for base in (programs.OFFSET_BASE, programs.WORD_OFFSET_BASE):
        found += int(((offsets >= base) & (offsets < base + count)).sum())
    return found


@EACH
@BOTH
def test_all_that_is_asked_for_is_settled(source: str, casts: bool) -> None:
    kept = made(source, casts)
    names = kept.constants
    for code in kept.programs.values():
        settled = programs.settle(code, names, dict.fromkeys(names, 16))
        assert len(settled) == len(code)
        assert not stand_ins(settled, len(names))
        # settled once, there is nothing left to settle
        assert programs.settle(settled, names, {}) == settled


@given(st.integers(-(1 << 31), (1 << 32) - 1), st.sampled_from([-1, -8]))
def test_a_number_is_written_as_it_is(value: int, mask: int) -> None:
    base = programs.NUMBER_BASE if mask == -1 else programs.WORD_BASE
    move = np.array([0xB7, 1, 0, 0, 0, 0, 0, 0], np.uint8)
    move.view(np.int32)[1] = base + 2
    code = programs.settle(move.tobytes(), ("A", "B", "C"), {"C": value})
    (written,) = np.frombuffer(code, np.int32)[1:]
    assert int(written) & 0xFFFFFFFF == value & mask & 0xFFFFFFFF


@given(st.one_of(st.integers(max_value=-(1 << 31) - 1), st.integers(min_value=1 << 32)))
def test_a_number_that_no_instruction_holds_is_refused(value: int) -> None:
    with pytest.raises(CtraceError, match="32 bits"):
        programs.settle(bytes(8), ("A",), {"A": value})


@given(st.binary(max_size=400))
def test_damage_is_noticed(junk: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        programs.Made.from_bytes(junk)


def test_every_constant_has_one_who_gives_it() -> None:
    """A name that nobody gives would be absent on every kernel, and nothing would say so."""
    everything = Filter(
        proto=6, family=2, netns=1, zone=1, sport=1, dport=1, unreplied=True, src_nat=True,
        kinds=frozenset({Kind.INSERT}),
        src=parse_network("10.0.0.0/8"), dst=parse_network("10.0.0.1"),
    )  # fmt: skip
    given = {
        *layout.names(),
        *filter_constants(everything),
        *fentry.context_constants({hook.function: 1 for hook in HOOKS}),
        *(f"HAVE_{hook.function}" for hook in HOOKS),
        "KPROBE", "STACK_POINTER", "SLOT_BITS",
    }  # fmt: skip
    assert set(programs.constant_names()) <= given
    assert set(kprobe.register_constants(["early_drop"])) <= given


def test_every_constant_is_read_by_a_program() -> None:
    text = "".join(
        path.read_text()
        for path in compiler.source_dir().glob("*.[ch]")
        if path.name != "constants.h"
    )
    words = set(re.findall(r"\w+", text)) | {f"{a}_{b}" for a in ("F_SRC", "F_DST")
             for b in (f"{c}{n}" for c in ("VALUE", "MASK") for n in range(4))}  # fmt: skip
    words |= {f"ARG_{n}" for n in range(6)} | {f"RESULT_{hook.function}" for hook in HOOKS}
    assert [name for name in programs.constant_names() if not {name, f"K_{name}"} & words] == []


def test_a_load_that_a_signal_breaks_off_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libbpf does; a program that is refused for another reason is not."""
    answers = [-errno.EAGAIN, -errno.EAGAIN, -errno.EAGAIN, 7]
    monkeypatch.setattr(bpf, "bpf", lambda *_: (answers.pop(0), b""))
    assert bpf.prog_load(bytes(16), bpf.ProgType.KPROBE, "t") == 7
    assert not answers
    answers += [-errno.EINVAL, -errno.EINVAL]
    with pytest.raises(bpf.BpfError):
        bpf.prog_load(bytes(16), bpf.ProgType.KPROBE, "t")
    assert not answers, "once without the verifier's log, once with it"
