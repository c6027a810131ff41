"""A life cycle as a chain of jobs: each starts when the one before it has ended well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from launcher import keys, slurm
from launcher.queue import QueuedJob, refuse_queued, sole_submission, waiting_jobs
from launcher.stages import Stage, is_whole
from launcher.template import SlurmError, SlurmUsageError


@dataclass(frozen=True)
class Link:
    """What became of a stage."""

    stage: str
    state: str
    """submitted, queued (by an earlier call), skipped or, where nothing was asked, planned."""
    job: str
    folder: str


def submit_chain(stages: Sequence[Stage]) -> list[Link]:
    """Submit what is not done, each stage behind the one before it. Nothing is submitted when Slurm
    does not tell what is in the queue, or a job there makes an output from something else.
    """
    refuse_other_outputs(stages)
    with ExitStack() as turns:
        for stage in stages:
            turns.enter_context(sole_submission(stage.script_path.parent))
        queued = waiting_jobs()
        others = [s for s in stages if not is_unchanged(s) and not _job_of(s, queued)]
        refuse_queued({stage.name: stage.script_path.parent for stage in others}, queued)
        return _submit_all(stages, queued)


def _submit_all(stages: Sequence[Stage], queued: Sequence[QueuedJob]) -> list[Link]:
    links: list[Link] = []
    after = ""
    for stage in stages:
        if is_unchanged(stage):
            links.append(Link(stage.name, "skipped", "", str(stage.output)))
            continue
        state, job = "queued", _job_of(stage, queued)
        if not job:
            state, job = "submitted", _submitted(stage, after, links)
        links.append(Link(stage.name, state, job, str(stage.output)))
        after = job
    return links


def planned(stages: Sequence[Stage]) -> list[Link]:
    """What `submit_chain` would do, without asking anybody."""
    return [
        Link(stage.name, "skipped" if is_unchanged(stage) else "planned", "", str(stage.output))
        for stage in stages
    ]


def is_unchanged(stage: Stage) -> bool:
    """Whether the output is whole and made from the same."""
    made = keys.complete_origin(stage.output)
    return made is not None and made.get("key") == stage.origin.key and is_whole(stage)


def refuse_other_outputs(stages: Iterable[Stage]) -> None:
    """SlurmUsageError for outputs that hold something else, all of them at once.

    Scores are written anew; the rest took long to make, and the commands themselves would refuse,
    hours later.
    """
    told = []
    for stage in stages:
        made = keys.complete_origin(stage.output)
        if stage.name == "evaluate" or not stage.output.exists():
            continue
        if made is not None and made.get("key") != stage.origin.key:
            differences = "\n".join(f"    {line}" for line in stage.origin.differences(made))
            told.append(f"  {stage.name}: {stage.output}\n{differences}")
        elif made is None and stage.name == "export" and any(stage.output.iterdir()):
            told.append(f"  export: {stage.output}\n    was not made by a life cycle")
    if told:
        raise SlurmUsageError(
            "these outputs were made from something else:\n"
            + "\n".join(told)
            + "\nname other outputs, or remove the folders (with their .stage) to make them again"
        )


def _submitted(stage: Stage, after: str, links: Sequence[Link]) -> str:
    """Like `_submit`; SlurmError says which stage it was, and what stays in the queue."""
    try:
        return _submit(stage, after)
    except SlurmError as error:
        waiting = ", ".join(f"{link.stage} (job {link.job})" for link in links if link.job)
        stays = f"; in the queue stay {waiting}" if waiting else ""
        raise SlurmError(
            f"[{stage.name}] {error}{stays}; mend the stage and submit the file again: it goes on "
            "from here"
        ) from None


def _submit(stage: Stage, after: str) -> str:
    """Hand a stage to Slurm; its job."""
    keys.write_record(stage.output, stage.origin)
    stage.code.write()
    if stage.name == "prepare":
        # Arrays behind each other, which the script submits by itself.
        job = slurm.run_script(stage.script, stage.script_path)
    else:
        order = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        job = slurm.sbatch(stage.script, stage.script_path, *order)
    _job_file(stage).write_text(f"{job}\n", encoding="utf-8")
    return job


def _job_of(stage: Stage, queued: Sequence[QueuedJob]) -> str:
    """The job that makes a stage already; empty where there is none."""
    with suppress(OSError):
        job = _job_file(stage).read_text(encoding="utf-8").strip()
        if any(job == known.id for known in queued):
            return job
    return ""


def _job_file(stage: Stage) -> Path:
    return stage.record.with_suffix(".job")
