"""The input as it is planned and recognised: files with stamps, then content hashes and parts.

The plan names every file with its size and times, so no task looks for files again. Reading hashes
their content, by which a later call knows the input wherever it lies, and finds where long packed
files can be cut. Parts follow from that alone. Memory: about 300 bytes for each file, and as many
for each part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data import ranges
from data.config import PrepareConfig
from data.durable import read_sealed, write_sealed
from data.jobs import MAX_JOBS, Job
from data.ranges import cut_long, find_ranges, long_files
from data.readers import InputFile, Part, Reading, cut_parts, reading_of
from data.stamps import digest, unchanged

_MAX_FILES = 2**12
"""In a job: to open a file costs, too."""


@dataclass(frozen=True)
class Intake:
    """The input after it was read."""

    files: list[InputFile]
    digests: list[dict[str, Any]]
    """Name, size and content hash of every file."""
    parts: list[Part]


def file_to_json(file: InputFile) -> dict[str, Any]:
    """Plain values, without the stamp."""
    values = {"name": file.name, "num_bytes": file.num_bytes, "is_named": file.is_named}
    return {**values, "path": str(file.path)}


def file_from_json(value: Mapping[str, Any]) -> InputFile:
    """What `file_to_json` gave."""
    return InputFile(**{**value, "path": Path(value["path"])})


@dataclass(frozen=True)
class ReadJob(Job):
    """Files to hash; of those that are long, the documents at which they can be cut."""

    files: tuple[InputFile, ...]
    long: frozenset[InputFile]
    reading: Reading
    range_bytes: int

    def sources(self) -> set[InputFile]:
        """All that it hashes."""
        return set(self.files)

    def run(self) -> None:
        found = []
        for file in self.files:
            with unchanged(file.path, file.stamp) as moment:
                assert moment is not None, "what is planned has a stamp"
                found.append([digest(file.path), moment[2], self._ranges(file)])
        write_sealed(self.result, {"files": found})

    def _ranges(self, file: InputFile) -> list[int]:
        if file not in self.long:
            return []
        return find_ranges(file, reading=self.reading, range_bytes=self.range_bytes)


def read_jobs(folder: Path, files: Sequence[InputFile], config: PrepareConfig) -> list[ReadJob]:
    """Consecutive files together, so that small ones do not make a job each."""
    long = long_files(cut_parts(files, config.part_bytes))
    reading = reading_of(config)
    at_least = max(config.part_bytes, sum(file.num_bytes for file in files) // MAX_JOBS)
    jobs: list[ReadJob] = []
    for group in _groups(files, at_least):
        size = sum(file.num_bytes for file in group)
        of_group = frozenset(file for file in group if file in long)
        job = ReadJob(folder, len(jobs), size, group, of_group, reading, ranges.RANGE_BYTES)
        jobs.append(job)
    return jobs


def intake(jobs: Sequence[ReadJob], config: PrepareConfig) -> Intake:
    """What the jobs have found, put together."""
    files: list[InputFile] = []
    digests: list[dict[str, Any]] = []
    starts: dict[InputFile, list[int]] = {}
    for job in jobs:
        found = read_sealed(job.result)["files"]
        for planned, (xxh3, ctime_ns, cuts) in zip(job.files, found, strict=True):
            assert planned.stamp is not None, "what is planned has a stamp"
            file = replace(planned, stamp=replace(planned.stamp, ctime_ns=ctime_ns, xxh3=xxh3))
            files.append(file)
            digests.append({"name": file.name, "bytes": file.num_bytes, "xxh3": xxh3})
            if file in job.long:
                starts[file] = cuts
    return Intake(files, digests, cut_long(cut_parts(files, config.part_bytes), starts))


def _groups(files: Sequence[InputFile], at_least: int) -> Iterator[tuple[InputFile, ...]]:
    group: list[InputFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.num_bytes
        if size >= at_least or len(group) >= _MAX_FILES:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)
