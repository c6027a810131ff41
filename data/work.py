"""Every stage's jobs, as they follow from what is asked for and from the stages before.

Results lie in OUTPUT/headrace.work, each stage's in a folder named by a hash of all that they
depend on: other settings or other input have other folders, so nothing stale is ever read, and what
a change does not concern is not done again. All of them carry hashes, and documents are counted
from stage to stage. Memory: about 300 bytes for each file and each part of the input.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data import cleaning, ranges, shuffle, vocabulary
from data.claim import WORK, another_command, shown
from data.cleaning import Cleaned, CleanJob, DropJob
from data.config import DataUsageError
from data.dedup import RangeJob, range_jobs
from data.durable import file_sha256, read_sealed, write_sealed, writing
from data.intake import (
    Intake,
    ReadJob,
    file_from_json,
    file_to_json,
    intake,
    read_jobs,
)
from data.jobs import MAX_JOBS, Job, key_of
from data.manifest import dtype_for
from data.readers import InputFile, cut_parts, reading_of
from data.request import Request
from data.rounds import SurveyParts, Text, check_count, rule_from_json, survey_jobs
from data.shard_jobs import Encoding, ShardJob, shard_jobs
from data.shuffle import BucketJob, ScatterJob
from data.split import SplitRule
from data.stamps import Stamp
from data.survey import Survey
from data.tokenizer import load_tokenizer, tokenizer_file

FORMAT = 3
"""Of the results; other code that writes others has another number."""
PLAN = "plan.json"


class Work:
    """The jobs of all stages; a stage may be asked for its own when those before it are done."""

    def __init__(self, request: Request, folder: Path, plan: Mapping[str, Any]) -> None:
        self.request = request
        self.folder = folder
        self.left_out: dict[str, Any] = plan.get("left_out", {})
        """Files that were found and are not read: Selection.to_json."""
        self.files = [
            replace(file_from_json(value), stamp=Stamp(*stamp))
            for value, stamp in zip(plan["files"], plan["stamps"], strict=True)
        ]

    @cached_property
    def read_jobs(self) -> list[ReadJob]:
        """Files to hash."""
        config = self.request.config
        files = [file_to_json(file) for file in self.files]
        reading = [config.text_field, config.on_bad_text, config.part_bytes]
        folder = self._folder("read", files, _stamps_of(self.files), reading)
        return read_jobs(folder, self.files, config)

    @cached_property
    def intake(self) -> Intake:
        """The input after it was read."""
        return intake(self.read_jobs, self.request.config)

    @cached_property
    def command(self) -> dict[str, Any]:
        """The request and the content of its input: what the bytes of the dataset depend on."""
        return {**self.request.content, "inputs": self.intake.digests}

    @cached_property
    def clean_jobs(self) -> list[CleanJob]:
        """Parts to clean."""
        config, cleaner = self.request.config, self.request.cleaner
        folder = self._folder("clean", self._cleaning_depends_on)
        return cleaning.clean_jobs(folder, self.intake.parts, config, cleaner)

    @cached_property
    def range_jobs(self) -> list[RangeJob]:
        """Ranges of keys to find duplicates in."""
        kind = self.request.config.clean.dedup
        assert kind != "off"
        folder = self._folder("dedup", self._cleaning_depends_on)
        signed = self.clean_jobs[0].folder
        return range_jobs(folder, signed, kind, cleaning.num_kept(self.clean_jobs))

    @cached_property
    def drop_job(self) -> DropJob:
        """The end of cleaning."""
        searches = self.request.config.clean.dedup != "off"
        links = tuple(job.result for job in self.range_jobs) if searches else ()
        folder = self._folder("drop", self._cleaning_depends_on)
        return DropJob(folder, 0, 1, tuple(self.clean_jobs), links)

    @cached_property
    def cleaning(self) -> dict[str, Any] | None:
        """The account of cleaning."""
        return read_sealed(self.drop_job.result) if self.request.cleaner.is_on else None

    @cached_property
    def scatter_jobs(self) -> list[ScatterJob]:
        """Parts to scatter to buckets."""
        seed, id_field = self.request.config.seed, self.request.config.id_field
        folder = self._folder("scatter", self._cleaning_depends_on, seed, id_field)
        text = self._cleaned_text
        return shuffle.scatter_jobs(
            folder, self.files, text.parts, text.reading, text.cleaned, seed
        )

    @cached_property
    def bucket_jobs(self) -> list[BucketJob]:
        """Buckets to put in order."""
        config = self.request.config
        folder = self._folder("shuffle", self._cleaning_depends_on, config.seed, config.id_field)
        return shuffle.bucket_jobs(folder, self.scatter_jobs)

    @cached_property
    def text(self) -> Text:
        """What is to be stored."""
        text = self._cleaned_text
        if not self.request.config.shuffle:
            return text
        files = shuffle.shuffled_files(self.bucket_jobs)
        parts = cut_parts(files, self.request.config.part_bytes)
        skipped = shuffle.skipped_by(self.scatter_jobs)
        found = shuffle.num_scattered(self.scatter_jobs)
        check_count(text.num_documents, found, "scattered to buckets", self.scatter_jobs[0].folder)
        reading = shuffle.buckets_reading(text.reading)
        return Text(parts, reading, None, text.num_bytes, skipped, found)

    def survey_jobs(self, rule: SplitRule) -> list[SurveyParts]:
        """Parts to survey under a rule for the split."""
        return survey_jobs(self.folder, self.text, rule, self.sample_bytes, self._key)

    @property
    def sample_bytes(self) -> int:
        """Text that is looked at for the tokenizer."""
        if self.request.tokenizer:
            return vocabulary.CHECKED_BYTES
        return self.request.config.tokenizer_bytes

    @cached_property
    def tokenizer_job(self) -> Job:
        """The end of what is done before anything is stored."""
        return Job(self._folder("tokenizer", self._key), 0, 1)

    @cached_property
    def settled(self) -> dict[str, Any]:
        """What the tokenizer's stage has left."""
        return read_sealed(self.tokenizer_job.result)

    @cached_property
    def rule(self) -> SplitRule:
        """The rule for the split."""
        return rule_from_json(self.settled["rule"])

    @cached_property
    def total(self) -> Survey:
        """The survey of the whole input, without its sample."""
        return Survey.from_json(self.settled["total"])

    @cached_property
    def shard_jobs(self) -> list[ShardJob]:
        """Shards to write."""
        output = self.request.output
        file = tokenizer_file(output)
        sha256 = file_sha256(file)
        encoding = Encoding(
            self.text,
            self.survey_jobs(self.rule),
            self.request.config,
            self.rule,
            file,
            sha256,
            dtype_for(load_tokenizer(file).vocab_size),
        )
        return shard_jobs(self._folder("encode", self._key, sha256), output, encoding)

    def check_unchanged(self) -> None:
        """InputChanged when the content of a file of the input may be another one than was read."""
        for file in self.intake.files:
            assert file.stamp is not None, "what was read has a stamp"
            file.stamp.confirm(file.path)

    @cached_property
    def _cleaned_text(self) -> Text:
        parts, config = self.intake.parts, self.request.config
        num_bytes = sum(file.num_bytes for file in self.files)
        cleaned = num_documents = None
        if self.cleaning is not None:
            num_documents = self.cleaning["kept_documents"]
            num_bytes = self.cleaning["kept_bytes"]
            source = self.clean_jobs[0] if config.clean.dedup == "off" else self.drop_job
            step = cleaning.parts_per_job(len(parts))
            cleaned = Cleaned(self.request.cleaner, source.folder, step)
        return Text(parts, reading_of(config), cleaned, num_bytes, num_documents=num_documents)

    @cached_property
    def _cleaning_depends_on(self) -> dict[str, Any]:
        found = cleaning.depends_on(self.request.cleaner, self.request.config, self.intake.digests)
        # Results of a moment at which the text was another one are none of the text that came back.
        return {**found, "written": self._written}

    @cached_property
    def _key(self) -> str:
        # The survey names places by file, so it is of files where they lie, too.
        paths = [str(self.folder), *(str(file.path) for file in self.files)]
        return key_of(_limits(), self.command, paths, self._written)

    @property
    def _written(self) -> list[list[int]]:
        """Size and time of writing of every file."""
        return [stamp[:2] for stamp in _stamps_of(self.files)]

    def _folder(self, stage: str, *depends_on: Any) -> Path:
        return self.folder / f"{stage}-{key_of(_limits(), *depends_on)}"


def _stamps_of(files: Iterable[InputFile]) -> list[list[int]]:
    """Size, time of writing and time of change of files that were found."""
    stamps = [file.stamp for file in files]
    return [[s.num_bytes, s.mtime_ns, s.ctime_ns] for s in stamps if isinstance(s, Stamp)]


def _limits() -> list[int]:
    """What of this code decides how the input is cut into jobs."""
    return [FORMAT, MAX_JOBS, ranges.LONG_BYTES, ranges.RANGE_BYTES, shuffle.BUCKET_BYTES]


def make_plan(
    request: Request, files: Sequence[InputFile], left_out: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Name every file for the stages that follow, and count those that they do not read; what was
    planned before stays as it is.
    """
    plan = {
        "request": {**request.content, "inputs": list(request.inputs)},
        "files": [file_to_json(file) for file in files],
        "stamps": _stamps_of(files),
        "left_out": dict(left_out),
    }
    path = folder / PLAN
    if not (path.exists() and {**plan, "sha256": ""} == {**read_sealed(path), "sha256": ""}):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_sealed(path, plan)
    return plan


def load_plan(request: Request, folder: Path, command: str) -> dict[str, Any]:
    """The plan that this request has made. Raises DataUsageError, with the command that makes it,
    when there is none.
    """
    if not (folder / PLAN).exists():
        raise DataUsageError(f"stage plan is not complete; run: {command}")
    plan = read_sealed(folder / PLAN)
    then = plan["request"]
    found = request.differences(then)
    if then["inputs"] != list(request.inputs):
        found.append(f"--input: was {shown(then['inputs'])}, is {shown(request.inputs)}")
    if found:
        advice = f"give the same input and settings to every task, or plan anew: {command}"
        raise another_command(f"{request.output} was planned", found, advice)
    return plan


def remove_work(output: Path) -> None:
    """Remove the results of all jobs from a dataset that no longer needs them."""
    shutil.rmtree(output / WORK, ignore_errors=True)
