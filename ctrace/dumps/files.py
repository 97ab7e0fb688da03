"""The given files, plain or compressed, directories and archives, as bounded streams."""

from __future__ import annotations

import io
import lzma
import os
import re
import select
import stat
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, Final, Optional, Protocol, cast

from ctrace.dumps.packed import OTHERS, Unreadable, unpacker
from ctrace.errors import CtraceError

UNFOLDED: Final = 16 << 30
"""Bytes read from all files together, uncompressed, at most."""
RATIO: Final = 250
"""Times its size. A compressed file that expands to more is no text dump: one of 1 M equal entries
reaches 60."""
FREE: Final = 64 << 20
"""Bytes to which any file may expand, whatever its ratio."""
MEMBERS: Final = 50_000
"""Files of a directory or archive that are read, at most."""
NESTED: Final = 4
"""Depth of archives within archives."""
HEADER: Final = 1 << 20
"""Bytes of a name, or of other headers of an archive member: they are read in one piece."""
_HOST: Final = re.compile(
    r"(?:^|/)(?:nodes/([\w.:-]{1,253})/|sosreport-([\w.-]{1,253}?)(?:/|\.tar\b)"
    r"|(?:scc|nts)_([\w.-]{1,253}?)_\d{6}_\d{4}(?:/|\.t[bgx]z))"
)
"""Folders of hosts as must-gather, sos and supportconfig name them."""
LATEST: Final = 1 << 33
"""UTC seconds: a file is from before the year 2242."""
WAIT: Final = 10_000
"""Milliseconds to wait for somebody to write into a named pipe."""


@dataclass(frozen=True)
class Text:
    """One file's text."""

    name: str
    """As given, or its path inside an archive or directory."""
    modified: Optional[float]
    """UTC seconds, by the file system or archive; None where there is no such time."""
    stream: IO[bytes]
    asked: bool = True
    """Whether the user named it; others may be of no interest."""
    host: str = ""
    """Whose it is, where a bundle has a folder for each host."""


class _Budget:
    """How much may still be expanded."""

    def __init__(self) -> None:
        self.read = 0
        self.archives = 0
        """Archives that are open, one inside another."""

    def take(self, name: str, n: int) -> None:
        self.read += n
        if self.read > UNFOLDED:
            raise CtraceError(f"{name}: more than {UNFOLDED >> 30} GiB of text: give fewer files")


class _Broken(io.RawIOBase):
    """A stream that cannot be read: who reads it is told why."""

    def __init__(self, error: Unreadable) -> None:
        self._error = error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        del buffer
        raise self._error


class _Tells(Protocol):
    """A stream that knows how far it has been read."""

    def tell(self) -> int: ...


class _Counted(io.RawIOBase):
    """A stream that counts its bytes, and stops a decompression bomb."""

    def __init__(
        self, name: str, inner: IO[bytes], budget: _Budget, packed: Optional[_Tells]
    ) -> None:
        self._name, self._inner, self._budget, self._packed = name, inner, budget, packed
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = _safely(self._name, self._inner, len(view))
        n = len(data)
        view[:n] = data
        self._given += n
        self._budget.take(self._name, n)
        if self._packed is not None and self._given > FREE:
            stored = max(1, self._packed.tell())
            if self._given > RATIO * stored:
                raise CtraceError(
                    f"{self._name} unfolds to more than {RATIO} times its size: no text dump does"
                )
        return n


def _safely(name: str, stream: IO[bytes], n: int) -> bytes:
    """Read; damaged or truncated input ends with one line."""
    try:
        return stream.read(n) or b""  # None: a file of /proc that has nothing more for now
    except (OSError, EOFError, lzma.LZMAError, MemoryError, tarfile.TarError) as error:
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unreadable(f"cannot read {name}: {what}") from None
    except Exception as error:  # zlib's and zstandard's own
        if type(error).__module__ not in ("zlib", "zstd", "zstandard"):
            raise
        raise Unreadable(f"cannot read {name}: {error}") from None


def texts(paths: Sequence[str]) -> Iterator[Text]:
    """Every text of the files, directories and archives at ``paths``; ``-`` is standard input.

    A text is to be read before the next is asked for. Of directories and archives, what cannot be
    read is a text that raises Unreadable. Raises CtraceError.
    """
    budget = _Budget()
    for path in paths:
        if path == "-":
            yield from _unfold(Text("standard input", None, _standard_input()), budget, 0)
        elif os.path.isdir(path):
            yield from _directory(path, budget)
        else:
            with _open(path) as file:
                found = os.fstat(file.fileno())
                _check_holes(path, found)
                when = _when(found.st_mtime) if stat.S_ISREG(found.st_mode) else None
                yield from _unfold(Text(path, when, file), budget, 0)


class _Heeding(io.FileIO):
    """Each read begins in Python, which heeds a signal that came since the one before: in a long
    read of a pipe, that of Python itself goes on to wait for more."""

    def readinto(self, buffer: Any, /) -> int:
        """As of any file."""
        return super().readinto(buffer)


def _standard_input() -> IO[bytes]:
    try:
        fd = sys.stdin.fileno()
    except (OSError, ValueError):
        return sys.stdin.buffer
    return io.BufferedReader(_Heeding(fd, "rb", closefd=False))


def _open(path: str) -> IO[bytes]:
    """A regular file or a pipe. Raises CtraceError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Unreadable(f"cannot open {path}: {error.strerror}") from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode):
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(WAIT):
            os.close(fd)
            raise CtraceError(f"{path} is a pipe that nothing came through in {WAIT // 1000} s")
        os.set_blocking(fd, True)
    elif not stat.S_ISREG(mode):
        os.close(fd)
        raise CtraceError(f"{path} is not a file, directory or pipe")
    return io.BufferedReader(_Heeding(fd, "rb"))


def _check_holes(path: str, found: os.stat_result) -> None:
    """A file that is mostly not there takes long to read. Raises Unreadable."""
    if found.st_size > FREE and found.st_size > RATIO * max(1, found.st_blocks * 512):
        raise Unreadable(
            f"{path} is a file of {found.st_size >> 20:,} MiB that is nearly all holes: not a text "
            "dump"
        )


def _directory(path: str, budget: _Budget) -> Iterator[Text]:
    for full in _inside(path):
        if not os.path.isfile(full) or os.path.islink(full):
            continue
        inside = os.path.relpath(full, path)
        yield from _tried(inside, _file(full, inside, budget))


def _file(full: str, inside: str, budget: _Budget) -> Iterator[Text]:
    with _open(full) as file:
        found = os.fstat(file.fileno())
        _check_holes(full, found)
        when = _when(found.st_mtime)
        yield from _unfold(Text(inside, when, file, False, _host(full)), budget, 0)


def _tried(name: str, found: Iterator[Text]) -> Iterator[Text]:
    """The same texts; where they cannot be read, one that says why."""
    try:
        yield from found
    except Unreadable as error:
        yield Text(name, None, cast(IO[bytes], _Broken(error)), False)


def _inside(path: str) -> list[str]:
    """All names below a directory, in order: counted before the first of them is read."""
    found: list[str] = []
    for folder, folders, names in os.walk(path):
        folders.sort()
        found += [os.path.join(folder, name) for name in sorted(names)]
        if len(found) > MEMBERS:
            raise CtraceError(f"{path} holds more than {MEMBERS:,} files: name the ones you mean")
    return found


def _host(path: str, otherwise: str = "") -> str:
    """Whose a bundle's file is, by the last of its folders that says so."""
    said = [next(filter(None, one)) for one in _HOST.findall(path)]
    return said[-1] if said else otherwise


def _unfold(text: Text, budget: _Budget, depth: int) -> Iterator[Text]:
    """The texts in a file, recognised by its first bytes."""
    name = text.name
    stream = io.BufferedReader(cast(io.RawIOBase, text.stream), 1 << 16)
    try:
        head = stream.peek(512)
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise Unreadable(f"cannot read {name}: {error}") from None
    other = next((kind for first, kind in OTHERS.items() if head.startswith(first)), "")
    if other and text.asked:
        raise CtraceError(f"{name} is {other}: give what is in it, as files or as text")
    packed = _Told(stream)
    opened = unpacker(name, head, cast(IO[bytes], packed))
    if opened is not None:
        if depth >= 2:
            raise Unreadable(f"{name} is packed more than twice")
        counted = cast(IO[bytes], _Counted(name, opened, budget, packed))
        yield from _unfold(replace(text, stream=counted), budget, depth + 1)
    elif head[257:262] == b"ustar":
        yield from _members(replace(text, stream=stream), budget, depth)
    else:
        plain = (
            stream if depth else io.BufferedReader(_Counted(name, stream, budget, None), 1 << 18)
        )
        yield replace(text, stream=plain)


class _Told(io.RawIOBase):
    """A stream of any kind that knows how much of it was read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._read = 0

    def readable(self) -> bool:
        return True

    def read(self, n: int = -1) -> bytes:
        data = self._stream.read(n)
        self._read += len(data)
        return data

    def tell(self) -> int:
        return self._read


def _when(seconds: float) -> Optional[float]:
    """A file's time, if it can be one."""
    return seconds if 0 <= seconds < LATEST else None


class _Member(tarfile.TarInfo):
    """A member with a header no larger than it needs to be."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        found = super().frombuf(buf, encoding, errors)
        if found.type in _TOLD and found.size > HEADER:
            raise tarfile.ReadError("a header in it is larger than any name")
        return found


_TOLD: Final = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Headers about another member."""


def _members(whole: Text, budget: _Budget, depth: int) -> Iterator[Text]:
    """The files in an archive, ignoring owners, links and devices."""
    seen, name = 0, whole.name
    budget.archives += 1
    if budget.archives > NESTED:
        raise CtraceError(f"{name} is the {budget.archives}th archive in another")
    try:
        with tarfile.open(fileobj=whole.stream, mode="r|", tarinfo=_Member) as archive:
            for member in archive:
                seen += 1
                if seen > MEMBERS:
                    raise CtraceError(f"{name} holds more than {MEMBERS:,} files")
                inner = archive.extractfile(member) if member.isreg() else None
                if inner is not None:
                    if member.issparse():  # its holes are stored nowhere
                        inner = _solid(member, inner, budget)
                    when = _when(float(member.mtime))
                    host = _host(f"{name}/{member.name}", whole.host)
                    one = Text(member.name, when, inner, False, host)
                    yield from _tried(member.name, _unfold(one, budget, max(depth, 1)))
    except (Unreadable, tarfile.TarError, EOFError, OSError, ValueError, lzma.LZMAError) as error:
        why = str(error) if isinstance(error, Unreadable) else f"cannot read {name}: {error}"
        if not seen:
            raise Unreadable(why) from None
        yield Text(name, None, cast(IO[bytes], _Broken(Unreadable(why))), False)
    finally:
        budget.archives -= 1


def _solid(member: tarfile.TarInfo, inner: IO[bytes], budget: _Budget) -> IO[bytes]:
    """A sparse member as a stream that counts; a mostly empty one cannot be read."""
    if member.size > FREE:
        size = f"{member.size >> 20:,} MiB"
        error = Unreadable(
            f"{member.name} is a file of {size} that is nearly all holes: not a text dump"
        )
        return cast(IO[bytes], _Broken(error))
    return cast(IO[bytes], _Counted(member.name, inner, budget, None))
