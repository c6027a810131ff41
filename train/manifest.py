"""What a checkpoint's manifest may hold. A seal tells that a file is as it was written, not that it
was we who wrote it; so every number that is used as a place is held against the others first.

Tables become columns while they are checked: the manifest of 1,024 ranks of ZeRO-3 with 175 billion
parameters, a million rows, is read within a second. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from data.durable import parsed, unsealed
from train.inventory import Count, Parameter, sizes_of
from train.patience import insisting
from train.slices import ITEM_BYTES, CheckpointError, num_chunks
from train.tables import LIMIT, Columns, columns

FORMAT = "headrace-checkpoint"
VERSION = 2


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", strict=True, arbitrary_types_allowed=True)


class _Tensor(_Strict):
    offset: Count
    table: Count


class _File(_Strict):
    name: Annotated[str, Field(pattern=r"^rank-[0-9]{5,}\.safetensors$")]
    bytes: Count
    chunk_bytes: Annotated[int, Field(gt=0, lt=LIMIT)]
    chunks: Annotated[str, Field(pattern=r"^[0-9a-f]*$")]
    tensors: dict[str, _Tensor]
    tables: list[Annotated[Any, AfterValidator(columns)]]


class _Manifest(_Strict):
    step: Count
    parameters: dict[str, Parameter]
    scalars: dict[str, float]
    state: dict[str, Any]
    files: list[_File]


def read_manifest(path: Path) -> dict[str, Any]:
    """`parsed_manifest` of a file."""
    try:
        raw = insisting(path.read_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return parsed_manifest(raw, str(path))


def parsed_manifest(raw: bytes, path: str) -> dict[str, Any]:
    """A manifest whose every place lies where it says, its tables as columns; CheckpointError names
    what does not.
    """
    body = unsealed(raw, path, error=CheckpointError, remedy="")
    content = parsed(body, path, error=CheckpointError, remedy="")
    found = content if isinstance(content, dict) else {}
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format {found.get('format')!r} version {found.get('version')!r}, "
            f"this headrace reads {FORMAT!r} version {VERSION}; version 1 has no inventory of the "
            "model, and is read by the headrace that wrote it: go on with that one, or export there"
        )
    try:
        manifest = _Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise _not_ours(path, ".".join(map(str, first["loc"])), first["msg"]) from None
    sizes = sizes_of(found["parameters"])
    if large := [name for name, size in sizes.items() if size >= LIMIT]:
        raise _not_ours(path, f"parameters.{large[0]}", "no model is so large")
    names = sorted(sizes)
    ends = np.array([sizes[name] for name in names], np.int64)
    stored = np.zeros(len(names))
    for file, entry in zip(manifest.files, found["files"], strict=True):
        _check_file(path, file, ends)
        entry["tables"] = file.tables
        if weights := file.tensors.get("param"):
            number, _, length = file.tables[weights.table].T
            stored += np.bincount(number, length, len(names))
    # Memory is asked for by these shapes, so they hold no more than the files do.
    if (short := ends > stored).any():
        one = int(short.argmax())
        what = f"{stored[one]:.0f} of its {ends[one]} elements are in a file"
        raise _not_ours(path, f"parameters.{names[one]}", what)
    return found


def _check_file(path: str, file: _File, sizes: Columns) -> None:
    if len(file.chunks) != 16 * num_chunks(file.bytes, file.chunk_bytes):
        many = f"{len(file.chunks) / 16:g} hashes for {file.bytes} bytes"
        raise _not_ours(path, file.name, many)
    for table in file.tables:
        number, start, length = table.T
        if number.max(initial=-1) >= len(sizes) or (start + length > sizes[number]).any():
            raise _not_ours(path, file.name, "a range of a parameter that it does not have")
    # Exact for files up to 9 PB, and never too small beyond.
    lengths = [table[:, 2].sum(dtype=np.float64) * ITEM_BYTES for table in file.tables]
    for key, tensor in file.tensors.items():
        if tensor.table >= len(lengths) or tensor.offset + lengths[tensor.table] > file.bytes:
            raise _not_ours(path, file.name, f"{key!r} lies outside of the file")


def _not_ours(path: str, where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path} holds what no headrace writes: {where}: {what}")
