"""Packing plans on disk: which parts of which documents every best-fit sample of a dataset holds.

    DATASET/packing/2048/plan.json                       sealed, written last: what the plan was
                                                         made for, and the hash of every file
    DATASET/packing/2048/train/main/shard-000000.npy     one array of <u8 for each shard

A file of N samples with P parts holds N + 1 numbers, at which part every sample begins, and then P
parts as start * 2^20 + length - 1, the start counted in tokens of the shard. So any sample is found
with two short reads. A file is hashed as a whole before the first of its numbers is believed, and
so are those of a small plan before a run begins.
Cost: 8 bytes on disk per part and per sample. Memory: 64 bytes per shard and 1,024 samples; 128
open files.
"""

from __future__ import annotations

import hashlib
import io
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.config import COMMAND, AccessError, DataError, DataUsageError, MissingError
from data.durable import parsed, unsealed, write_sealed
from data.folder import Folder, read_at
from data.manifest import Manifest, read_table
from data.packing import PackedChunk, Parts
from data.places import Place
from data.recent import Recent

FOLDER = "packing"
PLAN = "plan.json"
FORMAT = "headrace-packing"
VERSION = 1
LENGTH_BITS = 20
CHECKED_BYTES = 2**28
"""Of a plan that are hashed before training: those of about 3 * 10^10 tokens at seq_len 2048."""
MAX_FILES = 128
MAX_SAMPLES = 1024
_WIDTH = 8

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedShard:
    """What plan.json says of the file of one shard."""

    samples: int
    parts: int
    targets: int
    """Places of the samples that have a target; the rest is padding."""
    cut: int
    """Documents that are longer than a sample."""
    sha256: str


_COLUMNS = {
    "samples": "samples", "parts": "parts", "targets": "targets", "cut": "cut", "files": "sha256",
}  # fmt: skip
"""Key in plan.json -> what it lists of every shard; "sha256" there is the seal."""


@dataclass(frozen=True)
class Plan:
    """The content of a plan.json, its shards in the order of the manifest."""

    place: Place
    seq_len: int
    shards: tuple[PackedShard, ...]


def plan_folder(dataset: Path, seq_len: int) -> Path:
    """Where the plan for a length lies."""
    return dataset / FOLDER / str(seq_len)


def plan_name(seq_len: int, shard: str = "") -> str:
    """The file of a shard (SPLIT/SOURCE/FILE), or plan.json, relative to the dataset."""
    file = Path(shard).with_suffix(".npy").as_posix() if shard else PLAN
    return f"{FOLDER}/{seq_len}/{file}"


def planned_lengths(place: Place) -> list[int]:
    """The lengths that `headrace data pack` has made plans for, or has begun to; what lies
    elsewhere cannot be listed.
    """
    if not isinstance(place, Folder):
        return []
    names = [path.name for path in (place.folder / FOLDER).glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def command(place: Place, seq_len: int) -> str:
    """What makes a plan, as an error tells it."""
    elsewhere = "" if isinstance(place, Folder) else " in the directory it was copied from"
    return f"`headrace data pack {place} --seq-len {seq_len}`{elsewhere}"


def write_plan(dataset: Path, manifest: Manifest, seq_len: int, shards: list[PackedShard]) -> None:
    """Commit a plan whose files are on disk. Equal arguments write equal bytes."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "packing": "best_fit",
        "seq_len": seq_len,
        "fingerprint": manifest.fingerprint,
        **{key: [getattr(shard, name) for shard in shards] for key, name in _COLUMNS.items()},
    }
    write_sealed(plan_folder(dataset, seq_len) / PLAN, content)


def read_plan(place: Place, manifest: Manifest, seq_len: int) -> Plan:
    """The plan of a dataset for samples of a length. DataUsageError when there is none or it is of
    other data, DataError when it is damaged; both name the command that makes it.
    """
    path = place.path(plan_name(seq_len))
    make = f"make it with {command(place, seq_len)}"
    raw, reason = None, f"{path} is missing"
    try:
        raw = place.sealed(plan_name(seq_len))
    except AccessError as error:
        # A command only fails: what it was asked for may be missing.
        if not str(place).startswith(COMMAND):
            raise
        reason = str(error)
    if raw is None:
        raise DataUsageError(
            f"{place} has no plan for data.packing=best_fit with seq_len={seq_len} ({reason}); "
            f"{make}, or write data.packing=concat"
        )
    again = f"; {make} again"
    found = parsed(unsealed(raw, path, remedy=again), path, remedy=again)
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise DataUsageError(
            f"{path} is no packing plan that this headrace reads (format {found.get('format')!r}, "
            f"version {found.get('version')!r}); {make} again"
        )
    if (found["fingerprint"], found["seq_len"]) != (manifest.fingerprint, seq_len):
        raise DataUsageError(
            f"{path} was made for data of fingerprint {found['fingerprint'][:16]} with "
            f"seq_len={found['seq_len']}, but {place} is {manifest.fingerprint[:16]}; {make} "
            "again"
        )
    rows = zip(*(found[name] for name in _COLUMNS), strict=True)
    plan = Plan(place, seq_len, tuple(PackedShard(*row) for row in rows))
    if len(plan.shards) != len(manifest.shards):
        raise DataError(f"{path} lists {len(plan.shards)} shards, not those of {place}; {make}")
    return plan


def check_plan(place: Place, manifest: Manifest, seq_len: int) -> None:
    """Hash the files of a plan, of both splits, before a run has spent time on anything. DataError
    for one that is damaged, naming the command that makes it again.

    Beyond CHECKED_BYTES, and of what lies elsewhere (the cache hashes what it fetches), files are
    held against their hash when they are first used. Cost: 0.2 s where there is most to do.
    """
    if not isinstance(place, Folder):
        return
    plan, left = read_plan(place, manifest, seq_len), CHECKED_BYTES
    for entry, shard in zip(manifest.shards, plan.shards, strict=True):
        left -= _WIDTH * (shard.samples + 1 + shard.parts)
        if left < 0:
            return
        os.close(open_plan_file(place, seq_len, entry.path, shard.sha256))


def plan_bytes(packings: Sequence[tuple[int, PackedChunk]]) -> tuple[bytes, PackedShard]:
    """The file of a shard, from the packing of each of its chunks with the chunk's first token."""
    firsts, parts = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    num_parts = num_targets = num_cut = 0
    for begin, packing in packings:
        firsts.append(packing.firsts[1:] + num_parts)
        starts = packing.parts.starts + begin
        parts.append((starts << LENGTH_BITS) + packing.parts.lens - 1)
        num_parts += len(starts)
        num_targets += packing.parts.num_targets
        num_cut += packing.num_cut
    numbers = np.concatenate([*firsts, *parts]).astype("<u8")
    file = io.BytesIO()
    np.save(file, numbers, allow_pickle=False)
    content = file.getvalue()
    num_samples = len(numbers) - num_parts - 1
    sha256 = hashlib.sha256(content).hexdigest()
    return content, PackedShard(num_samples, num_parts, num_targets, num_cut, sha256)


def open_plan_file(place: Place, seq_len: int, shard: str, sha256: str) -> int:
    """A file descriptor of a shard's file, all of it hashed. DataError naming the command."""
    try:
        with place.open(plan_name(seq_len, shard), sha256) as whole:
            found = hashlib.file_digest(whole, "sha256").hexdigest()
            file = os.dup(whole.fileno())
    except MissingError as error:
        raise DataError(_damaged(place, seq_len, shard, "it is missing")) from error
    if found != sha256:
        os.close(file)
        raise DataError(_damaged(place, seq_len, shard, f"its sha256 is not the one in {PLAN}"))
    return file


class PlanReader:
    """The samples of one source by a plan: sample n of the source -> its parts.

    Not for use by several threads at once; a copy sent to another process opens its own files.
    """

    def __init__(self, plan: Plan, manifest: Manifest, split: str, source: str) -> None:
        entries = manifest.source_shards(split, source)
        self._row = manifest.shards.index(entries[0])
        shards = plan.shards[self._row : self._row + len(entries)]
        self._place, self._seq_len = plan.place, plan.seq_len
        self._table_sha256 = manifest.table_sha256
        self._ends = array("q", accumulate(shard.samples for shard in shards))
        self._num_parts = array("q", (shard.parts for shard in shards))
        self._sha256 = np.array([list(bytes.fromhex(s.sha256)) for s in shards], dtype=np.uint8)
        self._tokens = array("q", accumulate((entry.tokens for entry in entries), initial=0))
        self.num_targets = sum(shard.targets for shard in shards)
        """Targets of all samples."""
        self._reset()

    @property
    def num_samples(self) -> int:
        """Samples of the source."""
        return self._ends[-1]

    def parts(self, sample: int) -> Parts:
        """The parts of a sample, starts counted in tokens of the source. DataError when damaged."""
        return self._parts.get(sample, self._read)

    def samples_of(self, start: int, stop: int) -> Ints:
        """The samples that hold some of tokens [start, stop) of the source, sorted."""
        found = [np.zeros(0, dtype=np.int64)]
        last = bisect_left(self._tokens, stop)
        for shard in range(bisect_right(self._tokens, start) - 1, last):
            firsts = self._numbers(shard, 0, self._num_samples(shard) + 1).astype(np.int64)
            parts = self._unpacked(shard, 0, self._num_parts[shard])
            near = (parts.starts < stop) & (parts.starts + parts.lens > start)
            numbers = np.searchsorted(firsts, np.flatnonzero(near), side="right") - 1
            found.append(np.unique(numbers) + self._ends[shard] - self._num_samples(shard))
        return np.concatenate(found)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_files", "_parts", "_checked", "_table")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._files: Recent[int, tuple[int, int]] = Recent(
            MAX_FILES, drop=lambda file: os.close(file[0])
        )
        self._parts: Recent[int, Parts] = Recent(MAX_SAMPLES)
        self._checked: set[int] = set()

    @cached_property
    def _table(self) -> NDArray[np.void]:
        return read_table(self._place, self._table_sha256)

    def _num_samples(self, shard: int) -> int:
        return self._ends[shard] - (self._ends[shard - 1] if shard else 0)

    def _read(self, sample: int) -> Parts:
        shard = bisect_right(self._ends, sample)
        number = sample - self._ends[shard] + self._num_samples(shard)
        first, last = self._numbers(shard, number, 2).tolist()
        return self._unpacked(shard, first, last)

    def _unpacked(self, shard: int, first: int, last: int) -> Parts:
        at = self._num_samples(shard) + 1
        numbers = self._numbers(shard, at + first, last - first).astype(np.int64)
        starts = (numbers >> LENGTH_BITS) + self._tokens[shard]
        return Parts(starts, (numbers & (2**LENGTH_BITS - 1)) + 1)

    def _numbers(self, shard: int, first: int, count: int) -> NDArray[np.uint64]:
        file, begin = self._files.get(shard, self._open)
        path = self._place.path(plan_name(self._seq_len, self._shard(shard)))
        raw = read_at(file, _WIDTH * count, begin + _WIDTH * first, path)
        if len(raw) < _WIDTH * count:
            cut = "it was cut while it was in use"
            raise DataError(_damaged(self._place, self._seq_len, self._shard(shard), cut))
        return np.frombuffer(raw, dtype="<u8")

    def _open(self, shard: int) -> tuple[int, int]:
        """A descriptor, and where the numbers begin: behind a header of no fixed length."""
        sha256, name = self._sha256[shard].tobytes().hex(), self._shard(shard)
        if shard in self._checked:
            with self._place.open(plan_name(self._seq_len, name), sha256) as whole:
                file = os.dup(whole.fileno())
        else:
            file = open_plan_file(self._place, self._seq_len, name, sha256)
            self._checked.add(shard)
        count = self._num_samples(shard) + 1 + self._num_parts[shard]
        return file, os.fstat(file).st_size - _WIDTH * count

    def _shard(self, shard: int) -> str:
        return bytes(self._table[self._row + shard]["path"]).decode()


def _damaged(place: Place, seq_len: int, shard: str, what: str) -> str:
    path = place.path(plan_name(seq_len, shard))
    return f"{path} is damaged: {what}; make the plan again with {command(place, seq_len)}"
