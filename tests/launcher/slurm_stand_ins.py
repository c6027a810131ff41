"""A cluster of stand-ins: scripts in PATH that play Slurm's commands for one batch script."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from launcher.jobs import Job, render
from launcher.site import Site


def job(run: Path, **changes: object) -> Job:
    """A job of 4 nodes with 8 GPUs."""
    values = {
        "recipe": "llama-7b",
        "overrides": ("data=/data/books and more", "optim.lr=1e-4"),
        "run": run,
        "num_nodes": 4,
        "gpus_per_node": 8,
        "time": "1-12:00:00",
    }
    return Job(**(values | changes))  # type: ignore[arg-type]


class Cluster:
    """Stand-ins for Slurm's commands in a PATH, and a run directory."""

    def __init__(self, folder: Path) -> None:
        self.run, self.state = folder / "run", folder / "state"
        self._bin = folder / "bin"
        for path in (self.run, self.state, self._bin):
            path.mkdir()
        self.path = f"{self._bin}:/usr/bin:/bin"
        self.command(
            "scontrol", 'echo "$*" >>"$STATE/scontrol"; [ "$1" = requeue ] || echo "n1\nn2"'
        )
        self.command("sleep", "exit 0")
        self.command("squeue", 'cat "$STATE/queue" 2>/dev/null || true')
        os.environ["STATE"] = str(self.state)

    def command(self, name: str, body: str) -> None:
        """Put a shell script called `name` first in PATH."""
        path = self._bin / name
        if name == "srun":
            body = 'if [[ $* == *--overlap\\ rm\\ -rf* ]]; then exec rm -rf "${@: -1}"; fi\n' + body
        path.write_text(f"#!/bin/bash\n{body}\n".replace("\\n", "\n"))
        path.chmod(0o755)

    def ends(self, code: int, *, outcome: str = "", checkpoint: str = "", reason: str = "") -> None:
        """Let srun leave with `code` after writing what a run leaves behind."""
        body = 'printf "%s\\0" "$@" >"$STATE/srun"; env >"$STATE/environment"'
        if outcome:
            row = f'{{"attempt": 1, "outcome": "{outcome}", "step": 3, "reason": "{reason}"}}'
            body += f"; echo '{row}' >>{self.run}/attempts.jsonl"
        if checkpoint:
            folder = self.run / "checkpoints" / checkpoint
            body += f"; mkdir -p {folder}; touch {folder}/manifest.json"
        self.command("srun", f"{body}; exit {code}")

    def submitted(
        self, site: Site | None = None, *, min_nodes: int | None = None, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the script as slurmd would."""
        script = self.run.parent / "script"
        script.write_text(
            render(job(self.run, num_nodes=2, min_nodes=min_nodes, site=site or Site()))
        )
        return self.started(script, **environ)

    def started(
        self, script: Path, *argv: object, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script that was submitted by hand."""
        settings = {
            "PATH": self.path, "STATE": str(self.state), "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_ON_NODE": "64",
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(script), *map(str, argv)],
            env=settings | environ,
            capture_output=True,
            text=True,
            timeout=30,
        )

    @property
    def requeued(self) -> bool:
        """Whether the job was put back into the queue."""
        path = self.state / "scontrol"
        return path.exists() and "requeue 123456" in path.read_text()
