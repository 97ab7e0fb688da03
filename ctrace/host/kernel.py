"""What this kernel and this process may do, by reading alone: nothing is tried."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final, Optional

SETTINGS: Final = "/proc/sys/net/netfilter/nf_conntrack_"
MODULES: Final = "/sys/module"
CAPABILITIES: Final = {
    "CAP_NET_ADMIN": (12, "ctnetlink, netfilter links, rules"),
    "CAP_SYS_ADMIN": (21, "entering other network namespaces; BPF before 5.8"),
    "CAP_SYS_PTRACE": (19, "seeing other users' namespaces and sockets"),
    "CAP_PERFMON": (38, "tracing programs, from 5.8"),
    "CAP_BPF": (39, "BPF programs and maps, from 5.8"),
    "CAP_SYSLOG": (34, "addresses of the kernel's functions"),
    "CAP_DAC_READ_SEARCH": (2, "files of other users"),
    "CAP_NET_RAW": (13, "rules of iptables-legacy; looks at INVALID packets"),
}
"""Name to (bit, what it is for)."""
_OF_THE_KERNEL: Final = ("CAP_BPF", "CAP_PERFMON", "CAP_SYSLOG")
"""What the kernel asks for in the first user namespace alone (capable())."""
_UNSEEN: Final = {
    "CAP_NET_ADMIN": "entries that were in the tables before",
    "CAP_SYS_ADMIN": "network namespaces other than this one",
    "CAP_SYS_PTRACE": "namespaces and sockets that only processes of others hold",
    "CAP_DAC_READ_SEARCH": "which processes of other users listen",
    "CAP_NET_RAW": "rules of iptables-legacy, and whose packets are INVALID",
}
"""Capability to what stays unseen without it, where ctrace goes on working."""
TUNABLES: Final = (
    "events",
    "acct",
    "timestamp",
    "tcp_loose",
    "tcp_be_liberal",
    "tcp_timeout_established",
    "tcp_timeout_time_wait",
    "udp_timeout",
    "udp_timeout_stream",
    "generic_timeout",
)


@dataclass(frozen=True)
class Kernel:
    """The running kernel."""

    release: str
    machine: str
    btf: bool
    """/sys/kernel/btf/vmlinux is there."""
    conntrack: str
    """``built in``, ``module`` or ``not loaded``."""
    lockdown: str
    """``none``, ``integrity``, ``confidentiality``, or ``unknown`` without securityfs."""
    jit: Optional[bool]


def read() -> Kernel:
    """What is running here."""
    name = os.uname()
    loaded = os.path.exists(SETTINGS + "max")
    module = os.path.exists("/sys/module/nf_conntrack/refcnt")
    jit = _number("/proc/sys/net/core/bpf_jit_enable")
    return Kernel(
        name.release,
        name.machine,
        os.path.exists("/sys/kernel/btf/vmlinux"),
        "module" if module else "built in" if loaded else "not loaded",
        lockdown(),
        None if jit is None else jit > 0,
    )


def capabilities() -> dict[str, bool]:
    """Which of :data:`CAPABILITIES` this process has in effect.

    With CAP_SYS_ADMIN that is CAP_BPF and CAP_PERFMON, too (bpf_capable, perfmon_capable). Those
    of a user namespace count for what belongs to it, as its network namespaces do; the kernel's
    own things (:data:`_OF_THE_KERNEL`) it has not.
    """
    effective = 0
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("CapEff:"):
                effective = int(line.split()[1], 16)
    held = {name: bool(effective >> bit & 1) for name, (bit, _) in CAPABILITIES.items()}
    covered = dict.fromkeys(("CAP_BPF", "CAP_PERFMON"), True) if held["CAP_SYS_ADMIN"] else {}
    apart = dict.fromkeys(_OF_THE_KERNEL, False) if in_user_namespace() else {}
    return {**held, **covered, **apart}


def in_user_namespace() -> bool:
    """Whether this process is root, if at all, only within a user namespace (rootless containers).

    The first one has a fixed inode: PROC_USER_INIT_INO in include/linux/proc_ns.h.
    """
    try:
        return os.readlink("/proc/self/ns/user") != "user:[4026531837]"
    except OSError:  # a kernel without them
        return False


def unseen(*without: str) -> tuple[str, ...]:
    """What goes unseen for lack of capabilities, one sentence each; those in ``without`` are
    skipped."""
    held = capabilities()
    return tuple(
        f"{what} ({name} is missing)"
        for name, what in _UNSEEN.items()
        if not held[name] and name not in without
    )


def tunables() -> dict[str, int]:
    """conntrack's settings in the namespace that this thread is in; absent ones left out."""
    values = {name: _number(SETTINGS + name) for name in TUNABLES}
    return {name: value for name, value in values.items() if value is not None}


def limits() -> tuple[Optional[int], Optional[int]]:
    """(nf_conntrack_max, nf_conntrack_buckets); None where conntrack is not loaded."""
    return _number(SETTINGS + "max"), _number(SETTINGS + "buckets")


class Module:
    """Notices that a kernel module was unloaded or reloaded."""

    def __init__(self, name: str) -> None:
        self._folder = os.path.join(MODULES, name)
        self._was: Optional[int] = None
        """Inode of its folder, which no other module ever had; 0: unloaded."""
        self.changed()

    def changed(self) -> bool:
        """Whether it changed since the last call. The first load does not count."""
        try:
            now = os.stat(self._folder).st_ino
        except OSError:
            now = 0
        before = self._was
        if now or before is not None:
            self._was = now
        return before is not None and before != now


@dataclass(frozen=True)
class Bcc:
    """The BPF compiler, wherever a Python of this host finds it."""

    version: str = ""
    path: str = ""
    python: str = ""
    """The interpreter that can import it: ours, or the distribution's own."""
    problem: str = ""
    """Why it can't be used, and what to do; empty when it can."""

    @property
    def elsewhere(self) -> bool:
        """Whether it belongs to another Python than the one that runs us."""
        return bool(self.python) and self.python != sys.executable


@cache
def bcc() -> Bcc:
    """Where BCC's Python module is. On PyPI ``bcc`` is an unrelated package.

    An environment that does not see the system's packages (pipx makes such) leaves it to
    the distribution's Python, which need not be the one that runs us.
    """
    install = "install python3-bpfcc (Debian, Ubuntu) or python3-bcc (Fedora, RHEL)"
    try:
        spec = importlib.util.find_spec("bcc")
    except (ImportError, ValueError):
        spec = None
    ours = os.path.dirname(spec.origin) if spec is not None and spec.origin else ""
    for folder, python in ((ours, sys.executable), *_system_packages()):
        if folder and os.path.exists(os.path.join(folder, "libbcc.py")):
            return Bcc(_bcc_version(folder), folder, python)
    if ours:
        return Bcc(path=ours, problem=f"bcc at {ours} is another package: {install}")
    return Bcc(problem=f"Python's bcc module is missing: {install}")


def _system_packages() -> Iterator[tuple[str, str]]:
    """Where distributions keep BCC, and the interpreter that looks there."""
    for python in ("/usr/bin/python3", "/usr/libexec/platform-python"):
        if not os.access(python, os.X_OK):
            continue
        name = os.path.basename(os.path.realpath(python)).replace("platform-python", "python")
        for folder in ("python3/dist-packages", f"{name}/site-packages"):
            for lib in ("lib", "lib64"):
                yield f"/usr/{lib}/{folder}/bcc", python


def _bcc_version(folder: str) -> str:
    try:
        with open(os.path.join(folder, "version.py")) as file:
            found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", file.read())
    except OSError:
        return ""
    return found[1] if found else ""


def lockdown() -> str:
    """``none``, ``integrity``, ``confidentiality``, or ``unknown`` where it is not told."""
    try:
        with open("/sys/kernel/security/lockdown") as file:
            chosen = re.search(r"\[(\w+)\]", file.read())
    except OSError:
        return "unknown"
    return chosen[1] if chosen else "unknown"


def _number(path: str) -> Optional[int]:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
