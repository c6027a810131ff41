"""Shards as jobs: consecutive parts of a side, so that their bytes depend on the input alone.

Workers encode, one process writes. A shard is done when its entry is told and its index is there;
what an interrupted call has left is taken over when this work vouches for it. Memory: a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data.cleaning import parts_per_job
from data.config import DataError, PrepareConfig
from data.documents import InputFile
from data.durable import file_sha256, read_sealed, write_sealed
from data.encode import Encoded, EncodeJob, encode_part
from data.jobs import Job, alone, files_of
from data.manifest import Dtype, ShardEntry
from data.pool import Pool
from data.readers import Part
from data.rounds import Found, SurveyParts, Text
from data.shard_index import index_path
from data.shards import finished_shard, write_shard
from data.split import SIDES, Run, Side, SplitRule

SOURCE = "main"

Place = tuple[int, int]
"""A group of a part: number of the part among all, number of the group in it."""


@dataclass(frozen=True)
class Encoding:
    """What all shards have in common."""

    text: Text
    surveyed: Sequence[SurveyParts]
    config: PrepareConfig
    rule: SplitRule
    tokenizer: Path
    tokenizer_sha256: str
    dtype: Dtype

    def found(self, first: int = 0) -> Iterator[tuple[int, Part, Found]]:
        """What the survey has found of every part from `first` on."""
        step = parts_per_job(len(self.text.parts))
        for job in self.surveyed[first // step :]:
            for number, found in enumerate(job.found(), job.first):
                if number >= first:
                    yield number, self.text.parts[number], found


@dataclass(frozen=True)
class ShardJob(Job):
    """A shard: the groups of one side from one place to another, and how much they hold."""

    path: Path
    side: Side
    first: Place
    last: Place
    num_groups: int
    num_documents: int
    encoding: Encoding

    def is_done(self) -> bool:
        """Whether the shard is there as well as the result, which holds its entry. Its index is
        written last and removed first, so it stands for the shard.
        """
        if not self.result.exists():
            return False
        entry = self.entry()
        with suppress(OSError):
            is_whole = self.path.stat().st_size == entry.bytes
            return is_whole and file_sha256(index_path(self.path)) == entry.idx_sha256
        return False

    def entry(self) -> ShardEntry:
        """What the manifest says of the finished shard."""
        return ShardEntry(**read_sealed(self.result)["entry"])

    def num_unknown(self) -> int:
        """Ids of the finished shard that stand for what the tokenizer does not know."""
        return int(read_sealed(self.result)["unknown"])

    def sources(self) -> set[InputFile]:
        """Those of its parts."""
        return files_of(self.encoding.text.parts[self.first[0] : self.last[0] + 1])

    def run(self) -> None:
        """Write the shard in this process."""
        self.write(map(encode_part, self.groups()), lambda _: None)

    def groups(self) -> Iterator[EncodeJob]:
        """What is encoded, in order."""
        encoding = self.encoding
        for number, part, found in encoding.found(self.first[0]):
            if number > self.last[0]:
                return
            for place, (runs, _, _) in enumerate(
                _groups(found, self.side, encoding.config.part_bytes)
            ):
                if self.first <= (number, place) <= self.last:
                    yield EncodeJob(
                        part,
                        number,
                        self.side,
                        runs,
                        encoding.text.reading,
                        encoding.rule,
                        encoding.tokenizer,
                        encoding.tokenizer_sha256,
                        encoding.config.bos,
                        encoding.text.cleaned,
                    )

    def take_over(self) -> bool:
        """Whether an interrupted call has finished the shard, with these settings and this input,
        and only not told of it.
        """
        if not (self._draft.exists() and self.path.exists()):
            return False
        draft = read_sealed(self._draft)
        entry = finished_shard(self.path)
        if entry is None or (entry.sha256, entry.documents) != (
            draft["tar_sha256"],
            self.num_documents,
        ):
            return False
        write_sealed(self.result, {"entry": asdict(entry), "unknown": draft["unknown"]})
        return True

    @property
    def _draft(self) -> Path:
        """What says, in the folder of all that the bytes depend on, that a shard is of this job."""
        return self.result.with_suffix(".draft.json")

    def write(self, encoded: Iterator[Encoded], report: Callable[[int], None]) -> None:
        """Write what was encoded of all groups."""

        num_unknown = 0

        def documents() -> Iterator[Any]:
            nonlocal num_unknown
            for group in encoded:
                num_unknown += group.num_unknown
                yield from group.named() if self.encoding.config.id_field else group.documents()
                report(group.text_bytes)

        def vouch(tar_sha256: str) -> None:
            write_sealed(self._draft, {"tar_sha256": tar_sha256, "unknown": num_unknown})

        entry = write_shard(self.path, documents(), self.encoding.dtype, vouch)
        if entry.documents != self.num_documents:
            raise DataError(
                f"{self.path} got {entry.documents} documents where the survey counted "
                f"{self.num_documents}: the input changed in between; remove "
                f"{self.path.parents[2]} and run the command again"
            )
        write_sealed(self.result, {"entry": asdict(entry), "unknown": num_unknown})


def shard_jobs(folder: Path, dataset: Path, encoding: Encoding) -> list[ShardJob]:
    """Every shard, training side first: consecutive groups of a side until they hold
    `shard_bytes` of text.
    """
    shards: dict[Side, list[ShardJob]] = {side: [] for side in SIDES}
    config = encoding.config
    for number, _, found in encoding.found():
        for side, of_side in shards.items():
            groups = enumerate(_groups(found, side, config.part_bytes))
            for place, (_, num_documents, num_bytes) in groups:
                at = (number, place)
                if not of_side or of_side[-1].num_bytes >= config.shard_bytes:
                    path = dataset / side / SOURCE / f"shard-{len(of_side):06d}.tar"
                    of_side.append(ShardJob(folder, 0, 0, path, side, at, at, 0, 0, encoding))
                shard = of_side[-1]
                of_side[-1] = replace(
                    shard,
                    last=at,
                    num_groups=shard.num_groups + 1,
                    num_documents=shard.num_documents + num_documents,
                    num_bytes=shard.num_bytes + num_bytes,
                )
    ordered = [shard for side in SIDES for shard in shards[side]]
    return [replace(shard, number=number) for number, shard in enumerate(ordered)]


def write_shards(jobs: Sequence[ShardJob], pool: Pool, report: Callable[[int], None]) -> None:
    """Write shards that are not done: workers encode, this process writes."""
    todo = []
    for job in jobs:
        with alone(job):
            if job.is_done() or job.take_over():
                report(job.num_bytes)
            else:
                todo.append(job)
    # One stream over all shards: workers encode the next shard while this one is finished.
    stream = pool.map(encode_part, chain.from_iterable(job.groups() for job in todo))
    for job in todo:
        encoded = islice(stream, job.num_groups)
        with alone(job):
            # Another process may have written it since.
            if job.is_done():
                for group in encoded:
                    report(group.text_bytes)
            else:
                job.write(encoded, report)


def _groups(
    found: Found, side: Side, part_bytes: int
) -> Iterator[tuple[tuple[Run, ...], int, int]]:
    """(runs, documents, bytes) of each job of a part on one side; a long text makes several."""
    if not found.runs:
        if found.documents[side]:
            yield (), found.documents[side], found.text_bytes[side]
        return
    group: list[Run] = []
    size = 0
    for run in found.runs:
        if run.side != side:
            continue
        group.append(run)
        size += run.stop - run.start
        if size >= part_bytes:
            yield tuple(group), len(group), size
            group, size = [], 0
    if group:
        yield tuple(group), len(group), size
