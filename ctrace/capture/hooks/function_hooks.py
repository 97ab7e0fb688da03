"""What the two families that attach to conntrack's functions share.

The same C (bpf/function_hooks.c) runs behind fentry and behind kprobes; a family
says how a function is found and how a program is connected to it. A function that
this kernel lacks narrows what is seen, and :class:`HookInfo` says so; two are
indispensable.
"""

from __future__ import annotations

import errno
import struct
from abc import abstractmethod
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, Generic, Optional, TypeVar

import numpy as np

from ctrace.batch import Counts, HookInfo
from ctrace.capture.family import NO_OWNERS, BpfCapture
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.kernel import bpf, btf, layout, percpu, programs
from ctrace.kernel.objects import MAPS, Objects, filter_constants

if TYPE_CHECKING:
    from ctrace.host.netns import Namespace

SOURCE: Final = "function_hooks.c"
MODULE: Final = "nf_conntrack"
EVERYTHING: Final = Filter()


@dataclass(frozen=True)
class Hook:
    """A kernel function and the programs for its entry and its return."""

    function: str
    args: tuple[str, ...]
    """Names of the arguments that the programs rely on, as in the kernel's BTF."""
    enter: Optional[str] = None
    leave: Optional[str] = None
    blind: str = ""
    """What cannot be shown without it; empty: the family cannot work without it."""
    enter_for_return: bool = False
    """The entry program only saves arguments for a return probe; an fexit program has them
    anyway."""

    @property
    def required(self) -> bool:
        """Whether the family cannot work without it."""
        return not self.blind


HOOKS: Final = (
    Hook("__nf_conntrack_hash_insert", ("ct",), "on_insert"),
    Hook("nf_conntrack_free", ("ct",), "on_free"),
    Hook(
        "nf_conntrack_hash_check_insert", ("ct",), "user_enter", "user_leave",
        blind="inserts by conntrack -I look like packets' inserts",
    ),
    Hook(
        "__nf_conntrack_alloc", ("net", "zone", "orig", "repl", "gfp", "hash"),
        "alloc_enter", "alloc_leave", enter_for_return=True,
        blind="packets refused because the table is full are not seen one by one",
    ),
    Hook(
        "__nf_conntrack_confirm", ("skb",), "confirm_enter", "confirm_leave",
        blind="which way a packet went is unknown, and inserts that fail for another "
        "reason than a clash are not seen",
    ),
    Hook(
        "nf_ct_resolve_clash", ("skb",), "clash_enter", "clash_leave",
        blind="entries inserted beside a clashing one (NAT) are not seen",
    ),
    Hook(
        "early_drop", ("net", "hash"), "early_drop_enter", "early_drop_leave",
        blind="evictions by early_drop look like other deletions, and a packet refused for lack "
        "of memory like one refused by a full table",
    ),
    Hook(
        "gc_worker", ("work",), "gc_enter", "gc_leave",
        blind="deletions by the garbage collector near the limit look like other deletions",
    ),
)  # fmt: skip

_CALL_SLOTS: Final = 8192
_CALL: Final = 8 + 2 * 40
_CPU_STATE: Final = 32


class Unattachable(CtraceError):
    """A function that cannot be attached to."""

    def __init__(self, hook: Hook, why: str) -> None:
        self.hook = hook
        super().__init__(f"cannot attach to {hook.function}: {why}")


Target = TypeVar("Target")


class FunctionCapture(BpfCapture, Generic[Target]):
    """Implements :class:`ctrace.capture.family.Capture`."""

    family: ClassVar[str]

    def __init__(
        self,
        wanted: Filter = EVERYTHING,
        *,
        ring_bytes: int = 1 << 20,
        without: Collection[str] = (),
    ) -> None:
        """Compile, load and attach. Raises CtraceError (BpfError) when this kernel cannot.

        ``without`` leaves functions out, as if this kernel did not have them.
        """
        targets = {
            hook: target
            for hook in HOOKS
            if hook.function not in without and (target := self.find(hook)) is not None
        }
        self._gaps: deque[int] = deque(maxlen=8)
        while True:
            missing = [hook for hook in HOOKS if hook not in targets]
            for hook in missing:
                if hook.required:
                    raise CtraceError(_no_function(hook.function))
            self._objects = Objects(ring_bytes)
            try:
                self._attach(wanted, targets)
                break
            except Unattachable as refused:
                self.close()
                if refused.hook.required:
                    raise
                del targets[refused.hook]
            except BaseException:
                self.close()
                raise
        lacking = {hook.function for hook in missing}
        self.info = HookInfo(
            family=self.family,
            attached=tuple(hook.function for hook in targets),
            blind=(*(hook.blind for hook in missing), *self._no_owners()),
            drop_tuples="__nf_conntrack_alloc" not in lacking,
            evictions="early_drop" not in lacking,
            owners=self._owners,
        )
        self._blind = self.info.blind

    # -- what a family does its own way ------------------------------------------------------

    @abstractmethod
    def find(self, hook: Hook) -> Optional[Target]:
        """How this kernel identifies the function; None when it does not have it."""

    @abstractmethod
    def attach(self, name: str, code: bytes, target: Target, *, exit_: bool) -> int:
        """Load a program and attach it to the function's entry or exit.

        Returns the descriptor that holds it there. Raises BpfError.
        """

    @abstractmethod
    def arguments(self, hooks: Iterable[Hook]) -> Mapping[str, int]:
        """The constants ARG_* and RESULT_*: where in its context a program finds them."""

    def programs(self, hook: Hook) -> list[tuple[str, bool]]:
        """Names of a hook's programs and whether each runs at the exit; the exit comes first.

        An entry without its exit would leave a call open; the reverse is harmless.
        """
        found = [(hook.leave, True)] if hook.leave else []
        if hook.enter:
            found.append((hook.enter, False))
        return found

    # -- attaching ---------------------------------------------------------------------------

    def _attach(self, wanted: Filter, targets: Mapping[Hook, Target]) -> None:
        where = layout.running()
        objects = self._objects
        names = [name for hook in targets for name, _ in self.programs(hook)]
        code = programs.instructions(
            SOURCE,
            [*names, "look"],
            {
                **where.constants,
                **filter_constants(wanted),
                **self.arguments(targets),
                **{f"HAVE_{hook.function}": 1 for hook in targets},
            },
        )
        objects.maps += [
            objects.keep(bpf.map_create(bpf.MapType.HASH, 16, _CALL, _CALL_SLOTS, name="calls")),
            objects.keep(bpf.map_create(bpf.MapType.PERCPU_ARRAY, 4, _CPU_STATE, 1, name="cpu")),
        ]
        self._owners = percpu.locate(objects).tasks
        objects.load("look", code["look"], bpf.ProgType.RAW_TRACEPOINT)
        for hook, target in targets.items():
            for name, exit_ in self.programs(hook):
                try:
                    objects.keep(self.attach(name, code[name], target, exit_=exit_))
                except bpf.BpfError as error:
                    # no such function after all, or the kernel allows no probe there
                    if error.errno in (errno.ENOENT, errno.EINVAL, errno.EADDRNOTAVAIL):
                        raise Unattachable(hook, str(error)) from error
                    raise

    def _no_owners(self) -> tuple[str, ...]:
        return () if self._owners else (NO_OWNERS,)

    # -- Capture -----------------------------------------------------------------------------

    def counts(self) -> dict[int, Counts]:
        """Exact counters per namespace since attaching."""
        self._note_missed()
        return super().counts()

    def follow(self, namespaces: Sequence[Namespace]) -> None:  # noqa: ARG002
        """A function serves every namespace, so there is nothing to attach; covers CPUs that came
        online."""
        percpu.meet(self._objects)

    def missed(self) -> int:
        """How many calls went unseen because a program or a return probe could not run.

        Kernels before 5.12 (kprobes: 6.7) do not count programs that they skip
        because another one of ours runs on the same CPU.
        """
        skipped = sum(bpf.prog_info(fd).recursion_misses for fd in self._objects.programs.values())
        raw = bpf.map_lookup(
            self._objects.maps[len(MAPS) + 2],
            struct.pack("<I", 0),
            _CPU_STATE * bpf.possible_cpus(),
        )
        _, entered, left, lost = (
            np.frombuffer(raw or bytes(_CPU_STATE), np.uint64)
            .reshape(-1, _CPU_STATE // 8)
            .sum(axis=0, dtype=np.uint64)
            .astype(np.int64)
            .tolist()
        )
        # Calls now in progress are open too, for microseconds; what stays open was missed.
        self._gaps.append(max(0, entered - left))
        return int(skipped + lost + (min(self._gaps) if len(self._gaps) == 8 else 0))

    def _note_missed(self) -> None:
        missed = self.missed()
        blind = self._blind
        if missed:
            blind = (*blind, f"{missed} calls that no hook could see: compare with conntrack -S")
        if blind != self.info.blind:
            self.info = replace(self.info, blind=blind)


def type_information() -> Optional[btf.Btf]:
    """The BTF that has conntrack's functions: the module's, or the kernel's when built in."""
    module = btf.kernel(MODULE)
    if module is not None:
        return module
    kernel = btf.kernel()
    return kernel if kernel is not None and kernel.func("nf_conntrack_free") else None


def known_args(function: str) -> Optional[tuple[str, ...]]:
    """The function's argument names, or None when no BTF tells (a module before 5.11)."""
    types = type_information()
    found = types.func(function) if types else None
    return None if types is None or found is None else types.args(found)


def fits(hook: Hook) -> bool:
    """Whether the function takes the arguments that we read, in the same places.

    More may follow: an exit program finds the result after all of them. Only kernels before 5.11
    have no BTF of a module's arguments, and none of those will change any more.
    """
    args = known_args(hook.function)
    if args is None:
        return "TASK_BTF" not in layout.running()  # a helper of 5.11
    return args[: len(hook.args)] == hook.args


def arguments(hook: Hook) -> int:
    """How many arguments the function takes on this kernel."""
    return len(known_args(hook.function) or hook.args)


def _no_function(function: str) -> str:
    return (
        f"no function {function} to attach to: load nf_conntrack (modprobe nf_conntrack), "
        "or use another hook family"
    )
