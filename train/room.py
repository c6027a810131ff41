"""Whether a checkpoint fits, asked before its first byte is written. No torch.

What a rank's file takes is known exactly from its ranges, and the manifest from above. Both are
rounded up to blocks and compared with what the file system says it has. A quota it does not tell of
still shows when it is exceeded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.durable import StorageError
from train.checkpoint import folders_of, step_folder
from train.inventory import Inventory
from train.slices import Range, chunk_bytes_of, file_name, num_chunks, slices_bytes
from train.tables import flat_table

MANIFEST_HEAD_BYTES = 400
"""Of a manifest, at most: its keys, numbers and seal."""
AGAIN = "then run the same command again: what was finished is kept"


@dataclass(frozen=True)
class Share:
    """What one rank adds to a checkpoint."""

    file_bytes: int
    manifest_bytes: int
    """Without the hashes, whose number depends on all files."""


@dataclass(frozen=True)
class Free:
    """What a file system has left for us; None where it does not tell."""

    bytes: int | None
    inodes: int | None
    block: int
    """Bytes that the smallest file takes."""


def share(
    rank: int,
    ranges: Mapping[str, Sequence[Range]],
    inventory: Inventory,
) -> Share:
    """The share of a rank that owns these ranges; the inventory itself is rank 0's."""
    numbers = {name: number for number, name in enumerate(sorted(inventory))}
    size = slices_bytes({key: sum(row[2] for row in table) for key, table in ranges.items()})
    entry = {
        "name": file_name(rank),
        "bytes": size,
        "chunk_bytes": size,
        "chunks": "",
        "tensors": {key: {"offset": size, "table": len(ranges)} for key in ranges},
        "tables": [flat_table(table, numbers) for table in {*map(tuple, ranges.values())}],
    }
    whole = {name: one.model_dump() for name, one in inventory.items()} if rank == 0 else {}
    return Share(size, _length(entry) + 1 + _length(whole))


def check_room(run: Path, step: int, shares: Sequence[Share], state: Mapping[str, Any]) -> None:
    """StorageError when the checkpoint of this step does not fit; what an earlier attempt left in
    its place counts as free, because it is removed first. One rank only.
    """
    folder = step_folder(run, step)
    free = free_at(folder)
    left_bytes, left_inodes = _taken([folder])
    needed, inodes = _needed(shares, _length(state), free.block)
    if free.bytes is not None and needed > free.bytes + left_bytes:
        raise StorageError(
            f"{folder} needs {needed:,} bytes, and its file system has {free.bytes:,} free; make "
            f"room on that disk, {AGAIN}"
        )
    if free.inodes is not None and inodes > free.inodes + left_inodes:
        raise StorageError(
            f"{folder} needs {inodes:,} inodes, one for each file, and its file system has "
            f"{free.inodes:,} free; remove files from that disk, {AGAIN}"
        )


def tight(run: Path, keep: int, shares: Sequence[Share]) -> str | None:
    """What to warn of when not even `keep` checkpoints and the one that is being written fit; what
    the run's checkpoints take now counts as free. One rank only.
    """
    free = free_at(run)
    needed, inodes = _needed(shares, 0, free.block)
    held_bytes, held_inodes = _taken(folders_of(run))
    count = keep + 1
    for what, one, left, held in (
        ("bytes", needed, free.bytes, held_bytes),
        ("inodes", inodes, free.inodes, held_inodes),
    ):
        if left is not None and one * count > left + held:
            return (
                f"a checkpoint takes {one:,} {what}, and checkpoint.keep={keep} needs room for "
                f"{count}: {one * count:,}; the file system of {run} has {left + held:,}, of "
                f"which this run's checkpoints take {held:,}: make room, lower checkpoint.keep, or "
                "put the run on another disk"
            )
    return None


def free_at(path: Path) -> Free:
    """What is left where this path is, or would be made."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    found = os.statvfs(there)
    return Free(
        # Some network file systems tell nothing, and say 0 of everything.
        bytes=found.f_bavail * found.f_frsize if found.f_blocks else None,
        inodes=found.f_favail if found.f_files else None,
        block=found.f_frsize or 1,
    )


def _needed(shares: Sequence[Share], state_bytes: int, block: int) -> tuple[int, int]:
    """Bytes and inodes of a checkpoint: its files, its manifest, and its folder in checkpoints/."""
    chunk_bytes = chunk_bytes_of(sum(one.file_bytes for one in shares))
    hashes = sum(16 * num_chunks(one.file_bytes, chunk_bytes) for one in shares)
    manifest = MANIFEST_HEAD_BYTES + state_bytes + hashes
    manifest += sum(one.manifest_bytes for one in shares)
    sizes = [manifest, *(one.file_bytes for one in shares)]
    blocks = sum(-(-size // block) for size in sizes)
    return (blocks + 2) * block, len(sizes) + 2


def _taken(folders: Iterable[Path]) -> tuple[int, int]:
    """Bytes on the disk and inodes of the files in these folders."""
    found = [file.stat() for folder in folders if folder.is_dir() for file in folder.iterdir()]
    return sum(entry.st_blocks * 512 for entry in found), len(found)


def _length(content: Any) -> int:
    return len(json.dumps(content, separators=(",", ":")))
