"""The ``fentry`` hook family: BPF trampolines at conntrack's functions.

The cheapest family. It needs the kernel's BTF and, where nf_conntrack is a module, the module's own
(since 5.11). Where the kernel was built without it, or refuses tracing programs, loading the first
program reports that.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from typing import ClassVar, Final, NamedTuple, Optional

from ctrace.capture.hooks.function_hooks import (
    MODULE,
    FunctionCapture,
    Hook,
    arguments,
    fits,
    type_information,
)
from ctrace.errors import CtraceError
from ctrace.host.kernel import capabilities
from ctrace.kernel import bpf, btf, layout

_RETURN_ZERO: Final = bytes.fromhex("b700000000000000 9500000000000000")


class Function(NamedTuple):
    """A function by its BTF id, in the module's BTF or the kernel's own."""

    btf_id: int
    in_module: bool


class FentryCapture(FunctionCapture[Function]):
    """Implements :class:`ctrace.capture.family.Capture` with fentry and fexit programs."""

    family: ClassVar[str] = "fentry"

    def find(self, hook: Hook) -> Optional[Function]:
        """The function's BTF id, if it takes the arguments that we expect."""
        return _find(hook.function) if fits(hook) else None

    def arguments(self, hooks: Iterable[Hook]) -> Mapping[str, int]:
        """The arguments in order, followed by the result."""
        return context_constants({hook.function: arguments(hook) for hook in hooks})

    def programs(self, hook: Hook) -> list[tuple[str, bool]]:
        """The hook's programs, without entry programs that only serve return probes."""
        found = super().programs(hook)
        return [part for part in found if part[1] or not hook.enter_for_return]

    def attach(self, name: str, code: bytes, target: Function, *, exit_: bool) -> int:
        """Load for the function, to which a TRACING program is bound, and attach."""
        with btf.opened(MODULE if target.in_module else "") as module:
            program = self._objects.load(
                name,
                code,
                bpf.ProgType.TRACING,
                attach_type=bpf.AttachType.TRACE_FEXIT if exit_ else bpf.AttachType.TRACE_FENTRY,
                attach_btf_id=target.btf_id,
                attach_btf_fd=module,
            )
        return bpf.raw_tracepoint_open(program)


def context_constants(counts: Mapping[str, int]) -> dict[str, int]:
    """Where a program finds its arguments, and the result of functions with that many of them."""
    return {
        **{f"ARG_{n}": 8 * n for n in range(6)},
        **{f"RESULT_{function}": 8 * count for function, count in counts.items()},
    }


def _find(function: str) -> Optional[Function]:
    types = type_information()
    found = types.func(function) if types is not None else None
    return None if found is None else Function(found, types is not btf.kernel())


def probe() -> None:
    """Load and attach a program that does nothing. Raises CtraceError saying why not."""
    layout.running()
    target = _find("nf_conntrack_free")
    if target is None:
        raise CtraceError(
            "no BTF describes nf_conntrack's functions: it is not loaded (modprobe nf_conntrack), "
            "or is a module of a kernel before 5.11"
        )
    with btf.opened(MODULE if target.in_module else "") as module:
        try:
            program = bpf.prog_load(
                _RETURN_ZERO,
                bpf.ProgType.TRACING,
                "ctrace_probe",
                attach_type=bpf.AttachType.TRACE_FENTRY,
                attach_btf_id=target.btf_id,
                attach_btf_fd=module,
            )
        except bpf.BpfError as error:
            if error.errno != errno.EPERM:
                raise
            raise CtraceError(
                "the kernel refuses programs that trace functions (EPERM): it is hardened or "
                "locked down"
                + ("" if capabilities()["CAP_PERFMON"] else ", or CAP_PERFMON is missing")
            ) from error
    try:
        os.close(bpf.raw_tracepoint_open(program))
    finally:
        os.close(program)
