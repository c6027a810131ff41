"""What is asked of Slurm: to take a job, to say when it could start, and who its hosts are."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.durable import write_durably, writing
from launcher.template import SlurmError

HOSTS_SECONDS = 10.0
"""For scontrol to spell out a list of hosts, which takes no controller."""


def sbatch(text: str, script: Path, *options: str) -> str:
    """Write a script and submit it; the job id."""
    write_script(text, script)
    command = ["sbatch", "--parsable", *options, str(script)]
    told = _call(command).stdout
    # What a cluster greets people with comes before it.
    found = re.search(r"^(\d+)(;.*)?\s*\Z", told, re.MULTILINE)
    if found is None:
        raise SlurmError(
            f"`{shlex.join(command)}` names no job: {told.strip()!r}; it may have taken the script "
            "all the same: look at `squeue --me` before submitting again"
        )
    return found[1]


def write_script(text: str, script: Path) -> None:
    """Leave a script where a person can read it. StorageError when there is no room."""
    with writing(script):
        script.parent.mkdir(parents=True, exist_ok=True)
    write_durably(script, text.encode())


def run_script(text: str, script: Path) -> str:
    """Write a script that submits its own jobs and run it here; the last job that it names."""
    if shutil.which("sbatch") is None:
        _call(["sbatch"])
    write_script(text, script)
    told = _call(["bash", str(script)]).stdout
    found: list[str] = re.findall(r": job (\d+), \d+ tasks$", told, re.MULTILINE)
    if not found:
        raise SlurmError(
            f"`bash {script}` names no job: {told.strip()!r}; Slurm may have taken some all the "
            "same: look at `squeue --me` before submitting again"
        )
    return found[-1]


def forecast(text: str) -> str:
    """What Slurm says of a script without taking it: when and where it could start."""
    done = _call(["sbatch", "--test-only"], text)
    return (done.stdout + done.stderr).strip()


def rendezvous(environ: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of an srun step, where the batch script has not set them.

    The first host of the allocation, and a port that follows from the job id, so that two jobs on
    one node differ.
    """
    found = {}
    if "MASTER_ADDR" not in environ:
        command = ["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]]
        hosts = _call(command).stdout.split()
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
        command = ["scontrol", "show", "hostnames", listed]
        return tuple(_call(command, seconds=HOSTS_SECONDS).stdout.split())
    except SlurmError:
        return ()


def _call(
    command: Sequence[str], text: str = "", *, seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            encoding="utf-8",
            # A path in an error message need not be UTF-8.
            errors="surrogateescape",
            check=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"`{shlex.join(command)}` did not answer in {seconds} s") from None
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} not found: Slurm is not installed here; run this on a login node, "
            "or add --dry-run to print the script"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SlurmError(
            f"`{shlex.join(command)}` left with {error.returncode}: {error.stderr.strip()}"
        ) from None
