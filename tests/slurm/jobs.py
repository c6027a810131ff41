"""Pretraining jobs of two nodes, as tests submit and watch them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster
from train.attempts import attempts
from train.metrics import read_metrics

STEPS = 400
SIZES = (f"steps={STEPS}", "checkpoint.every=50", "eval.samples=2", "optim.lr=1e-3")


@dataclass(frozen=True)
class Pretraining:
    """A job and its run."""

    slurm: Cluster
    run: Path
    job: str

    def reaches(self, step: int) -> None:
        """Wait until the run has made a step."""
        self.slurm.until(lambda: self.step >= step, f"step {step} of {self.run}")

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        if not (self.run / "metrics.jsonl").exists():
            return 0
        return max((row["step"] for row in read_metrics(self.run)), default=0)

    def outcomes(self) -> list[Any]:
        """(outcome, reason) of all attempts."""
        rows = [row for row in attempts(self.run) if row["event"] == "end"]
        return [(row["outcome"], row["reason"]) for row in rows]

    def said(self) -> str:
        """What the batch script has said."""
        return (self.run / "logs" / f"slurm-{self.job}.out").read_text()


def submit(
    slurm: Cluster, dataset: Path, name: str, *more: str, sbatch: str = "", **variables: str
) -> Pretraining:
    """`headrace submit` on two nodes of one rank each."""
    run = slurm.folder / name
    layout = ["--nodes", "2", "--gpus-per-node", "0", "--time", "30"]
    layout += [f"--sbatch={sbatch}"] if sbatch else []
    said = slurm.run(
        "headrace", "submit", "small.toml", f"data={dataset}", "--run", run, *SIZES,
        "zero.stage=2", *layout, *more, **variables,
    )  # fmt: skip
    return Pretraining(slurm, run, said.split()[-1])
