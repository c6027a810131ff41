"""Documents in a random order over the whole input, in two passes and the memory of a bucket.

Every document has a key: blake2b of its place in the input (number of the file, place in the file)
and the seed. The first pass scatters documents to buckets, which are equal ranges of keys; the
second sorts each bucket. So the order is that of the keys, a pure function of seed and input, and
depends on neither parts, tasks nor workers. A bucket is a file of JSON lines that is read on like
any other input; how many there are follows from the bytes of all lines, which the first pass has
counted: however tight the input is packed, a bucket holds BUCKET_BYTES on average.
Every line is held against its hash, and a bucket that is read on against its own.
Cost: the text written and read twice, about 1 s per 100 MB; twice its size on the disk while the
preparation lasts. Memory: about 128 MiB of text in each process, or the longest document.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.cleaning import Cleaned, part_bytes, parts_per_job, read_cleaned
from data.config import DataError
from data.documents import (
    MAX_RECORD_BYTES,
    Document,
    Dropped,
    InputFile,
    Part,
    Reading,
    place_name,
)
from data.durable import publish, read_sealed, write_sealed, writing
from data.jobs import Job, files_of
from data.sealed_arrays import SealedArray, save
from data.stamps import Kept, damaged
from data.survey import Survey

BUCKET_BYTES = 2**27
"""Lines that a bucket holds on average."""
_ID_FIELD = "id"
_KEY_RANGE = 2**64


def buckets_reading(reading: Reading) -> Reading:
    """How the files of buckets are read, whatever the input was read like."""
    return Reading(id_field=_ID_FIELD if reading.id_field else "")


def document_key(seed: int, file: int, offset: int) -> int:
    """The place of a document in the order, as a number in [0, 2^64)."""
    salt = seed.to_bytes(8, "little")
    place = f"{file}:{offset}".encode()
    digest = hashlib.blake2b(place, digest_size=8, person=b"headrace shuffle", salt=salt).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class ScatterJob(Job):
    """Parts whose documents are to be found by bucket: lines of JSON, and where each lies."""

    first: int
    """Number of the first part."""
    parts: tuple[Part, ...]
    numbers: Mapping[InputFile, int]
    reading: Reading
    cleaned: Cleaned | None
    seed: int
    buffer_bytes: int

    def sources(self) -> set[InputFile]:
        """Those of its parts."""
        return files_of(self.parts)

    def run(self) -> None:
        """Raises DataError for a text that no line can hold."""
        skipped = Survey()
        path = lines_file(self.folder, self.number)
        temporary = path.with_name(path.name + ".tmp")
        rows: list[NDArray[np.uint64]] = [np.zeros((0, 4), np.uint64)]
        lines: list[tuple[int, bytes]] = []
        size = 0
        with temporary.open("wb") as file:
            for number, part in enumerate(self.parts, self.first):
                for source, found in read_cleaned(number, part, self.reading, self.cleaned):
                    if isinstance(found, Dropped):
                        skipped.skip(found)
                        continue
                    skipped.num_replaced += found.replaced > 0
                    skipped.num_unnamed += self.reading.lacks_id(source, found)
                    key = document_key(self.seed, self.numbers[source], found.offset)
                    lines.append((key, _line(source, found, self.reading)))
                    size += len(lines[-1][1])
                    if size >= self.buffer_bytes:
                        rows.append(_write_sorted(file, lines))
                        lines, size = [], 0
            rows.append(_write_sorted(file, lines))
            with writing(temporary):
                file.flush()
                os.fsync(file.fileno())
        publish(temporary, path)
        index = np.concatenate(rows)
        save(index_file(self.folder, self.number), index[np.argsort(index[:, 0], kind="stable")])
        content = {"documents": len(index), "num_bytes": int(index[:, 2].sum())}
        write_sealed(self.result, {**content, "skipped": skipped.to_json()})


@dataclass(frozen=True)
class BucketJob(Job):
    """A bucket to put in order."""

    scattered: Path
    num_scattered: int
    num_buckets: int

    @property
    def lines(self) -> Path:
        """The bucket, a file of JSON lines."""
        return self.folder / f"{self.number:06d}.jsonl"

    def run(self) -> None:
        """Read all lines of the bucket, write them sorted by key."""
        slices = [self._rows(number) for number in range(self.num_scattered)]
        ends = np.cumsum(np.concatenate([rows[:, 2] for rows in slices]).astype(np.int64))
        lines = memoryview(bytearray(int(ends[-1]) if len(ends) else 0))
        start = 0
        for number, rows in enumerate(slices):
            stop = start + int(rows[:, 2].sum())
            _read(lines_file(self.scattered, number), rows, lines[start:stop])
            start = stop
        # Stable: equal keys stay in the order of the input.
        order = np.argsort(np.concatenate([rows[:, 0] for rows in slices]), kind="stable")
        starts = np.r_[0, ends[:-1]] if len(ends) else ends
        found = xxhash.xxh3_128()
        temporary = self.lines.with_name(self.lines.name + ".tmp")
        with writing(temporary), temporary.open("wb") as file:
            for start, stop in zip(starts[order].tolist(), ends[order].tolist(), strict=True):
                file.write(lines[start:stop])
                found.update(lines[start:stop])
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, self.lines)
        write_sealed(self.result, {"num_bytes": len(lines), "xxh3": found.hexdigest()})

    def _rows(self, number: int) -> NDArray[np.uint64]:
        """Key, place, length and hash of the bucket's lines in a file, by place."""
        index = SealedArray(index_file(self.scattered, number))
        first, end = (
            -(-b * _KEY_RANGE // self.num_buckets) for b in (self.number, self.number + 1)
        )
        rows = index.between(first, end - 1)
        return rows[np.argsort(rows[:, 1], kind="stable")]


def scatter_jobs(
    folder: Path,
    files: Sequence[InputFile],
    parts: Sequence[Part],
    reading: Reading,
    cleaned: Cleaned | None,
    seed: int,
) -> list[ScatterJob]:
    """Every part once, in order."""
    numbers = {file: number for number, file in enumerate(files)}
    step = parts_per_job(len(parts))
    jobs: list[ScatterJob] = []
    for start in range(0, len(parts), step):
        group = tuple(parts[start : start + step])
        of_group = {extent.file: numbers[extent.file] for part in group for extent in part}
        size = sum(map(part_bytes, group))
        job = ScatterJob(
            folder, len(jobs), size, start, group, of_group, reading, cleaned, seed, BUCKET_BYTES
        )
        jobs.append(job)
    return jobs


def bucket_jobs(folder: Path, scattered: Sequence[ScatterJob]) -> list[BucketJob]:
    """Every bucket, as many as the lines that were scattered fill."""
    num_bytes = sum(read_sealed(job.result)["num_bytes"] for job in scattered)
    count = max(1, -(-num_bytes // BUCKET_BYTES))
    source = scattered[0].folder
    return [BucketJob(folder, n, 1, source, len(scattered), count) for n in range(count)]


def shuffled_files(jobs: Sequence[BucketJob]) -> list[InputFile]:
    """The buckets that hold anything, in order."""
    files = []
    for job in jobs:
        kept = Kept(**{key: read_sealed(job.result)[key] for key in ("num_bytes", "xxh3")})
        if kept.num_bytes:
            files.append(InputFile(job.lines, job.lines.name, kept.num_bytes, True, kept))
    return files


def num_scattered(jobs: Sequence[ScatterJob]) -> int:
    """Documents that are in some bucket."""
    return sum(read_sealed(job.result)["documents"] for job in jobs)


def skipped_by(jobs: Sequence[ScatterJob]) -> Survey:
    """What was met before the shuffle and is in no bucket."""
    total = Survey()
    for job in jobs:
        total.add(Survey.from_json(read_sealed(job.result)["skipped"]))
    return total


def lines_file(folder: Path, number: int) -> Path:
    """The lines of a job, in pieces that are sorted by key."""
    return folder / f"{number:06d}.lines"


def index_file(folder: Path, number: int) -> Path:
    """Key, place, length and xxh3 of every line of a job, sorted by key."""
    return folder / f"{number:06d}.index.npy"


def _line(file: InputFile, document: Document, reading: Reading) -> bytes:
    record = f'{{"text": {json.dumps(document.text.decode(), ensure_ascii=False)}'
    if reading.id_field:
        # Escaped: an id may hold what is no character.
        record += f', "{_ID_FIELD}": {json.dumps(document.id or place_name(file, document))}'
    line = f"{record}}}\n".encode()
    if len(line) > MAX_RECORD_BYTES:
        raise DataError(
            f"{file.path}: a text of {len(document.text)} bytes is too long to be shuffled; cut it "
            f"into texts under {MAX_RECORD_BYTES >> 30} GiB, or leave out --shuffle"
        )
    return line


def _write_sorted(file: BinaryIO, lines: list[tuple[int, bytes]]) -> NDArray[np.uint64]:
    """Append lines in the order of their keys; key, place, length and xxh3 of each."""
    # By key alone: lines of one document after the other stay so where keys are equal.
    lines.sort(key=lambda line: line[0])
    keys = np.array([key for key, _ in lines], np.uint64)
    lengths = np.array([len(line) for _, line in lines], np.uint64)
    places = np.uint64(file.tell()) + np.cumsum(lengths) - lengths
    with writing(Path(file.name)):
        file.writelines(line for _, line in lines)
    hashes = np.array([xxhash.xxh3_64_intdigest(line) for _, line in lines], np.uint64)
    return np.stack([keys, places, lengths, hashes], axis=1)


def _read(path: Path, rows: NDArray[np.uint64], into: memoryview) -> None:
    """Read lines that are sorted by place, with one call for those that touch, and hold them
    against their hashes.
    """
    if not len(rows):
        return
    starts, lengths = rows[:, 1].astype(np.int64), rows[:, 2].astype(np.int64)
    gaps = np.flatnonzero(starts[1:] != starts[:-1] + lengths[:-1]) + 1
    with path.open("rb", buffering=0) as file:
        done = 0
        for first, last in zip(
            np.r_[0, gaps].tolist(), np.r_[gaps, len(starts)].tolist(), strict=True
        ):
            size = int(lengths[first:last].sum())
            file.seek(int(starts[first]))
            read = 0
            while read < size:
                count = file.readinto(into[done + read : done + size])
                if not count:
                    raise damaged(path)
                read += count
            done += size
    ends = np.cumsum(lengths)
    for start, end, known in zip(
        (ends - lengths).tolist(), ends.tolist(), rows[:, 3].tolist(), strict=True
    ):
        if xxhash.xxh3_64_intdigest(into[start:end]) != known:
            raise damaged(path)
