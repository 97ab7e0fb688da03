"""Packed files, unpacked in bounded memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
from typing import IO, Final, Optional, cast

from ctrace.errors import CtraceError

OTHERS: Final = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x04\x22\x4d\x18": "packed with lz4",
    b"%PDF": "a PDF file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
"""What people also send, by its first bytes."""
XZ_MEMORY: Final = 256 << 20


class Unreadable(CtraceError):
    """A file that cannot be opened, or is damaged."""


def unpacker(name: str, head: bytes, stream: IO[bytes]) -> Optional[IO[bytes]]:
    """A file's content unpacked, by its first bytes; None where it is not packed.

    Raises Unreadable where what unpacks it is missing.
    """
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if head.startswith(b"\xfd7zXZ\0"):
        return cast(IO[bytes], _Xz(stream))
    if head.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(stream))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ImportError:
            raise Unreadable(
                f"{name} is packed with zstd: install the zstandard package, or unpack it"
            ) from None
        unpack = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        reader: IO[bytes] = unpack.stream_reader(stream, read_across_frames=True)
        return reader
    return None


class _Xz:
    """lzma.LZMAFile with a limit on memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._engine: Optional[lzma.LZMADecompressor] = None

    def read(self, n: int) -> bytes:
        while True:
            if self._engine is None or (self._engine.eof and not self._more()):
                if self._engine is not None:
                    return b""
                self._engine = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            packed = self._rest if self._engine.needs_input else b""
            if self._engine.needs_input and not packed:
                packed = self._stream.read(1 << 16)
                if not packed:
                    raise EOFError("it is cut off")
            self._rest = b""
            data = self._engine.decompress(packed, n)
            if data:
                return data

    _rest = b""

    def _more(self) -> bool:
        """Whether another packed stream follows."""
        assert self._engine is not None
        self._rest = (self._engine.unused_data or self._stream.read(1 << 16)).lstrip(b"\0")
        if not self._rest:
            return False
        self._engine = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
        return True
