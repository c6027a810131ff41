"""Raw text to a dataset: read, clean, shuffle, survey, train the tokenizer, encode, commit.

Every stage is a table of jobs over files. `prepare` does all of them with its own workers,
`prepare_task` a share of one, and both leave the same bytes: these depend on the input, the
configuration and the tokenizer alone, never on workers, tasks or how often the work was
interrupted. After a kill the same call continues with the jobs that are not done. Memory: the
sample for the tokenizer (twice), a few parts per worker, about 6 times the longest document, and
300 bytes for each file and each part of the input.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.claim import LOCK, WORK, holding, read_claim
from data.commit import KIND, CommitJob, check_same, refuse, tokenize
from data.config import DataError, DataUsageError, PrepareConfig
from data.drafts import remove_drafts
from data.jobs import WHOLE, Stage, Task, check_complete, files_of, here, run_stage
from data.manifest import MANIFEST, Manifest, read_manifest
from data.pool import Pool, Progress, WorkerDied
from data.readers import InputFile, find_files
from data.request import Request
from data.selection import Selection
from data.shard_jobs import write_shards
from data.stamps import InputChanged
from data.survey import first_rule
from data.work import Work, load_plan, make_plan, remove_work

PLAN = "plan"
_ALONE = (PLAN, "tokenizer", "commit")
"""Stages of one task, during which nobody else may work."""


@dataclass(frozen=True)
class Summary:
    """What `prepare` left in `output`."""

    output: Path
    manifest: Manifest
    was_complete: bool
    """The same command had finished before; nothing was written."""
    warnings: tuple[str, ...]


def prepare(
    inputs: Sequence[str],
    output: Path,
    config: PrepareConfig,
    *,
    workers: int,
    tokenizer: Path | None = None,
    decontaminate: Sequence[Path] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Summary:
    """Write the dataset `output` from the files, folders and patterns in `inputs`.

    `tokenizer` is a sentencepiece model or a tokenizer.json; without it one is trained on the part
    of the text that is not held out. Documents that overlap with the files in `decontaminate` are
    dropped. `progress` hears of the stages where there is something to do. Raises DataUsageError
    for a request that cannot be met and for an `output` that another command began, DataError for
    text that cannot be read.
    """
    request = Request.of(inputs, output, config, tokenizer, decontaminate)
    # Refused before it is made, and read again when nobody else can write there.
    read_claim(output, KIND)
    with holding(output):
        is_begun = read_claim(output, KIND) is not None
        if is_begun and (output / MANIFEST).is_file():
            return _complete(request, workers, progress)
        # Before anything is fetched or written.
        request.cleaner.check()
        _make(request, workers, progress, is_begun=is_begun)
    return finished(output)


def _make(request: Request, workers: int, progress: Progress, *, is_begun: bool) -> None:
    """All stages. What took long is kept for other settings; else a refusal leaves nothing."""
    output, config = request.output, request.config
    files, left_out = _find(request)
    with _pool(workers, files, config) as pool:
        try:
            plan = make_plan(request, files, left_out, output / WORK)
            _prepare(Work(request, output / WORK, plan), pool, progress)
        except DataError as error:
            is_precious = request.cleaner.is_on or config.shuffle or isinstance(error, WorkerDied)
            if not (is_begun or is_precious or (output / LOCK).exists()):
                remove_work(output)
            raise


def _run(
    stage: Stage[Work], work: Work, pool: Pool, progress: Progress, task: Task = WHOLE
) -> None:
    """Do a task of a stage. DataError when the input is no longer what was planned; nothing is
    left of what was read of it since.
    """
    try:
        jobs = stage.jobs(work)[task.number :: task.count]
        sources = {file for job in jobs for file in job.sources()}
        if stage.name == "tokenizer":
            # Small input is surveyed again there.
            sources = files_of(work.text.parts)
        # Before hours of work; whoever reads a file looks closer.
        for file in sources:
            if file.stamp is not None:
                file.stamp.check_written(file.path)
        run_stage(stage, work, pool, progress, task)
    except InputChanged as error:
        raise DataError(
            f"{error}, so what is written may hold old and new text; remove "
            f"{work.request.output} and run the command again"
        ) from error


def _prepare(work: Work, pool: Pool, progress: Progress) -> None:
    output = work.request.output
    for stage in stages_of(work.request):
        _run(stage, work, pool, progress)
        claim = read_claim(output, KIND) if stage.name == "read" else None
        if claim is not None:
            check_same(output, claim, work)
    remove_work(output)


@dataclass(frozen=True)
class TaskSummary:
    """What a task of a stage has left."""

    stage: str
    task: Task
    num_jobs: int
    """Its jobs, all of them done now; none where the stage has fewer jobs than tasks."""
    is_complete: bool
    """The dataset is finished."""


def finished(output: Path, *, was_complete: bool = False) -> Summary:
    """What a dataset that is complete says of its preparation."""
    manifest = read_manifest(output)
    return Summary(output, manifest, was_complete, tuple(manifest.preparation.get("warnings", ())))


def prepare_task(
    inputs: Sequence[str],
    output: Path,
    config: PrepareConfig,
    *,
    stage: str,
    task: Task = WHOLE,
    workers: int,
    tokenizer: Path | None = None,
    decontaminate: Sequence[Path] = (),
    progress: Progress = lambda stage, done, total: None,
    command: Callable[[str, str], str] = "headrace prepare ... --stage {} --task {}".format,
) -> TaskSummary:
    """Do one share of one stage of what `prepare` does with the same arguments.

    All but PLAN read only the files of their own jobs. Raises what `prepare` raises, and
    DataUsageError, with the call that is missing as `command` writes it, when a stage before is not
    complete.
    """
    if stage not in STAGES:
        raise DataUsageError(f"--stage {stage}: there is no such stage; one of {', '.join(STAGES)}")
    request = Request.of(inputs, output, config, tokenizer, decontaminate)
    claim = read_claim(output, KIND)
    if claim is not None:
        refuse(output, request.differences(claim))
        if (output / MANIFEST).is_file():
            remove_work(output)
            return TaskSummary(stage, task, 0, True)
    if stage == PLAN:
        request.cleaner.check()
        with holding(output):
            make_plan(request, *_find(request), output / WORK)
        return TaskSummary(stage, task, 1, False)
    work = Work(request, output / WORK, load_plan(request, output / WORK, command(PLAN, "0/1")))
    before, chosen = _chosen(request, stage)
    if chosen is None:
        return TaskSummary(stage, task, 0, False)
    shared = stage not in _ALONE
    with holding(output, shared=shared), _pool(workers, work.files, config) as pool:
        check_complete(before, work, task, command)
        if claim is not None and before:
            check_same(output, claim, work)
        _run(chosen, work, pool, progress, task)
    num_jobs = len(chosen.jobs(work)[task.number :: task.count])
    is_complete = (output / MANIFEST).is_file()
    if is_complete:
        remove_work(output)
    return TaskSummary(stage, task, num_jobs, is_complete)


def stages_of(request: Request) -> list[Stage[Work]]:
    """What there is to do, in order."""
    return [stage for stage, is_on in _STAGES if is_on(request)]


def _always(request: Request) -> bool:
    return True


def _cleans(request: Request) -> bool:
    return request.cleaner.is_on


def _dedups(request: Request) -> bool:
    return request.config.clean.dedup != "off"


def _shuffles(request: Request) -> bool:
    return request.config.shuffle


_STAGES: tuple[tuple[Stage[Work], Callable[[Request], bool]], ...] = (
    (Stage("read", lambda work: work.read_jobs), _always),
    (Stage("clean", lambda work: work.clean_jobs), _cleans),
    (Stage("dedup", lambda work: work.range_jobs), _dedups),
    (Stage("drop", lambda work: [work.drop_job], here), _cleans),
    (Stage("scatter", lambda work: work.scatter_jobs), _shuffles),
    (Stage("shuffle", lambda work: work.bucket_jobs), _shuffles),
    (Stage("survey", lambda work: work.survey_jobs(first_rule(work.request.config))), _always),
    (Stage("tokenizer", lambda work: [work.tokenizer_job], tokenize), _always),
    (
        Stage(
            "encode",
            lambda work: work.shard_jobs,
            lambda _, jobs, pool, report: write_shards(jobs, pool, report),
        ),
        _always,
    ),
    (
        Stage("commit", lambda work: [CommitJob(work.folder / "commit", 0, 1, work)], here),
        _always,
    ),
)
STAGES = (PLAN, *(stage.name for stage, _ in _STAGES))
"""Every stage by name, in order; those of cleaning and shuffling do nothing where they are off."""


def _chosen(request: Request, name: str) -> tuple[list[Stage[Work]], Stage[Work] | None]:
    """The stages before one, and itself; None where it is off."""
    stages = stages_of(request)
    names = [stage.name for stage in stages]
    if name not in names:
        return [], None
    return stages[: names.index(name)], stages[names.index(name)]


def _find(request: Request) -> tuple[list[InputFile], dict[str, Any]]:
    """The input, and what of it is not read. What comes from elsewhere is kept beside the output,
    which has to be held.
    """
    output = request.output
    # `.` and `..` have a name only by where they are.
    place = output if output.name not in ("", "..") else output.resolve()
    keep = place.with_name(f"{place.name}.inputs")
    remove_drafts(keep)
    selection = Selection(request.config.exclude)
    files = find_files(request.inputs, keep, selection=selection)
    for named in request.inputs:
        if Path(named).is_dir() and output.resolve().is_relative_to(Path(named).resolve()):
            raise DataUsageError(
                f"the output {output} lies inside the input {named}, whose files are all read; "
                "name an output outside of it"
            )
    return files, selection.to_json()


def _pool(workers: int, files: Sequence[InputFile], config: PrepareConfig) -> Pool:
    """No more workers than there can be work for."""
    num_parts = sum(-(-file.num_bytes // config.part_bytes) for file in files)
    return Pool(min(workers, max(1, num_parts)))


def _complete(request: Request, workers: int, progress: Progress) -> Summary:
    """A dataset that is finished, if it is of the same command: its input is hashed once more."""
    output = request.output
    files, left_out = _find(request)
    claim = read_claim(output, KIND)
    assert claim is not None
    with (
        tempfile.TemporaryDirectory(prefix="headrace-") as folder,
        _pool(workers, files, request.config) as pool,
    ):
        work = Work(request, Path(folder), make_plan(request, files, left_out, Path(folder)))
        run_stage(stages_of(request)[0], work, pool, progress)
        check_same(output, claim, work)
    # Left by a kill after the manifest was written.
    remove_work(output)
    return finished(output, was_complete=True)
