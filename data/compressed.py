"""Packed files as streams of what they hold: gzip, bzip2, xz and zstd, every member and frame.

Nothing is silently short: a file that is cut, damaged, empty or followed by something else is a
DataError naming it and how far it was read. (A gzip cut exactly between two members, and a changed
bit in a zstd frame without a checksum, cannot be seen by anyone.) The libraries' own file objects
are not used: they ignore what follows the first good stream. Memory: what 64 KiB unpack to.
"""

from __future__ import annotations

import bz2
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, Protocol

from data.config import DataError, DataUsageError
from data.documents import InputFile

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

_ZstdError: type[Exception] = zstandard.ZstdError if zstandard else zlib.error
_READ_BYTES = 2**16
_PADDED = ("gzip", "xz")
_MAGIC = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "zstd": b"\x28\xb5\x2f\xfd",
}
_SKIPPABLE_ZSTD = tuple(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))
_OTHER_MAGIC = {
    b"PAR1\x15": "parquet",
    b"PK\x03\x04": "zip",
    b"%PDF-": "pdf",
    b"7z\xbc\xaf\x27\x1c": "7z",
}


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def open_input(file: InputFile) -> BinaryIO:
    """The bytes of the text: the file's own, or what they unpack to."""
    stream = open(file.path, "rb", buffering=2**20)  # noqa: SIM115
    if file.compression is None:
        return stream
    return io.BufferedReader(_Unpacked(stream, file), 2**20)


def kind_by_content(head: bytes) -> str | None:
    """What the first bytes of a file say that it is, if no text begins so."""
    for name, magic in _MAGIC.items():
        if head.startswith(magic) and (name != "bzip2" or head[4:10] == b"1AY&SY"):
            return name
    if head[257:262] == b"ustar":
        return "tar"
    return next((name for magic, name in _OTHER_MAGIC.items() if head.startswith(magic)), None)


class _Unpacked(io.RawIOBase):
    """A raw stream over the members of a packed file."""

    def __init__(self, stream: IO[bytes], file: InputFile) -> None:
        self._stream = stream
        self._blocks = _unpack(stream, file)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


def _unpack(stream: IO[bytes], file: InputFile) -> Iterator[bytes]:
    kind = file.compression
    assert kind is not None
    pending = stream.read(_READ_BYTES)
    if not pending:
        raise DataError(
            f"{file.path} is empty: 0 bytes are no {kind} file, not even one of an empty text; "
            "fetch or write it again"
        )
    if not pending.startswith((_MAGIC[kind], *(_SKIPPABLE_ZSTD if kind == "zstd" else ()))):
        real = kind_by_content(pending) or "plain text or something else"
        raise DataError(
            f"{file.path} is named like {kind} but begins with {pending[:4].hex(' ')}, which is "
            f"{real}; rename it so that its last suffix says what it is"
        )
    while pending:
        member = _decompressor(kind)
        while not member.eof:
            try:
                block = member.decompress(pending)
            except (zlib.error, OSError, lzma.LZMAError, EOFError, ValueError, _ZstdError) as error:
                raise DataError(
                    f"{file.path}: damaged {kind} data in the {_READ_BYTES >> 10} KiB before byte "
                    f"{stream.tell()} of {file.num_bytes} ({error}); fetch or pack the file again"
                ) from None
            if block:
                yield block
            if not member.eof and not (pending := stream.read(_READ_BYTES)):
                raise DataError(
                    f"{file.path}: the {kind} data is cut off at byte {stream.tell()}, before its "
                    "end; fetch or pack the file again"
                )
        pending = member.unused_data or stream.read(_READ_BYTES)
        padding = 0
        while kind in _PADDED and pending:
            content = pending.lstrip(b"\0")
            padding += len(pending) - len(content)
            pending = content or stream.read(_READ_BYTES)
            if content:
                break
        if kind == "xz" and padding % 4:
            raise DataError(
                f"{file.path}: {padding} bytes of padding follow a stream of xz, which has a "
                "multiple of 4: it is cut off or damaged; fetch or pack the file again"
            )


def _decompressor(kind: str) -> _Decompressor:
    if kind == "gzip":
        return zlib.decompressobj(wbits=31)
    if kind == "bzip2":
        return bz2.BZ2Decompressor()
    if kind == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    if zstandard is None:
        raise DataUsageError(
            "reading .zst files needs the package zstandard; install it with "
            f"{sys.executable} -m pip install zstandard"
        )
    # As large as `zstd --long=31` writes: a window must fit, however it was packed.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
