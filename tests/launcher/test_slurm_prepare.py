"""The batch script of a preparation, played by stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.config import PrepareConfig
from data.prepare import prepare
from tests.data.prepared import tree
from tests.data.texts import prose, write_lines

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "prepare.sbatch"
# Runs the whole array at once, in the order of its tasks, and refuses what does not come after it.
SBATCH = """
for word in "$@"; do
  case $word in
    --array=0-*) last=${word#--array=0-} ;;
    --export=ALL,STAGE=*) export STAGE=${word#--export=ALL,STAGE=} ;;
    --dependency=afterok:*) after=${word#--dependency=afterok:} ;;
    --*) ;;
    *) break ;;
  esac
  shift
done
job=$(($(cat "$STATE/job") + 1))
[ "${after:-0}" = "$((job - 1))" ] || { echo "job $job comes after ${after:-none}" >&2; exit 1; }
echo "$STAGE $last" >>"$STATE/stages"
cp "$1" "$STATE/slurm_script"; shift
export SLURM_ARRAY_TASK_COUNT=$((last + 1)) SLURM_CPUS_PER_TASK=1
for SLURM_ARRAY_TASK_ID in $(seq 0 "$last"); do
  export SLURM_ARRAY_TASK_ID
  bash "$STATE/slurm_script" "$@" >&2 || exit 1
done
echo "$job" | tee "$STATE/job"
"""
SRUN = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'


class Cluster:
    """Stand-ins for sbatch and srun in a PATH."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.state.mkdir()
        (self.state / "job").write_text("0\n")
        for name, body in (("sbatch", SBATCH), ("srun", SRUN)):
            path = self.state / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)

    def run(self, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`bash slurm/prepare.sbatch ARGV` as on a login node."""
        environ = {
            "PATH": f"{self.state}:/usr/bin:/bin", "STATE": str(self.state), "TASKS": "2",
            "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "HOME": os.environ.get("HOME", "/"),
        }  # fmt: skip
        command = ["bash", str(SCRIPT), *argv]
        return subprocess.run(
            command, env=environ | variables, capture_output=True, text=True, timeout=300
        )

    @property
    def stages(self) -> list[str]:
        return (self.state / "stages").read_text().splitlines()


def test_the_arrays_leave_the_bytes_of_a_plain_preparation(tmp_path: Path) -> None:
    texts = [prose(400, seed=seed) for seed in range(60)]
    corpus = write_lines(tmp_path / "a corpus.jsonl", texts)
    config = PrepareConfig(vocab_size=400, val_fraction=0.2, shuffle=True)
    prepare([str(corpus)], tmp_path / "plain", config, workers=1)
    argv = ["--input", str(corpus), "--output", str(tmp_path / "out"), "--vocab-size", "400"]
    argv += ["--val-fraction", "0.2", "--shuffle"]
    cluster = Cluster(tmp_path)
    done = cluster.run(*argv)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")
    assert cluster.stages == [
        "plan 0", "read 1", "scatter 1", "shuffle 1", "survey 1", "tokenizer 0", "encode 1",
        "commit 0",
    ]  # fmt: skip
    assert done.stdout.splitlines()[:2] == ["plan: job 1, 1 tasks", "read: job 2, 2 tasks"]
    assert "stage encode, task 1/2: 1 job done" in done.stderr
    # The last task tells what one command would have told.
    assert "the dataset is complete\n" in done.stderr
    assert "validation tokens, vocabulary 400, fingerprint " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "stages"),
    [
        ([], "plan read survey tokenizer encode commit"),
        (["--filter"], "plan read clean drop survey tokenizer encode commit"),
        (["--dedup=near"], "plan read clean dedup drop survey tokenizer encode commit"),
    ],
    ids=str,
)
def test_stages_that_are_off_are_not_submitted(
    tmp_path: Path, argv: list[str], stages: str
) -> None:
    cluster = Cluster(tmp_path)
    done = cluster.run("--input", "a", "--output", "b", *argv, PYTHON="true", TASKS="1")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in cluster.stages] == stages.split()


def test_a_task_that_fails_ends_the_chain_with_its_reason(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    done = cluster.run("--input", str(tmp_path / "none"), "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "no such file or folder" in done.stderr
    assert cluster.stages == ["plan 0"]


def test_a_missing_stage_is_named_with_the_command_line_that_does_it(tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "a b.jsonl", [prose(400)])
    argv = ["--input", str(corpus), "--output", str(tmp_path / "out"), "--workers=1"]
    command = [sys.executable, "-m", "launcher", "prepare", *argv]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(*task: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *task], env=environ, capture_output=True, text=True)

    assert run("--stage", "plan").stdout == "stage plan, task 0/1: 1 job done\n"
    refused = run("--stage=survey", "--task", "1/3")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: stage read is not complete: 1 of its 1 jobs are not done, those of tasks 0/1; run: "
        f"headrace prepare --input '{corpus}' --output {tmp_path / 'out'} --workers=1 "
        "--stage read --task 0/1\n"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "1/2"], "--task 1/2 is a share of one stage; name it: --stage encode"),
        (["--stage", "read", "--task", "2/2"], "--task 2/2: tasks are numbered from 0"),
    ],
)
def test_half_a_task_is_refused(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.cli import run_command

    with pytest.raises(ValueError, match=message):
        run_command(
            ["prepare", "--input", "x", "--output", str(tmp_path / "y"), *argv], standalone=False
        )
