"""Results that are expensive to compute, kept on disk for the next start.

Compiled hooks, the kernel's layout, where its types and functions lie: each costs
tens of milliseconds or more and changes only with the kernel. A name carries a
digest of all that the content depends on, so nothing in here can be stale; a file
that is missing costs time and nothing else.
"""

from __future__ import annotations

import os
import re
import tempfile
import zlib
from pathlib import Path
from typing import Final, Optional

from ctrace.digests import sha256

KEPT: Final = 32
"""Files of each kind that are kept: every new filter and kernel adds some."""
ROOTS: Final = Path("/var/cache/ctrace")
_CRC: Final = 4


def name(sort: str, *parts: bytes) -> str:
    """A file name for content that depends on ``parts`` and nothing else."""
    digest = sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"{sort}-{digest.hexdigest()[:32]}"


def load(file: str) -> Optional[bytes]:
    """What was stored under this name; None also when the file is damaged or owned by somebody
    else."""
    directory = _directory()
    if directory is None:
        return None
    try:
        with (directory / file).open("rb") as stream:
            if os.fstat(stream.fileno()).st_uid != os.geteuid():
                return None
            stored = stream.read()
    except OSError:
        return None
    data = stored[_CRC:]
    return data if stored[:_CRC] == _crc(data) else None


def store(file: str, data: bytes) -> None:
    """Atomic, so a reader never sees half a file; a full disk only costs the next start."""
    directory = _directory()
    if directory is None:
        return
    try:
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(_crc(data) + data)
            os.replace(temporary, directory / file)
        except OSError:
            os.unlink(temporary)  # else each start would leave one on a disk that is full
            raise
        same = sorted(directory.glob(f"{file.rpartition('-')[0]}-*"), key=_age)
        for old in same[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        return


def this_kernel() -> bytes:
    """Identifies this build of the kernel and of nf_conntrack."""
    system = os.uname()
    parts = [system.release.encode(), system.version.encode(), system.machine.encode()]
    for path in (
        "/sys/kernel/notes",  # the build id, where the linker made one
        "/sys/module/nf_conntrack/notes/.note.gnu.build-id",
    ):
        parts.append(_bytes(path))
    for path in ("/sys/kernel/btf/vmlinux", "/sys/kernel/btf/nf_conntrack"):
        parts.append(str(_size(path)).encode())
    return b"\0".join(parts)


def this_boot() -> bytes:
    """Changes whenever kernel code may have moved: the boot, and the addresses of modules."""
    modules = re.sub(rb"^(\S+ \S+) .* (0x\S+).*$", rb"\1 \2", _bytes("/proc/modules"), flags=re.M)
    return _bytes("/proc/sys/kernel/random/boot_id") + modules


def _directory() -> Optional[Path]:
    """Where files are kept; None when no directory is safe to trust."""
    if os.geteuid() == 0:
        directory = ROOTS
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        directory = Path(base) / "ctrace"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError:
        return None
    # Whoever can write here can choose what the kernel runs: only the owner may.
    if not os.path.isdir(directory) or directory.is_symlink():
        return None
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        return None
    return directory


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CRC, "little")


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _age(path: Path) -> float:
    return path.stat().st_mtime
