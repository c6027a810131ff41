"""The batch scripts of export, fine-tuning and evaluation, when stand-ins play Slurm's commands."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launcher.template import FOLDER
from tests.launcher.slurm_stand_ins import Cluster

EXPORT, FINETUNE, EVALUATE = (
    FOLDER / f"{name}.sbatch" for name in ("export", "finetune", "evaluate")
)


def argv_of(cluster: Cluster) -> list[str]:
    """What srun was asked to run, and with what."""
    return (cluster.state / "srun").read_text().split("\0")[:-1]


def test_below_its_settings_finetune_is_pretrain_without_its_preflight() -> None:
    """One place to mend either: what is learnt of one is carried over by copying."""
    end = "# to here\n"
    body = (FOLDER / "pretrain.sbatch").read_text().split(end)[1]
    for part in (
        r"^PREFLIGHT.*?\n",
        r"^preflight\(\) \{.*?^\}\n\n",
        r'^if \[ "\$PREFLIGHT" = 1 \]; then\n.*?^fi\n',
    ):
        body, count = re.subn(part, "", body, flags=re.MULTILINE | re.DOTALL)
        assert count > 0, part
    assert "-- pretrain " in body and "PREFLIGHT" not in body
    assert FINETUNE.read_text().split(end)[1] == body.replace("pretrain", "finetune")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (None, "none"),
        ('{"attempt": 1, "event": "start"}', "none"),
        ('{"outcome": "complete"}\n{"outcome": "stopped"}', "stopped"),
        ('{"outcome": "failed"}', "failed"),
    ],
)
def test_a_run_that_did_not_come_to_its_end_is_not_exported(
    rows: str | None, told: str, cluster: Cluster
) -> None:
    if rows is not None:
        (cluster.run / "attempts.jsonl").write_text(rows + "\n")
    cluster.ends(0)
    refused = cluster.started(EXPORT, cluster.run, "out")
    assert refused.returncode == 1
    assert refused.stderr == (
        f"{cluster.run} is not complete (the end of its last attempt: {told}). Let it come to its "
        "end (rm RUN/STOP if it is there, and submit it again), or export its newest checkpoint: "
        "FORCE=1\n"
    )
    assert not (cluster.state / "srun").exists()
    assert cluster.started(EXPORT, cluster.run, "out", FORCE="1").returncode == 0
    assert (cluster.state / "srun").exists()


def test_a_complete_run_is_exported(cluster: Cluster) -> None:
    (cluster.run / "attempts.jsonl").write_text('{"outcome": "complete"}\n')
    cluster.ends(0)
    done = cluster.started(EXPORT, cluster.run, "a model", "--dtype", "bf16", PYTHON="/py thon")
    assert done.returncode == 0, done.stderr
    assert argv_of(cluster)[2:] == [
        "/py thon", "-m", "launcher", "export", str(cluster.run), "a model", "--dtype", "bf16",
    ]  # fmt: skip
    cluster.ends(3)
    assert cluster.started(EXPORT, cluster.run, "out").returncode == 3


def test_an_export_that_is_queued_again_after_its_end_is_done(cluster: Cluster) -> None:
    (cluster.run / "attempts.jsonl").write_text('{"outcome": "complete"}\n')
    (cluster.run / "headrace.json").touch()
    cluster.ends(1)
    argv = (EXPORT, cluster.run, cluster.run)
    assert cluster.started(*argv, SLURM_RESTART_COUNT="1").returncode == 0
    assert cluster.started(*argv).returncode == 1


def test_scores_are_there_whole_or_not_at_all(cluster: Cluster) -> None:
    out = cluster.run.parent / "scores"
    cluster.command("srun", 'echo "{\\"loss\\""; exit 1')
    assert cluster.started(EVALUATE, out, "hf", "--data", "x.csv").returncode == 1
    assert not (out / "evaluation.json").exists()
    cluster.command("srun", 'printf "%s\\0" "$@" >"$STATE/srun"; echo "{}"')
    done = cluster.started(EVALUATE, out, "hf", "--data", "a b.csv", NODE_LOCAL=str(cluster.state))
    assert (done.returncode, done.stdout) == (0, "{}\n"), done.stderr
    assert (out / "evaluation.json").read_text() == "{}\n"
    assert argv_of(cluster)[2:] == [
        "python", "-m", "launcher", "evaluate", "hf", "--data", "a b.csv", "--json",
    ]  # fmt: skip


@pytest.mark.parametrize("script", [EXPORT, FINETUNE, EVALUATE], ids=lambda path: path.stem)
def test_a_script_that_is_submitted_without_arguments_says_how(script: Path) -> None:
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"usage: sbatch slurm/{script.name} " in done.stderr


def test_a_preparation_without_arguments_submits_nothing() -> None:
    done = subprocess.run(["bash", str(FOLDER / "prepare.sbatch")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: TASKS=64 bash slurm/prepare.sbatch --input FILE --output DATASET" in done.stderr
