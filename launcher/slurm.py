"""From a recipe to one readable batch script, and from a Slurm step to a rendezvous.

`slurm/pretrain.sbatch` is the template and can be submitted by hand; rendering only replaces its
#SBATCH lines and the block where it reads its arguments, so what runs is what a person can read.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

TEMPLATE = Path(__file__).resolve().parent.parent / "slurm" / "pretrain.sbatch"
SHORT_OPTIONS = {
    "J": "job-name", "N": "nodes", "t": "time", "o": "output", "D": "chdir", "G": "gpus",
    "n": "ntasks",
}  # fmt: skip
"""One-letter sbatch options -> the long ones, as far as the script has a say in them."""
OURS = {
    "nodes": "write --nodes",
    "gpus-per-node": "write --gpus-per-node",
    "gpus": "write --nodes and --gpus-per-node",
    "time": "write --time",
    "job-name": "write --run, whose last part names the job",
    "output": "the logs of a job lie in RUN/logs",
    "chdir": "the job runs where it is submitted",
    "ntasks": "one torchrun per node starts the ranks",
}
"""sbatch options that headrace sets by itself -> what to do instead."""
BEGIN, END = "# filled in by `headrace submit` from here\n", "# to here\n"


STARTING_SECONDS = 60
"""What a job takes at least to start its ranks, load a checkpoint and make a step."""


class SlurmError(ValueError):
    """A job that cannot be rendered or that Slurm refused."""

    exit_code: ClassVar[int] = 1


class SlurmUsageError(SlurmError):
    """A job that nobody can run as it was asked for."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Job:
    """One pretraining job."""

    recipe: str
    """Name of a built-in recipe, or an absolute path."""
    overrides: tuple[str, ...]
    """key=value, as typed."""
    run: Path
    """Run directory on a file system that all nodes share."""
    num_nodes: int
    gpus_per_node: int
    """0 on a cluster without GPUs: one rank per node."""
    time: str
    """Time limit as Slurm writes it: MINUTES, HH:MM:SS or D-HH:MM:SS."""
    options: tuple[str, ...] = ()
    """Further sbatch options, such as --partition=batch."""


def render(job: Job) -> str:
    """The batch script of a job: the template with its settings filled in."""
    _check(job)
    settings = {
        "job-name": f"headrace-{job.run.name}",
        "nodes": str(job.num_nodes),
        "gpus-per-node": str(job.gpus_per_node),
        "time": job.time,
        "output": f"{job.run}/logs/slurm-%j.out",
    }
    script = _template()
    for option, value in settings.items():
        script = _set(script, option, value)
    if job.gpus_per_node == 0:
        script = script.replace("#SBATCH --gpus-per-node=0\n", "")
    lines = [f"#SBATCH --chdir={Path.cwd()}", *(f"#SBATCH {option}" for option in job.options)]
    script = script.replace("#SBATCH --output=", "\n".join(lines) + "\n#SBATCH --output=", 1)
    arguments = shlex.join([job.recipe, *job.overrides])
    values = (
        f"RUN={shlex.quote(str(job.run))}\n"
        f"PYTHON={shlex.quote(sys.executable)}\n"
        f"set -- {arguments}\n"
    )
    head, rest = script.split(BEGIN)
    return head + BEGIN + values + END + rest.split(END, 1)[1]


def submit(job: Job, *datasets: Path) -> str:
    """Write the script into RUN/logs, hand it to sbatch and return the job id.

    SlurmUsageError when one of `datasets` is none: better here than after hours in the queue.
    """
    _check(job)
    missing = [path for path in datasets if not (path / "manifest.json").is_file()]
    if missing:
        raise SlurmUsageError(
            f"no dataset at {missing[0]} (it has no manifest.json); write data=DATASET, a "
            "directory made by `headrace prepare`, or add --dry-run to print the script"
        )
    script = job.run / "logs" / "pretrain.sbatch"
    text = render(job)
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(text, encoding="utf-8")
    return _call(["sbatch", "--parsable", str(script)]).split(";")[0]


def rendezvous(environ: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of an srun step, where the batch script has not set them.

    The first host of the allocation, and a port that follows from the job id, so that two jobs on
    one node differ.
    """
    found = {}
    if "MASTER_ADDR" not in environ:
        hosts = _call(["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]]).split()
        if not hosts:
            raise SlurmError(
                f"scontrol names no host for {environ['SLURM_JOB_NODELIST']}; "
                "export MASTER_ADDR before srun"
            )
        found["MASTER_ADDR"] = hosts[0]
    if "MASTER_PORT" not in environ:
        # Below 32768, where the kernel takes ports for outgoing connections.
        found["MASTER_PORT"] = str(20000 + int(environ["SLURM_JOB_ID"]) % 10000)
    return found


def hosts_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The hosts of the step that this process is in, or of the allocation; none where there is
    none, or nobody to ask.
    """
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not listed:
        return ()
    try:
        return tuple(_call(["scontrol", "show", "hostnames", listed]).split())
    except SlurmError:
        return ()


def _check(job: Job) -> None:
    if not re.fullmatch(r"\d+|(\d+-)?\d+:\d\d(:\d\d)?", job.time):
        raise SlurmUsageError(
            f"--time {job.time!r} is no Slurm time; write MINUTES, HH:MM:SS or D-HH:MM:SS, "
            "such as --time 24:00:00"
        )
    if job.num_nodes < 1 or job.gpus_per_node < 0:
        raise SlurmUsageError(
            f"--nodes {job.num_nodes} --gpus-per-node {job.gpus_per_node}: "
            "a job needs at least one node and no negative number of GPUs"
        )
    for option in job.options:
        if not option.startswith("-") or "\n" in option:
            raise SlurmUsageError(
                f"--sbatch {option!r} is no sbatch option; write it with its dashes, "
                "such as --sbatch=--partition=batch"
            )
        name = _name(option)
        if name in OURS or name in _set_by_template():
            raise SlurmUsageError(
                f"--sbatch={option}: the script sets --{name} itself; leave it out"
                + (f": {OURS[name]}" if name in OURS else f", or edit {TEMPLATE}")
            )
    _check_time(job.time)


def _check_time(limit: str) -> None:
    """SlurmUsageError where the signal before the limit comes as soon as the job starts."""
    signal = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", _template(), re.MULTILINE)
    assert signal is not None, "the template asks for a signal before the limit"
    seconds, notice = _seconds(limit), int(signal[1])
    # 0 is no limit at all.
    if 0 < seconds <= notice + STARTING_SECONDS:
        least = -(-(notice + STARTING_SECONDS) // 60) + 1
        raise SlurmUsageError(
            f"--time {limit} is {seconds} s: the job is asked to save and stop {notice} s before "
            f"its limit and needs about {STARTING_SECONDS} s to start, which leaves no time to "
            f"train; write at least --time {least}"
        )


def _seconds(limit: str) -> int:
    """MINUTES, MINUTES:SECONDS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS in seconds."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = 0, *(*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _name(option: str) -> str:
    """The long name of an sbatch option as it was written: --nodes=5, --nodes 5, -N5, -N 5."""
    if option.startswith("--"):
        return re.split(r"[=\s]", option[2:], maxsplit=1)[0]
    return SHORT_OPTIONS.get(option[1:2], option[1:2])


def _set_by_template() -> set[str]:
    return set(re.findall(r"^#SBATCH --([a-z-]+)", _template(), re.MULTILINE))


def _template() -> str:
    try:
        return TEMPLATE.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SlurmError(
            f"no template at {TEMPLATE}; headrace runs from its clone: "
            "install it there with `pip install -e .`"
        ) from None


def _set(script: str, option: str, value: str) -> str:
    pattern = re.compile(rf"^#SBATCH --{option}=.*$", re.MULTILINE)
    assert len(pattern.findall(script)) == 1, f"the template sets --{option} once"
    return pattern.sub(lambda _: f"#SBATCH --{option}={value}", script)


def _call(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} not found: Slurm is not installed here; run this on a login node, "
            "or add --dry-run to print the script"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SlurmError(
            f"`{shlex.join(command)}` left with {error.returncode}: {error.stderr.strip()}"
        ) from None
    return done.stdout.strip()
