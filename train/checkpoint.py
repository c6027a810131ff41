"""Checkpoint v1: what is on disk, and when it counts.

    RUN/checkpoints/step-000000500/rank-00000.safetensors ...  state.json  manifest.json

Each rank writes flat fp32 ranges of every parameter and optimizer state that it owns; ranges of all
ranks tile every parameter exactly once, so a checkpoint loads at any ZeRO stage and world size.
manifest.json is written last and is the only commit point: a folder without it is garbage, whatever
else it holds. It carries its own sha256, and an xxh3 of every 16 MiB chunk of every file, checked
while it is read. No torch here, so that the protocol can be killed a thousand times a minute in
tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xxhash
from safetensors.numpy import save_file

FORMAT = "headrace-checkpoint"
VERSION = 1
CHUNK_BYTES = 16 << 20
ITEM_BYTES = 4  # fp32

Range = tuple[str, int, int]
"""(parameter name, first element, number of elements) of one contiguous piece."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or of another model."""

    exit_code: ClassVar[int] = 1


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, opened: its manifest is read and verified, its tensors are not."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return int(self.manifest["step"])

    @property
    def state(self) -> dict[str, Any]:
        """What the trainer stored beside the tensors: data position, config hash, tokenizer."""
        state: dict[str, Any] = self.manifest["state"]
        return state

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name."""
        return {name: tuple(shape) for name, shape in self.manifest["parameters"].items()}

    @property
    def keys(self) -> tuple[str, ...]:
        """`param` and the optimizer states that are stored for at least one parameter."""
        return tuple(
            dict.fromkeys(key for entry in self.manifest["files"] for key in entry["tensors"])
        )

    @property
    def scalars(self) -> dict[str, float]:
        """Optimizer state that is one number for the whole model, such as AdamW's `step`."""
        return dict(self.manifest["scalars"])

    def read(self, name: str, key: str = "param") -> np.ndarray:
        """A whole parameter (or its optimizer state) as a float32 array of its shape."""
        shape = self.parameters[name]
        size = int(np.prod(shape, dtype=np.int64))
        return SliceReader(self).read(name, key, 0, size).reshape(shape)

    def verify(self) -> None:
        """Read every byte; CheckpointError names the first file and chunk that is not what was
        written.
        """
        for entry in self.manifest["files"]:
            reader = _FileReader(self.folder / entry["name"], entry)
            for chunk in range(len(entry["chunks"])):
                reader.chunk(chunk)


class SliceReader:
    """Reads any range of any parameter from the files that hold it, touching only the chunks it
    needs.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._pieces: dict[tuple[str, str], list[tuple[int, int, int, int]]] = {}
        self._readers: dict[int, _FileReader] = {}
        for index, entry in enumerate(checkpoint.manifest["files"]):
            for key, tensor in entry["tensors"].items():
                offset = tensor["offset"]
                for name, start, length in entry["tables"][tensor["table"]]:
                    self._pieces.setdefault((key, name), []).append((start, length, index, offset))
                    offset += length * ITEM_BYTES

    @property
    def bytes_read(self) -> int:
        """Bytes fetched from disk so far."""
        return sum(reader.bytes_read for reader in self._readers.values())

    def has(self, name: str, key: str) -> bool:
        """Whether this state is stored for this parameter."""
        return (key, name) in self._pieces

    def read(self, name: str, key: str, start: int, length: int) -> np.ndarray:
        """Elements [start, start + length) of the flattened parameter, float32."""
        out = np.empty(length, dtype=np.float32)
        filled = 0
        for first, size, index, offset in self._pieces.get((key, name), ()):
            low, high = max(first, start), min(first + size, start + length)
            if low < high:
                raw = self._reader(index).read(
                    offset + (low - first) * ITEM_BYTES, (high - low) * ITEM_BYTES
                )
                out[low - start : high - start] = np.frombuffer(raw, dtype="<f4")
                filled += high - low
        if filled != length:
            raise CheckpointError(
                f"{self._checkpoint.folder} holds {filled} of the {length} elements of {key} of "
                f"{name!r} "
                f"from {start}; it was written by another model"
            )
        return out

    def _reader(self, index: int) -> _FileReader:
        if index not in self._readers:
            entry = self._checkpoint.manifest["files"][index]
            self._readers[index] = _FileReader(self._checkpoint.folder / entry["name"], entry)
        return self._readers[index]


class _FileReader:
    """Verified reads of one file; keeps the last chunk, because ranges are read in order."""

    def __init__(self, path: Path, entry: Mapping[str, Any]) -> None:
        self._path = path
        self._entry = entry
        self._held: tuple[int, bytes] = (-1, b"")
        self.bytes_read = 0
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        if found != entry["bytes"]:
            raise CheckpointError(f"{path} has {found} bytes, {entry['bytes']} were written")

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length:
            index, inside = divmod(offset, CHUNK_BYTES)
            part = self.chunk(index)[inside : inside + length]
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def chunk(self, index: int) -> bytes:
        if self._held[0] != index:
            with self._path.open("rb") as file:
                data = os.pread(file.fileno(), CHUNK_BYTES, index * CHUNK_BYTES)
            self.bytes_read += len(data)
            if xxhash.xxh3_64_hexdigest(data) != self._entry["chunks"][index]:
                raise CheckpointError(
                    f"{self._path}: chunk {index} (bytes {index * CHUNK_BYTES} to "
                    f"{index * CHUNK_BYTES + len(data)}) is not what was written"
                )
            self._held = (index, data)
        return self._held[1]


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of this step lies."""
    return run / "checkpoints" / f"step-{step:09d}"


def begin(run: Path, step: int) -> Path:
    """An empty folder for this step; what an earlier attempt left there is removed, its manifest
    first. One rank only.
    """
    folder = step_folder(run, step)
    _remove(folder)
    folder.mkdir(parents=True)
    return folder


def write_slices(
    folder: Path, rank: int, arrays: Mapping[str, np.ndarray], ranges: Mapping[str, Sequence[Range]]
) -> dict[str, Any]:
    """Write one rank's file and return its manifest entry.

    `arrays[key]` is 1-D float32: the concatenation of `ranges[key]` in order.
    """
    path = folder / f"rank-{rank:05d}.safetensors"
    save_file(
        {key: np.ascontiguousarray(array, dtype="<f4") for key, array in arrays.items()}, path
    )
    tables: list[list[Range]] = []
    tensors = {}
    for key, offset in _data_offsets(path).items():
        table = list(ranges[key])
        if table not in tables:
            tables.append(table)
        tensors[key] = {"offset": offset, "table": tables.index(table)}
    chunks = [xxhash.xxh3_64_hexdigest(data) for data in _chunks(path)]
    fsync(path)
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "chunks": chunks,
        "tensors": tensors,
        "tables": tables,
    }


def commit(
    folder: Path,
    *,
    step: int,
    parameters: Mapping[str, Sequence[int]],
    scalars: Mapping[str, float],
    state: Mapping[str, Any],
    files: Sequence[Mapping[str, Any]],
) -> None:
    """Make the checkpoint exist. One rank only, after every rank's file is on disk."""
    check_tiling(parameters, files)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "parameters": {name: list(shape) for name, shape in parameters.items()},
        "scalars": dict(scalars),
        "state": dict(state),
        "files": list(files),
    }
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    temporary = folder / "manifest.json.tmp"
    temporary.write_text(f'{{"manifest":{body},"sha256":"{digest}"}}\n')
    fsync(temporary)
    fsync(folder)
    temporary.rename(folder / "manifest.json")
    fsync(folder)
    fsync(folder.parent)


def check_tiling(
    parameters: Mapping[str, Sequence[int]], files: Sequence[Mapping[str, Any]]
) -> None:
    """CheckpointError unless the ranges of every stored state cover each of its parameters exactly
    once.
    """
    pieces: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for entry in files:
        for key, tensor in entry["tensors"].items():
            for name, start, length in entry["tables"][tensor["table"]]:
                pieces.setdefault((key, name), []).append((start, length))
    for name in parameters:
        pieces.setdefault(("param", name), [])
    for (key, name), found in pieces.items():
        position = 0
        for start, length in sorted(found):
            if start != position:
                break
            position += length
        else:
            start = position
        size = int(np.prod(parameters[name], dtype=np.int64))
        if position != size or start != position:
            raise CheckpointError(
                f"the ranks' ranges of {key} of {name!r} do not tile its {size} elements: "
                f"covered to {position}, next piece at {start}; nothing was committed"
            )


def committed(run: Path) -> list[int]:
    """Steps with a manifest, newest first; nothing is verified yet."""
    steps = []
    for path in (run / "checkpoints").glob("step-*/manifest.json"):
        if match := re.fullmatch(r"step-(\d{9})", path.parent.name):
            steps.append(int(match[1]))
    return sorted(steps, reverse=True)


def open_checkpoint(run: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step`, or the newest one; CheckpointError when there is none or its
    manifest is damaged.
    """
    steps = committed(run)
    if step is None:
        if not steps:
            raise CheckpointError(
                f"{run} holds no committed checkpoint; train it with `headrace pretrain ... --run "
                f"{run}`"
            )
        step = steps[0]
    if step not in steps:
        have = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(
            f"{run} holds no committed checkpoint of step {step}; committed steps: {have}"
        )
    folder = step_folder(run, step)
    return Checkpoint(folder, _read_manifest(folder / "manifest.json"))


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` committed checkpoints, and uncommitted leftovers older than
    the newest.
    """
    steps = committed(run)
    for step in steps[keep:]:
        _remove(step_folder(run, step))
    for folder in (run / "checkpoints").glob("step-*"):
        if (
            steps
            and not (folder / "manifest.json").exists()
            and folder.name < step_folder(run, steps[0]).name
        ):
            _remove(folder)


def fsync(path: Path) -> None:
    """Push a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        outer = json.loads(text)
        manifest, digest = outer["manifest"], outer["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    body = text[len('{"manifest":') : text.rindex(',"sha256":')]
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise CheckpointError(f"{path} is damaged: its sha256 does not match its text")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')!r} version {manifest.get('version')!r}, "
            f"this headrace reads {FORMAT!r} version {VERSION}"
        )
    for entry in manifest["files"]:
        if Path(entry["name"]).name != entry["name"]:
            raise CheckpointError(f"{path} names a file outside its folder: {entry['name']!r}")
    result: dict[str, Any] = manifest
    return result


def _data_offsets(path: Path) -> dict[str, int]:
    # safetensors: 8 bytes little-endian header size, the JSON header, then the data.
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        key: 8 + size + value["data_offsets"][0]
        for key, value in header.items()
        if key != "__metadata__"
    }


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


def _remove(folder: Path) -> None:
    if folder.exists():
        # Without its manifest the folder is garbage at once, even if the removal is interrupted.
        (folder / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(folder)
