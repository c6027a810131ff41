"""What a checkpoint's manifest may hold. A seal tells that a file is as it was written, not that it
was we who wrote it; so every number that is used as a place is held against the others first. No
torch here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.durable import read_seal
from train import slices
from train.slices import ITEM_BYTES, CheckpointError

Count = Annotated[int, Field(ge=0, lt=2**62)]
FORMAT = "headrace-checkpoint"
VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


class _Tensor(_Strict):
    offset: Count
    table: Count


class _File(_Strict):
    name: Annotated[str, Field(pattern=r"^rank-[0-9]{5,}\.safetensors$")]
    bytes: Count
    chunks: list[Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]]
    tensors: dict[str, _Tensor]
    tables: list[list[tuple[str, Count, Count]]]


class _Manifest(_Strict):
    step: Count
    parameters: dict[str, list[Count]]
    scalars: dict[str, float]
    state: dict[str, Any]
    files: list[_File]


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest whose every place lies where it says; CheckpointError names what does not."""
    body = read_seal(path, error=CheckpointError, remedy="")
    content = json.loads(body)
    found = content if isinstance(content, dict) else {}
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format {found.get('format')!r} version {found.get('version')!r}, "
            f"this headrace reads {FORMAT!r} version {VERSION}"
        )
    try:
        manifest = _Manifest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise _not_ours(path, ".".join(map(str, first["loc"])), first["msg"]) from None
    sizes = {name: int(np.prod(s, dtype=object)) for name, s in manifest.parameters.items()}
    for file in manifest.files:
        _check_file(path, file, sizes)
    return found


def _check_file(path: Path, file: _File, sizes: dict[str, int]) -> None:
    if len(file.chunks) != slices.num_chunks(file.bytes):
        raise _not_ours(path, file.name, f"{len(file.chunks)} hashes for {file.bytes} bytes")
    ends = []
    for table in file.tables:
        for name, start, length in table:
            if start + length > sizes.get(name, -1):
                raise _not_ours(path, file.name, f"a range of {name!r} that it does not have")
        ends.append(sum(length for _, _, length in table) * ITEM_BYTES)
    for key, tensor in file.tensors.items():
        if tensor.table >= len(ends) or tensor.offset + ends[tensor.table] > file.bytes:
            raise _not_ours(path, file.name, f"{key!r} lies outside of the file")


def _not_ours(path: Path, where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path} holds what no headrace writes: {where}: {what}")
