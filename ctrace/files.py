"""Files of the user: how one is opened that may be anything, and how one is written.

A file that is written appears under its name when it is whole, or not at all (one that takes
lines for hours: at once). It is its owner's alone, it never replaces what is there unless that
was asked for, and it is never written through a link.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from ctrace.errors import CtraceError

_SORTS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def opened(path: str) -> int:
    """A descriptor of a regular file, for reading.

    Raises OSError as ``os.open`` does, and CtraceError for anything else than a file: a
    pipe would wait for a writer for ever.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    raise CtraceError(f"{path} is {_SORTS.get(stat.S_IFMT(mode), 'something else')}, not a file")


def content(path: str, most: int) -> bytes:
    """What a regular file holds, at most ``most`` bytes of it. Raises as :func:`opened` does."""
    fd = opened(path)
    try:
        return taken(fd, most)
    finally:
        os.close(fd)


def taken(fd: int, most: int) -> bytes:
    """The next bytes of a descriptor that does not wait, at most ``most``. Raises OSError.

    Some of the kernel's files (kmsg, trace_pipe) are called regular and wait for ever: what they
    have now is all that they hold.
    """
    parts, left = [], most
    with contextlib.suppress(BlockingIOError):
        while left and (part := os.read(fd, min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)


def named(path: str) -> str:
    """``path``, but CtraceError for ``-``, by which people mean standard output."""
    if path == "-":
        raise CtraceError("this is not written to standard output: give a file's name")
    return path


def check_free(path: str, *, force: bool = False) -> None:
    """Raise CtraceError where ``new`` would refuse to write: before the work, not after it."""
    try:
        mode = os.lstat(named(path)).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        what = _SORTS.get(stat.S_IFMT(mode), "something else")
        raise CtraceError(f"{path} is {what}, not a file: give another name")
    if not force:
        raise CtraceError(f"{path} exists: give another name, or --force to replace it")


@contextlib.contextmanager
def new(path: str, *, force: bool = False) -> Iterator[BinaryIO]:
    """Write a file; it appears at ``path`` when the block ends, and not when that fails.

    ``force`` replaces a regular file that is there. Raises CtraceError.
    """
    check_free(path, force=force)
    folder, name = os.path.split(path)
    try:
        place = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CtraceError(f"cannot write {path}: {error.strerror}") from None
    try:
        draft = _Draft(place, name)
        try:
            with open(draft.fd, "wb", closefd=False) as file:
                yield file
            os.fsync(draft.fd)
            draft.publish(force)
        finally:
            draft.close()
    except FileExistsError:
        raise CtraceError(f"{path} exists: give another name, or --force to replace it") from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CtraceError(f"cannot write {path}: {error.strerror}") from None
    finally:
        os.close(place)


@contextlib.contextmanager
def new_text(path: str, *, force: bool = False) -> Iterator[io.TextIOWrapper]:
    """As ``new``, for text as UTF-8."""
    with new(path, force=force) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        yield text
        text.flush()
        text.detach()


@contextlib.contextmanager
def draft(path: str, *, force: bool = False) -> Iterator[str]:
    """As ``new``, for what is written by name: the name that it has until it is whole.

    Raises CtraceError.
    """
    check_free(path, force=force)
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or "."):
        raise CtraceError(f"cannot write {path}: there is no such folder")
    own = os.path.join(folder, _beside(name))
    try:
        yield own
        if force:
            os.replace(own, path)
        else:
            os.link(own, path)
    except FileExistsError:
        raise CtraceError(f"{path} exists: give another name, or --force to replace it") from None
    except OSError as error:
        raise CtraceError(f"cannot write {path}: {error.strerror}") from None
    except CtraceError as error:
        why = error.__context__
        if own not in str(error) or not isinstance(why, OSError):
            raise
        # a writer tells what its file keeps, and by a name that nobody gave: it goes
        raise CtraceError(f"cannot write {path}: {why.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(own)


@contextlib.contextmanager
def growing(path: str, *, force: bool = False) -> Iterator[io.TextIOWrapper]:
    """A file for lines that come one by one: what was written stays, however it ends.

    Raises CtraceError.
    """
    check_free(path, force=force)
    try:
        if force:  # a new file: what is there may be readable, or writable, for others
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_EXCL, 0o600)
    except OSError as error:
        raise CtraceError(f"cannot write {path}: {error.strerror}") from None
    give_to_caller(fd)
    try:
        with open(fd, "w", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CtraceError(f"cannot write {path}: {error.strerror}") from None


def give_to_caller(fd: int) -> None:
    """Under sudo a file is for the person who asked, not for root."""
    user, group = os.environ.get("SUDO_UID", ""), os.environ.get("SUDO_GID", "")
    if os.geteuid() == 0 and user.isdigit() and group.isdigit():
        with contextlib.suppress(OSError):
            os.fchown(fd, int(user), int(group))


def _beside(name: str) -> str:
    """A name for a file until it is whole: one that no file has, of 255 bytes at most."""
    start = os.fsdecode(os.fsencode(name)[:200])
    return f".{start}.{os.getpid()}-{os.urandom(4).hex()}"


class _Draft:
    """A file that becomes ``name`` once it is complete.

    It has no name where the file system allows that (O_TMPFILE), so a kill leaves nothing behind;
    otherwise it has a temporary name in the same folder.
    """

    def __init__(self, place: int, name: str) -> None:
        self._place, self._name = place, name
        self._own = _beside(name)
        self._named = False
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            self.fd = os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=place)
        except OSError:  # EOPNOTSUPP, EISDIR or ENOENT, by the file system
            self.fd = os.open(self._own, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=place)
            self._named = True
        give_to_caller(self.fd)

    def publish(self, force: bool) -> None:
        """Give it its name. Raises FileExistsError when that is taken and not to be replaced."""
        if not force:
            self._link(self._name)
            return
        if not self._named:
            self._link(self._own)
            self._named = True
        os.replace(self._own, self._name, src_dir_fd=self._place, dst_dir_fd=self._place)
        self._named = False

    def _link(self, name: str) -> None:
        source = self._own if self._named else f"/proc/self/fd/{self.fd}"
        try:
            # With a folder given, Python calls linkat(2), which alone follows that name.
            os.link(source, name, src_dir_fd=self._place, dst_dir_fd=self._place)
        except PermissionError:  # a file system without hard links
            if not self._named or name in os.listdir(self._place):
                raise
            os.replace(source, name, src_dir_fd=self._place, dst_dir_fd=self._place)
            self._named = False

    def close(self) -> None:
        """Let go; what was not published is gone."""
        os.close(self.fd)
        if self._named:
            with contextlib.suppress(OSError):
                os.unlink(self._own, dir_fd=self._place)
