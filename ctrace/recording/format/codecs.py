"""Sections of a recording, packed and unpacked; memory that a crafted file can claim is bounded."""

from __future__ import annotations

import zlib
from collections import deque

from ctrace.recording.format.layout import Buffer, Codec, Damaged, FormatError


def zstd_available() -> bool:
    """Whether the zstandard package can be imported."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        return False
    return True


class Compressor:
    """Compresses sections with one codec, and keeps those raw that do not shrink."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        if codec == Codec.ZSTD:
            import zstandard

            # Short matches between bytes of a few values take time and save nothing.
            parameters = zstandard.ZstdCompressionParameters.from_level(
                1, min_match=7, hash_log=12, write_content_size=True
            )
            self._zstd = zstandard.ZstdCompressor(compression_params=parameters)
        self._last: deque[tuple[bytes, tuple[Codec, bytes]]] = deque(maxlen=8)

    def __call__(self, data: bytes) -> tuple[Codec, bytes]:
        """The codec used and the stored bytes."""
        n = len(data)
        if n < 64 or self.codec == Codec.RAW:
            return Codec.RAW, data
        for known, result in self._last:
            if known == data:
                return result
        stored = self._zstd.compress(data) if self.codec == Codec.ZSTD else zlib.compress(data, 1)
        result = (self.codec, stored) if len(stored) < n - n // 32 else (Codec.RAW, data)
        self._last.append((data, result))
        return result


class Decompressor:
    """Expands sections to exactly the length stated in the directory."""

    def __init__(self) -> None:
        self._zstd = None
        self._last: tuple[int, Buffer, bytes] = (-1, b"", b"")
        if zstd_available():
            import zstandard

            self._zstd = zstandard.ZstdDecompressor(max_window_size=1 << 27)
            self._parameters = zstandard.get_frame_parameters
            self._error = zstandard.ZstdError

    def __call__(self, codec: int, stored: Buffer, length: int) -> Buffer:
        """The section's bytes. Raises Damaged when there are more or fewer of them."""
        if codec == Codec.RAW:
            data: Buffer = stored
        elif codec == Codec.ZLIB:
            data = self._inflate(stored, length)
        elif codec == Codec.ZSTD:
            # Columns that change together have equal bytes.
            stored = bytes(stored)
            if self._last[:2] != (length, stored):
                self._last = (length, stored, self._unzstd(stored, length))
            data = self._last[2]
        else:
            raise Damaged(f"unknown codec {codec}")
        if len(data) != length:
            raise Damaged("a section is shorter or longer than its directory says")
        return data

    @staticmethod
    def _inflate(stored: Buffer, length: int) -> bytes:
        engine = zlib.decompressobj()
        try:
            # One byte more than promised shows a bomb without unfolding it.
            return engine.decompress(stored, length + 1)
        except zlib.error as error:
            raise Damaged(str(error)) from None

    def _unzstd(self, stored: Buffer, length: int) -> bytes:
        if self._zstd is None:
            raise FormatError(
                "this recording is compressed with zstd: install the zstandard package to read it"
            )
        try:
            # The library allocates what the frame claims, so the claim is read first.
            if self._parameters(stored).content_size != length:
                raise Damaged("a frame claims another length than its directory")
            data: bytes = self._zstd.decompress(stored, max_output_size=length)
        except self._error as error:
            raise Damaged(str(error)) from None
        return data
