"""Training jobs: from what was asked for to the text of a batch script."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launcher import slurm
from launcher.lead import DEFAULT_SECONDS, Lead
from launcher.queue import refuse_queued, sole_submission, waiting_jobs
from launcher.site import Site, shell_lines
from launcher.snapshot import Snapshot
from launcher.template import SlurmUsageError, filename_pattern, fill, option_name
from train.stop import STOP_FILE

MAX_LEAD_SECONDS = 65_535
"""Of sbatch --signal."""


@dataclass(frozen=True)
class Job:
    """One training job."""

    recipe: str
    """Name of a built-in recipe, or an absolute path."""
    overrides: tuple[str, ...]
    """key=value, as typed."""
    run: Path
    """Run directory on a file system that all nodes share."""
    num_nodes: int
    """As many as the job gets, where they are there when it starts."""
    gpus_per_node: int
    """0 on a cluster without GPUs: one rank per node."""
    time: str
    """Time limit as Slurm writes it: MINUTES, HH:MM:SS or D-HH:MM:SS."""
    options: tuple[str, ...] = ()
    """Further sbatch options, such as --nodelist=n[1-4]."""
    site: Site = field(default_factory=Site)
    lead: Lead = field(default_factory=lambda: Lead(DEFAULT_SECONDS))
    """How long before the limit the job is asked to save."""
    min_nodes: int | None = None
    """As few as it starts with, when others have failed; None: `num_nodes`."""
    kind: Literal["pretrain", "finetune"] = "pretrain"
    folder: Path = field(default_factory=Path.cwd)
    """Where the job runs."""
    python: str = sys.executable
    code: Snapshot | None = None
    """What the job runs from; None: what is installed."""
    copies_code: bool = False
    """Whether every node gets the code on its own disk first."""
    preflight: bool = False
    """Whether the nodes are looked at before each attempt, in pretraining."""
    record: Path | None = None
    """What the script copies when the run is complete (launcher/keys.py)."""


def render(job: Job) -> str:
    """The batch script of a job: the template with its settings filled in."""
    _check(job)
    least = job.min_nodes or job.num_nodes
    directives = {
        "job-name": f"headrace-{job.run.name}",
        "nodes": str(job.num_nodes) if least == job.num_nodes else f"{least}-{job.num_nodes}",
        "gpus-per-node": str(job.gpus_per_node) if job.gpus_per_node else None,
        "time": job.time,
        "signal": f"B:USR1@{job.lead.seconds}",
        "chdir": str(job.folder),
        **job.site.directives,
        "output": filename_pattern(job.run) + "/logs/slurm-%j.out",
    }
    if job.kind == "finetune":
        # That one is written for a single node.
        del directives["nodes"]
    has_container = job.site.container.runtime != "none"
    copied = job.code.recipe_path if job.code else None
    recipe = str(copied or job.recipe)
    lines = [
        f"RUN={shlex.quote(str(job.run))}",
        f"PYTHON={shlex.quote(job.site.container.python if has_container else job.python)}",
        f"CODE={shlex.quote(str(job.code.folder if job.code else ''))}",
        f"COPY_CODE={'yes' if job.copies_code else ''}",
        f"MIN_NODES={least}",
        f"RECORD={shlex.quote(str(job.record or ''))}",
        *shell_lines(job.site, job.folder, job.run, gpus=job.gpus_per_node > 0),
    ]
    if job.kind == "pretrain":
        # What the environment says of it wins, as in a script that is submitted by hand.
        lines.append(f"PREFLIGHT=${{PREFLIGHT:-{int(job.preflight)}}}")
    lines.append(f"set -- {shlex.join([recipe, *job.overrides])}")
    return fill(f"{job.kind}.sbatch", directives, lines, options=job.options)


def submit(job: Job, *datasets: Path) -> str:
    """Write the script into RUN/logs, hand it to sbatch and return the job id.

    SlurmUsageError when one of `datasets` is none, or the run has a STOP file: better here than
    after hours in the queue; and when a job of this run is in the queue already.
    """
    text = render(job)
    if (job.run / STOP_FILE).exists():
        raise SlurmUsageError(
            f"{job.run / STOP_FILE} keeps the run standing, and a job would leave at once; remove "
            "it and submit again"
        )
    if missing := no_datasets(datasets):
        raise SlurmUsageError(
            f"no dataset at {missing[0]} (it has no manifest.json); write data=DATASET, a "
            "directory made by `headrace prepare`, or add --dry-run to print the script"
        )
    logs = job.run / "logs"
    with sole_submission(logs):
        # Whoever names what the job waits for knows of the other one.
        if not {option_name(option) for option in job.options} & {"dependency", "d"}:
            refuse_queued({job.kind: logs}, waiting_jobs())
        if job.code:
            job.code.write()
        return slurm.sbatch(text, logs / f"{job.kind}.sbatch")


def no_datasets(paths: Sequence[Path]) -> list[Path]:
    """Those that are no dataset."""
    return [path for path in paths if not (path / "manifest.json").is_file()]


def check_time(limit: str) -> None:
    """SlurmUsageError for what is no time limit."""
    if not re.fullmatch(r"[0-9]{1,9}(-[0-9]+)?|([0-9]+-)?[0-9]+:[0-9]{2}(:[0-9]{2})?", limit):
        raise SlurmUsageError(
            f"--time {limit!r} is no Slurm time; write MINUTES, HH:MM:SS or D-HH:MM:SS, "
            "such as --time 24:00:00"
        )


def _check(job: Job) -> None:
    check_time(job.time)
    if job.num_nodes < 1 or job.gpus_per_node < 0:
        raise SlurmUsageError(
            f"--nodes {job.num_nodes} --gpus-per-node {job.gpus_per_node}: "
            "a job needs at least one node and no negative number of GPUs"
        )
    if job.min_nodes is not None and not 1 <= job.min_nodes <= job.num_nodes:
        raise SlurmUsageError(
            f"--min-nodes {job.min_nodes} --nodes {job.num_nodes}: the fewest nodes a job may "
            f"start with are 1 to {job.num_nodes}"
        )
    if job.kind == "finetune" and job.num_nodes > 1:
        raise SlurmUsageError(f"nodes = {job.num_nodes}: fine-tuning runs on one node; write 1")
    _check_lead(job.time, job.lead)


def _check_lead(limit: str, lead: Lead) -> None:
    """SlurmUsageError where the request to save leaves less than two thirds of the time."""
    if lead.seconds > MAX_LEAD_SECONDS:
        raise SlurmUsageError(
            f"the job would be asked to save {lead.seconds} s before its limit"
            f"{f' ({lead.reason})' if lead.reason else ''}, and Slurm takes {MAX_LEAD_SECONDS} at "
            "most; write --lead SECONDS"
        )
    seconds = seconds_of(limit)
    # 0 is no limit at all.
    if 0 < seconds < 3 * lead.seconds:
        raise SlurmUsageError(
            f"--time {limit} is {seconds} s: the job is asked to save and stop {lead.seconds} s "
            f"before its limit{f' ({lead.reason})' if lead.reason else ''}, which is more than a "
            "third of it, and the start takes its part, too; write at least --time "
            f"{-(-3 * lead.seconds // 60)}, or --lead SECONDS if a save takes less"
        )


def seconds_of(limit: str) -> int:
    """MINUTES, MINUTES:SECONDS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS in seconds."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = 0, *(*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
