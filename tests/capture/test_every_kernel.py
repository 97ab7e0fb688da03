"""Every member and function that is named is looked for in the BTF of every kernel tested on.

A name that is nowhere would be a default in silence; one that a later kernel renames is told here.
"""

from __future__ import annotations

import pytest
from kit import kernel_files

from ctrace.capture.hooks.function_hooks import HOOKS
from ctrace.kernel import layout
from ctrace.kernel.btf import Btf

Kernel = tuple[str, list[Btf]]
ABSENT = {
    "5.10": {
        "STAT_CHAIN",  # 5.15
        "BPF_NF_STATE", "BPF_NF_SKB",  # 6.4
        "TASK_REAL_START", "KN_PARENT_RCU", "TASK_PREEMPT",
        "DROP_REASON", "NO_REASON",  # 5.17
    },
    "6.1": {"BPF_NF_STATE", "BPF_NF_SKB", "TASK_REAL_START", "KN_PARENT_RCU", "TASK_PREEMPT",
            "L3MDEV_MASTER"},  # an enum without a name then
    "6.12": {"TASK_REAL_START", "KN_PARENT_RCU", "TASK_PREEMPT"},
    "7.2": {"TASK_REAL_START", "KN_PARENT", "TASK_PREEMPT"},
}  # fmt: skip
"""What a kernel lacks: names of other versions, and of other machines than x86."""


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(one, marks=pytest.mark.slow) for one in kernel_files.VERSIONS[:-1]),
        kernel_files.VERSIONS[-1],
    ],
)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    found = kernel_files.types(request.param)
    if found is None:
        pytest.skip(f"scripts/kernels {request.param} has not been run here")
    return request.param, [one for one in found if one is not None]


def test_every_member_is_there_but_those_that_are_known_not_to_be(kernel: Kernel) -> None:
    version, sources = kernel
    lacking = {
        name
        for table in (layout._REQUIRED, layout._OPTIONAL)
        for name, (struct, path) in table.items()
        if all(one.offset(struct, path) is None for one in sources)
    }
    lacking |= {
        name
        for name, (value, enum) in layout._ENUMS.items()
        if all(one.enum_value(value, enum) is None for one in sources)
    }
    assert lacking == ABSENT[version]
    for struct in layout._SIZES.values():
        assert any(one.size_of(struct) for one in sources)


def test_every_function_has_the_arguments_where_they_are_read(kernel: Kernel) -> None:
    _, sources = kernel
    module = sources[-1]
    if module.func("nf_conntrack_free") is None:
        pytest.skip("before 5.11 no BTF describes a module's functions")
    for hook in HOOKS:
        function = module.func(hook.function)
        assert function is not None, hook.function
        assert module.args(function)[: len(hook.args)] == hook.args
