"""Layouts: C against numpy, and our BTF reader against the kernel's own tools."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ctrace.capture.live import open_capture
from ctrace.errors import CtraceError
from ctrace.filters import Filter
from ctrace.kernel import btf, compiler, layout
from ctrace.record import N_REASONS, RECORD, Direction, Kind, Reason

needs_btf = pytest.mark.skipif(btf.kernel() is None, reason="this kernel has no BTF")


def c_program(tmp_path: Path, body: str) -> str:
    """Output of a C program that includes bpf/record.h."""
    source = tmp_path / "table.c"
    source.write_text(
        "#include <linux/types.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "record.h"\nint main(void) {{\n{body}\nreturn 0; }}\n'
    )
    binary = tmp_path / "table"
    subprocess.run(
        ["gcc", "-Wall", f"-I{compiler.source_dir()}", "-o", str(binary), str(source)], check=True
    )
    return subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_record_is_the_same_in_c_and_numpy(tmp_path: Path) -> None:
    assert RECORD.names is not None
    lines = [
        f'printf("{name} %zu %zu\\n", offsetof(struct ctrace_record, {name}), '
        f"sizeof(((struct ctrace_record *)0)->{name}));"
        for name in RECORD.names
    ]
    lines.append('printf("all %zu 0\\n", sizeof(struct ctrace_record));')
    said = {
        name: (int(offset), int(size))
        for name, offset, size in (
            line.split() for line in c_program(tmp_path, "\n".join(lines)).splitlines()
        )
    }
    assert said.pop("all")[0] == RECORD.itemsize == 120
    assert RECORD.fields is not None
    ours = {name: (field[1], field[0].itemsize) for name, field in RECORD.fields.items()}
    assert said == ours
    # every member of the C struct has a field, not only the other way round
    text = (compiler.source_dir() / "record.h").read_text()
    body = text[text.index("struct ctrace_record {") :]
    members = set(re.findall(r"__[us]\d+ (\w+)(?:\[16\])?;", body))
    assert members == set(RECORD.names)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_enums_are_the_same(tmp_path: Path) -> None:
    names = (
        {f"CTRACE_{kind.name}": int(kind) for kind in Kind}
        | {f"CTRACE_R_{reason.name}": int(reason) for reason in Reason}
        | {f"CTRACE_D_{way.name}": int(way) for way in Direction}
        | {"CTRACE_REASONS": N_REASONS}
    )
    body = "\n".join(f'printf("{name} %d\\n", {name});' for name in names)
    said = dict(line.split() for line in c_program(tmp_path, body).splitlines())
    assert {name: int(value) for name, value in said.items()} == names
    text = (compiler.source_dir() / "record.h").read_text()
    assert set(re.findall(r"\b(CTRACE_\w+) = ", text)) == set(names)


# -- BTF ---------------------------------------------------------------------------------


def pahole(struct: str) -> dict[str, int]:
    """Member name to offset, of the plain top-level members, as pahole prints them."""
    command = ["pahole", "-C", struct, "/sys/kernel/btf/vmlinux"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = {}
    for line in said.splitlines():
        member = re.match(r"\t\S.*?\b(\w+)(?:\[\d+\])*;\s+/\*\s+(\d+)\s+\d+ \*/", line)
        if member:
            found[member[1]] = int(member[2])
    return found


@needs_btf
@pytest.mark.skipif(shutil.which("pahole") is None, reason="needs pahole")
@pytest.mark.parametrize("struct", ["nf_conn", "nf_hook_state", "ip_ct_tcp", "css_set"])
def test_offsets_agree_with_pahole(struct: str) -> None:
    kernel = btf.kernel()
    assert kernel is not None
    said = pahole(struct)
    assert len(said) >= 6
    assert {name: kernel.offset(struct, name) for name in said} == said


@needs_btf
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bpftool") is None, reason="needs bpftool")
def test_ids_values_and_functions_agree_with_bpftool() -> None:
    kernel = btf.kernel()
    assert kernel is not None
    said = subprocess.run(
        ["bpftool", "-j", "btf", "dump", "file", "/sys/kernel/btf/vmlinux"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    types = json.loads(said.stdout)["types"]
    assert kernel.count == len(types) + 1
    by_kind: dict[tuple[str, str], dict[str, object]] = {}
    for row in types:
        by_kind.setdefault((row["kind"], row["name"]), row)

    for name in ("sk_buff", "nf_conn", "net", "task_struct"):
        row = by_kind["STRUCT", name]
        assert kernel.find(btf.STRUCT, name) == row["id"]
        assert kernel.size_of(name) == row["size"]
    reasons = {v["name"]: v["val"] for v in by_kind["ENUM", "skb_drop_reason"]["values"]}  # type: ignore[attr-defined]
    for name in ("SKB_DROP_REASON_NETFILTER_DROP", "SKB_DROP_REASON_NO_SOCKET"):
        assert (
            kernel.enum_value(name, "skb_drop_reason") == kernel.enum_value(name) == reasons[name]
        )
    function = next(row for row in types if row["kind"] == "FUNC" and row["name"] == "vfs_read")
    assert kernel.func("vfs_read") == function["id"]
    assert kernel.args(function["id"]) == ("file", "buf", "count", "pos")
    section = by_kind["DATASEC", ".data..percpu"]
    places = {row["type_id"]: row["offset"] for row in section["vars"]}  # type: ignore[attr-defined]
    for name in ("runqueues", "this_cpu_off"):
        if ("VAR", name) in by_kind:
            assert kernel.percpu_offset(name) == places[by_kind["VAR", name]["id"]]


@needs_btf
def test_what_does_not_exist_is_none() -> None:
    kernel = btf.kernel()
    assert kernel is not None
    assert kernel.offset("nf_conn", "no_such_member") is None
    assert kernel.offset("no_such_struct", "x") is None
    assert kernel.enum_value("NO_SUCH_VALUE") is None
    assert kernel.func("no_such_function") is None
    assert kernel.percpu_offset("no_such_variable") is None
    assert btf.kernel("no_such_module") is None


@needs_btf
def test_anonymous_members_and_array_elements() -> None:
    kernel = btf.kernel()
    assert kernel is not None
    first = kernel.offset("nf_conn", "proto.tcp.seen[0]")
    second = kernel.offset("nf_conn", "proto.tcp.seen[1]")
    size = kernel.size_of("ip_ct_tcp_state")
    assert first is not None
    assert second is not None
    assert size is not None
    assert second - first == size
    # sk_buff's members sit in anonymous unions and struct_group()s
    assert kernel.offset("sk_buff", "dev") is not None
    assert kernel.offset("sk_buff", "_nfct") is not None


def test_foreign_byte_order_is_refused() -> None:
    with pytest.raises(CtraceError, match="byte order"):
        btf.Btf(b"\xeb\x9f" + bytes(22))


@needs_btf
def test_the_layout_of_this_kernel_is_complete() -> None:
    found = layout.running()
    for name in ("CT_ZONE", "CT_MARK", "NET_TCP_TIMEOUTS", "TASK_STARTED", "KN_ID", "HZ"):
        assert name in found, name
    assert found["TUPLEHASH_SIZE"] == 56
    assert found["TUPLE_DPORT"] == 36
    assert found["HZ"] in (100, 250, 300, 1000)
    # timeouts belong to their places: what the sysctl says is where the layout points
    assert found["NET_UDP_TIMEOUTS"] > found["NET_TCP_TIMEOUTS"]


@needs_btf
def test_function_ranges_come_from_kallsyms() -> None:
    found = layout.function_range("nf_conntrack_free")
    if found is None:
        pytest.skip("kallsyms is hidden, or conntrack is not loaded")
    start, end = found
    assert 16 < end - start < 4096
    with open("/proc/kallsyms") as file:
        exact = [line.split()[0] for line in file if line.split()[2] == "nf_conntrack_free"]
    assert int(exact[0], 16) == start
    assert layout.function_range("no_such_function") is None


def test_a_locked_kernel_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier would only say that it refuses some program."""
    monkeypatch.setattr(layout, "lockdown", lambda: "confidentiality")
    layout.running.cache_clear()
    try:
        with pytest.raises(CtraceError, match=r"locked down.*lockdown=integrity"):
            open_capture(Filter(), "fentry", 4096)
    finally:
        layout.running.cache_clear()
