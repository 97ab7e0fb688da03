"""The systemd units: their commands, and that the rights they leave suffice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kit.command import said

from ctrace.lab import Lab

SYSTEMD = Path(__file__).parents[2] / "ctrace" / "share" / "systemd"
UNITS = sorted(SYSTEMD.glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: str(unit.name))
def test_units_are_hardened_and_their_commands_exist(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", unit], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    level = float(done.stdout.split("exposure level for")[1].split(":")[1].split()[0])
    assert level < 3.7  # of which the recorder's AF_PACKET, for looks at INVALID packets, is 0.1
    words = re.search(r"^ExecStart=/usr/bin/env ctrace (.*)$", unit.read_text(), re.M)
    assert words
    verb = words[1].split()[0]
    helped = said(verb, "--help")
    for option in re.findall(r"--[a-z-]+", words[1]):
        assert option in helped


def with_capabilities_of(unit: str) -> list[str]:
    """The beginning of a command that runs with what the unit allows."""
    text = (SYSTEMD / f"ctrace-{unit}.service").read_text()
    found = re.search(r"^CapabilityBoundingSet=(.*)$", text, re.M)
    assert found
    names = ",".join("+" + name.removeprefix("CAP_").lower() for name in found[1].split())
    return ["setpriv", "--bounding-set", f"-all,{names}", "--no-new-privs"]


@pytest.mark.kernel
def test_the_units_capabilities_suffice() -> None:
    done = subprocess.run(
        [*with_capabilities_of("metrics"), sys.executable, "-m", "ctrace", "metrics", "--once"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 'ctrace_table_entries{netns="init"}' in done.stdout
    assert 'ctrace_hooks_info{family="netlink"}' not in done.stdout


@pytest.mark.kernel
def test_the_recorders_capabilities_suffice_for_legacy_rules() -> None:
    with Lab() as lab:
        node = lab.namespace("legacy")
        node.run(["iptables-legacy", "-A", "INPUT", "-p", "tcp", "--dport", "8063", "-j", "ACCEPT"])
        told = node.run([*with_capabilities_of("recorder"), "iptables-legacy-save"])
    assert "--dport 8063" in told


def allowed(names: list[str]) -> set[str]:
    """System calls, and those of groups, as systemd knows them."""
    found: set[str] = set()
    for name in names:
        if not name.startswith("@"):
            found.add(name)
            continue
        told = subprocess.run(
            ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
        ).stdout
        lines = (line.strip() for line in told.splitlines()[1:])
        found |= allowed([line for line in lines if line and not line.startswith("#")])
    return found


@pytest.mark.kernel
@pytest.mark.parametrize("unit", ["metrics", "recorder"])
def test_the_units_allow_every_system_call_that_is_made(unit: str, tmp_path: Path) -> None:
    """Also of the compiler: it starts without kept programs."""
    text = (SYSTEMD / f"ctrace-{unit}.service").read_text()
    found = re.search(r"^SystemCallFilter=(.*)$", text, re.M)
    assert found
    verb = ["metrics", "--once"] if unit == "metrics" else ["record", "-q", "-o", "recording"]
    data = tmp_path / "perf.data"
    emptied = 'mkdir -p /var/cache/ctrace && mount -t tmpfs none /var/cache/ctrace && exec "$@"'
    subprocess.run(
        ["unshare", "-m", "sh", "-c", emptied, "sh",
         "perf", "record", "-q", "-e", "raw_syscalls:sys_enter", "-o", data, "--",
         "timeout", "-s", "TERM", "12", sys.executable, "-m", "ctrace", *verb],
        check=False,  # the recorder is stopped
        cwd=tmp_path, stdout=subprocess.DEVNULL, timeout=120,
        env={**os.environ, "PYTHONPATH": str(SYSTEMD.parents[2])},
    )  # fmt: skip
    told = subprocess.run(
        ["perf", "script", "-i", data, "-F", "trace"], capture_output=True, text=True, check=True
    ).stdout
    macros = subprocess.run(
        ["gcc", "-E", "-dM", "-include", "sys/syscall.h", "-xc", "/dev/null"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = {int(n): name for name, n in re.findall(r"#define __NR_(\w+) (\d+)", macros)}
    used = {names[int(number)] for number in re.findall(r"NR (\d+) ", told)}
    assert "bpf" in used
    assert used <= allowed(found[1].split())
