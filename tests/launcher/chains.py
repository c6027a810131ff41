"""A folder with a life cycle, where stand-ins play Slurm and the commands: each job runs when it is
submitted, and leaves behind what its command would write last.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import run_command

LIFECYCLE = """
[prepare]
inputs = ["corpus"]
output = "work/dataset"
options = ["--vocab-size=400"]
tasks = 2
slurm = { time = "30", partition = "cpu", cpus_per_task = 1, mem_per_cpu = "1G" }
[pretrain]
recipe = "tiny-cpu"
output = "work/run"
overrides = ["steps=8", "schedule.warmup_steps=1"]
slurm = { nodes = 2, gpus_per_node = 0, time = "30", options = ["--nodelist=n[1-4]"] }
[export]
output = "work/model"
[finetune]
recipe = "classify"
data = "labelled.csv"
output = "work/tuned"
slurm = { gpus_per_node = 0, time = "30", lead = 60 }
[evaluate]
data = "labelled.csv"
output = "work/scores"
options = ["--split=val"]
slurm = { gpus_per_node = 0 }
"""
SBATCH = """
while [[ $1 == --* ]]; do
  case $1 in
    --array=0-*) export SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_COUNT=$((${1#--array=0-} + 1)) ;;
    --export=ALL,STAGE=*) export STAGE=${1#--export=ALL,STAGE=} ;;
    --dependency=afterok:*) after=${1#--dependency=afterok:} ;;
  esac
  shift
done
job=$(($(cat "$STATE/job") + 1)); echo "$job" >"$STATE/job"
echo "$job ${1##*/} ${STAGE:-} after ${after:-none}" >>"$STATE/submitted"
export SLURM_JOB_ID=$job SLURM_JOB_NODELIST=n SLURM_JOB_NUM_NODES=1 SLURM_CPUS_ON_NODE=1
[ ! -e "$STATE/wait" ] || { echo "$job"; exit; }
bash "$@" >&2 || exit 1
echo "$job"
"""
SRUN = """
case "$*" in
  *"launcher prepare"*"--stage commit"*)
    mkdir -p work/dataset; echo made >work/dataset/manifest.json ;;
  *"launcher pretrain"*) echo '{"outcome": "complete"}' >>work/run/attempts.jsonl ;;
  *"launcher export"*) mkdir -p work/model; echo "{}" >work/model/headrace.json ;;
  *"launcher finetune"*) mkdir -p work/tuned/hf; echo "{}" >work/tuned/hf/headrace.json
    echo '{"outcome": "complete"}' >>work/tuned/attempts.jsonl ;;
  *"launcher evaluate"*) echo "{}" ;;
esac
"""


class Chain:
    """A folder with a life cycle, and stand-ins for Slurm."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.state = folder / "state"
        for name in ("state", "bin", "corpus"):
            (folder / name).mkdir()
        (self.state / "job").write_text("0\n")
        (folder / "corpus" / "a.txt").write_text("some text")
        (folder / "labelled.csv").write_text("text,label\na,b\n")
        (folder / "life.toml").write_text(LIFECYCLE)
        squeue = 'cat "$STATE/queue" 2>/dev/null || true'
        named = {"sbatch": SBATCH, "srun": SRUN, "scontrol": "echo n", "squeue": squeue}
        for name, body in named.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / "bin" / name).chmod(0o755)

    def submit(self, *argv: str) -> list[list[str]]:
        """`headrace submit life.toml`; (stage, what became of it) of each line."""
        (self.state / "submitted").write_text("")
        run_command(["submit", "life.toml", *argv], standalone=False)
        lines = self._capsys.readouterr().out.splitlines()
        return [[line.split()[0], " ".join(line.split()[1:-1])] for line in lines]

    @property
    def submitted(self) -> list[str]:
        """JOB SCRIPT STAGE after JOB, of each call of sbatch."""
        return (self.state / "submitted").read_text().splitlines()

    def change(self, old: str, new: str) -> None:
        """Edit the file."""
        text = (self.folder / "life.toml").read_text()
        assert old in text
        (self.folder / "life.toml").write_text(text.replace(old, new))
