"""Integer arrays in tars of others, one document per member: read strictly, and refused by name.

A member is KEY.npy or KEY.tokens.npy (one dimension, <u1 <u2 <u4 <i4 <i8), or KEY.bin, raw numbers
of a type that the caller names; members with other endings are left alone and counted. tarfile, and
with it every WebDataset reader, takes a broken header for the end of the archive; so what follows
the last member has to be the mark that ends a tar. A flipped bit inside an array cannot be seen:
such tars carry no hashes. Memory: one document and a tar's list of keys.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.config import DataError, DataUsageError

ENDINGS = ("npy", "tokens.npy", "bin", "tokens.bin")
TYPES = ("<u1", "<u2", "<u4", "<i4", "<i8")
_PACKED = {
    b"\x1f\x8b": "gzip -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ\x00": "xz -d",
}
_MARK = bytes(1024)


@dataclass(frozen=True)
class Array:
    """One member."""

    where: str
    """TAR, member NAME: how messages call it."""
    ids: NDArray[Any]


def read_arrays(tar: Path, *, dtype: str | None, ignored: Counter[str]) -> Iterator[Array]:
    """The documents of a tar in its order; `ignored` counts members by the ending that they have.

    DataUsageError for what is no such tar, DataError for one that is damaged.
    """
    _check_packing(tar)
    keys: set[str] = set()
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                # Or tarfile would keep every header for as long as the tar is open.
                archive.members = []  # type: ignore[attr-defined]
                array = _read(tar, archive, member, dtype, keys, ignored)
                if array is not None:
                    yield array
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{tar} is damaged or no tar: {error}; fetch it again") from error
    _check_end(tar, end)
    if not keys:
        seen = ", ".join(f".{ending}" for ending, _ in ignored.most_common(3)) or "nothing"
        raise DataUsageError(
            f"{tar} holds no token arrays: members end in .npy, .tokens.npy or, with --dtype, "
            f".bin; it holds {seen}"
        )


def _read(
    tar: Path,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    dtype: str | None,
    keys: set[str],
    ignored: Counter[str],
) -> Array | None:
    """A member's document; None for one that is left alone."""
    if member.isdir():
        return None
    where = f"{tar}, member {member.name}"
    folder, _, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    if ending == "lens.npy":
        raise DataUsageError(
            f"{where}: this is a token shard of headrace, no foreign tar; train on its dataset"
        )
    if ending not in ENDINGS:
        ignored[ending] += 1
        return None
    if not member.isreg():
        raise DataUsageError(f"{where} is a link or device, no file; pack the tar again")
    key = f"{folder}/{stem}"
    if key in keys:
        raise DataUsageError(
            f"{where}: the key {key.lstrip('/')!r} comes twice in this tar, and WebDataset readers "
            "would join or lose one; pack it again with keys of their own"
        )
    keys.add(key)
    file = archive.extractfile(member)
    assert file is not None, "a regular file"
    raw = file.read()
    if len(raw) < member.size:
        raise DataError(f"{where} is cut after {len(raw)} of {member.size} bytes; fetch it again")
    is_raw = ending.endswith("bin")
    ids = _from_raw(where, raw, dtype) if is_raw else _from_npy(where, raw)
    if len(ids) == 0:
        raise DataUsageError(f"{where} is empty; leave out documents without tokens")
    return Array(where, ids)


def _from_raw(where: str, raw: bytes, dtype: str | None) -> NDArray[Any]:
    if dtype is None:
        raise DataUsageError(f"{where} holds raw numbers; say of which type: --dtype '<u2', say")
    kind = np.dtype(dtype)
    if len(raw) % kind.itemsize:
        raise DataUsageError(
            f"{where} has {len(raw)} bytes, no multiple of the {kind.itemsize} of {dtype}; "
            "give the --dtype that it was written with"
        )
    return np.frombuffer(raw, dtype=kind)


def _from_npy(where: str, raw: bytes) -> NDArray[Any]:
    """The array, its header believed in nothing that the bytes do not hold."""
    file = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(file)
        read_header: Any = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"format version {version[0]}.{version[1]}")
        shape, _, kind = read_header(file)
    except (ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{where} is no .npy file: {error}; write it with numpy.save") from error
    if kind.hasobject:
        raise DataUsageError(
            f"{where} holds Python objects, which are never loaded: unpickling can run code; "
            "write integer arrays"
        )
    if kind.str.replace("|", "<") not in TYPES:
        raise DataUsageError(
            f"{where} has type {kind.str}, token ids have one of {' '.join(TYPES)}; convert it "
            "with array.astype('<u4')"
        )
    if len(shape) != 1:
        raise DataUsageError(
            f"{where} has shape {shape}, a document has one dimension; flatten it with "
            "array.reshape(-1), or write each row as a member"
        )
    body = memoryview(raw)[file.tell() :]
    if len(body) != prod(shape) * kind.itemsize:
        raise DataError(
            f"{where} is damaged: {len(body)} bytes of numbers, its header says "
            f"{prod(shape) * kind.itemsize}; fetch the tar again"
        )
    return np.frombuffer(body, dtype=kind)


def _check_packing(tar: Path) -> None:
    try:
        with tar.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise DataUsageError(f"{tar} cannot be read: {error.strerror}") from error
    for magic, command in _PACKED.items():
        if head.startswith(magic):
            raise DataUsageError(
                f"{tar} is compressed, so no place in it can be addressed; unpack it with "
                f"`{command}` and name the .tar"
            )
    if not head:
        raise DataUsageError(f"{tar} is empty; leave it out, or fetch it again")


def _check_end(tar: Path, offset: int) -> None:
    with tar.open("rb") as file:
        file.seek(offset)
        rest = file.read(len(_MARK))
        size = os.fstat(file.fileno()).st_size
    if rest != _MARK:
        raise DataError(
            f"{tar} is damaged: at byte {offset} of {size} there is neither a member nor the mark "
            "that ends a tar, so it was cut or a header was lost; fetch it again"
        )
