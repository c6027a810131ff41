"""Whole pretraining runs: same samples and losses at every world size, exact resume, refusals,
kills.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import train.saver
from data.config import PrepareConfig
from data.prepare import prepare
from tests.ranks import RankFailure, run_ranks
from train.attempt import run_attempt
from train.checkpoint import committed, open_checkpoint
from train.config import ConfigError, RunConfig
from train.decode import load_config
from train.metrics import read_metrics
from train.pretrain import PretrainTask, pretraining
from train.run import attempts
from train.world import RankError, World

RECIPE = """
steps = 8
seed = 3
seq_len = 32
batch_tokens = 384
precision = "fp32"
optim.lr = 1e-2
checkpoint.every = 3
checkpoint.keep = 10
eval.samples = 8
model = { num_layers = 2, hidden_size = 32, num_heads = 4, num_kv_heads = 2, ffn_size = 64 }
"""


def config(dataset: Path, *overrides: str) -> RunConfig:
    return load_config(RunConfig, RECIPE, [f"data={dataset}", *overrides])


def train_run(world: World, config: RunConfig, run: Path, stop_at: int | None = None) -> str:
    work = pretraining(config, num_ranks=world.size)
    return run_attempt(world, run, work, stop_at=stop_at)


def train_many(world: World, jobs: list[tuple[RunConfig, Path, int | None]]) -> list[str]:
    return [train_run(world, *job) for job in jobs]


def losses(run: Path) -> list[tuple[Any, ...]]:
    return [
        (row["step"], row["samples"], row["data_hash"], row["loss"], row["grad_norm"], row["lr"])
        for row in read_metrics(run)
        if "loss" in row
    ]


@pytest.fixture(scope="module")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on one rank, ZeRO-1, fp32."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert run_ranks(1, train_run, config(dataset), run) == ["complete"]
    return run


def test_rows_tell_the_whole_step(reference: Path) -> None:
    rows = read_metrics(reference)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["samples"] for row in steps] == [[12 * i, 12 * i + 12] for i in range(8)]
    assert [row["tokens"] for row in steps] == [384 * i for i in range(1, 9)]
    assert all(len(row["data_hash"]) == 16 and row["attempt"] == 1 for row in steps)
    assert len({row["data_hash"] for row in steps}) == 8
    assert all(row["tokens_per_second"] > 0 and 0 < row["mfu"] < 2 for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    validations = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert list(validations) == [0, 8]
    assert validations[8] < validations[0] - 0.3
    assert committed(reference) == [8, 6, 3]
    assert (reference / "tokenizer.model").exists()


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5])
def test_any_world_sees_the_same_samples_and_losses(
    reference: Path, dataset: Path, tmp_path: Path, num_ranks: int
) -> None:
    jobs = [(config(dataset, "checkpoint.every=0"), tmp_path / "whole", None)]
    if num_ranks == 2:
        jobs.append(
            (
                config(dataset, "data.num_workers=2", "checkpoint.every=0"),
                tmp_path / "workers",
                None,
            )
        )
        jobs.append((config(dataset, "micro_batch=1", "zero.stage=2"), tmp_path / "micro", None))
    run_ranks(num_ranks, train_many, jobs)
    expected = losses(reference)
    for _, run, _ in jobs:
        found = losses(run)
        assert [row[:3] for row in found] == [row[:3] for row in expected]
        for row, wanted in zip(found, expected, strict=True):
            # fp32: only the order of additions differs, amplified by eight steps at a high learning
            # rate.
            assert row[3:] == pytest.approx(wanted[3:], rel=2e-4)


def test_the_same_command_resumes_to_the_bit(
    reference: Path, dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert run_ranks(1, train_run, config(dataset), run, 6) == ["stopped"]
    assert len(losses(run)) == 6
    assert run_ranks(1, train_run, config(dataset), run, 6) == ["stopped"]
    assert run_ranks(1, train_run, config(dataset), run) == ["complete"]
    assert losses(run) == losses(reference)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in lines if "loss" in row]
    # Nothing was computed twice, and the second attempt says where it went on.
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert steps[6]["resumed_from"] == 6
    assert steps[6]["attempt"] > steps[5]["attempt"]
    assert [row["outcome"] for row in attempts(run) if row["event"] == "end"] == [
        "stopped",
        "stopped",
        "complete",
    ]
    before = (run / "metrics.jsonl").read_bytes()
    assert run_ranks(1, train_run, config(dataset), run) == ["complete"]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_resume_at_another_stage_and_world(reference: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(2, train_run, config(dataset, "zero.stage=3"), run, 3) == ["stopped"] * 2
    assert run_ranks(1, train_run, config(dataset, "zero.stage=2"), run, 6) == ["stopped"]
    assert run_ranks(3, train_run, config(dataset, "zero.stage=0"), run) == ["complete"] * 3
    for row, wanted in zip(losses(run), losses(reference), strict=True):
        assert row[:3] == wanted[:3]
        assert row[3:] == pytest.approx(wanted[3:], rel=2e-4)


class ShiftedTask(PretrainTask):
    """Reads one sample too far on."""

    def samples(self, step: int) -> tuple[int, int]:
        first, last = super().samples(step)
        return first + 1, last + 1


def train_shifted(world: World, config: RunConfig, run: Path) -> None:
    work = pretraining(config, num_ranks=world.size)
    assert isinstance(work.task, PretrainTask)
    work.task.__class__ = ShiftedTask
    run_attempt(world, run, work)


def test_a_shift_by_one_sample_is_noticed(reference: Path, dataset: Path, tmp_path: Path) -> None:
    run_ranks(1, train_shifted, config(dataset), tmp_path / "run")
    found, wanted = losses(tmp_path / "run"), losses(reference)
    for row, other in zip(found, wanted, strict=True):
        assert row[1] != other[1]
        assert row[2] != other[2]
    # One step alone may come close by chance.
    assert [row[3] for row in found] != pytest.approx([row[3] for row in wanted], rel=2e-4)


def die_while_saving(world: World, config: RunConfig, run: Path, step: int) -> None:
    """SIGKILL this rank with half of its file written, at the checkpoint of `step`."""
    original = train.saver.write_slices

    def half(folder: Path, rank: int, *rest: Any, **options: Any) -> Any:
        entry = original(folder, rank, *rest, **options)
        if rank == world.size - 1 and folder.name.endswith(f"{step:03d}"):
            os.truncate(folder / entry["name"], entry["bytes"] // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return entry

    train.saver.write_slices = half
    train_run(world, config, run)


def test_sigkill_of_a_rank_while_saving_costs_only_the_steps_since(
    reference: Path, dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(RankFailure):
        run_ranks(2, die_while_saving, config(dataset), run, 6)
    assert committed(run) == [3]
    assert (run / "checkpoints/step-000000006").exists()
    assert run_ranks(2, train_run, config(dataset), run) == ["complete"] * 2
    assert committed(run) == [8, 6, 3]
    for row, wanted in zip(losses(run), losses(reference), strict=True):
        assert row[:3] == wanted[:3]
        assert row[3:] == pytest.approx(wanted[3:], rel=2e-4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(row for row in lines if row.get("resumed_from"))["step"] == 4


def test_a_damaged_checkpoint_is_passed_over(
    reference: Path, dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_ranks(1, train_run, config(dataset), run, 6)
    path = run / "checkpoints/step-000000006/rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run_ranks(1, train_run, config(dataset), run) == ["complete"]
    assert losses(run) == losses(reference)
    resumed = [row["resumed_from"] for row in read_metrics(run) if "resumed_from" in row]
    assert resumed == [3]


def refuse(world: World, config: RunConfig, run: Path) -> str:
    try:
        train_run(world, config, run)
    except (RankError, ConfigError) as error:
        assert error.exit_code == 2
        return str(error)
    return "not refused"


def test_another_config_is_refused_key_by_key(
    reference: Path, dataset: Path, tmp_path: Path
) -> None:
    messages = run_ranks(2, refuse, config(dataset, "optim.lr=2e-2", "seed=4"), reference)
    assert messages[0] == messages[1]
    assert "was started with another config" in messages[0]
    assert "optim.lr: 0.01 in the run, 0.02 now" in messages[0]
    assert "seed: 3 in the run, 4 now" in messages[0]
    (tmp_path / "precious.txt").write_text("mine")
    assert "is not empty and no run of ours" in run_ranks(1, refuse, config(dataset), tmp_path)[0]
    message = run_ranks(1, refuse, config(dataset, "model.vocab_size=77"), tmp_path / "new")[0]
    assert "leave model.vocab_size at 0" in message


def test_a_corpus_without_held_out_text_trains_all_the_same(corpus: Path, tmp_path: Path) -> None:
    everything = PrepareConfig(vocab_size=400, val_fraction=0)
    prepare([str(corpus)], tmp_path / "dataset", everything, workers=1)
    run = tmp_path / "run"
    run_ranks(1, train_run, config(tmp_path / "dataset", "steps=2"), run)
    assert [("val_loss" in row, row["step"]) for row in read_metrics(run)] == [
        (False, 1),
        (False, 2),
    ]


def test_another_dataset_or_model_is_refused(reference: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    part = str(corpus / "argparse.txt")
    prepare([part], other, PrepareConfig(vocab_size=400, val_fraction=0.1), workers=1)
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    # The newest checkpoint is the last step: leave one that still has steps to go.
    for step in (6, 8):
        shutil.rmtree(run / f"checkpoints/step-{step:09d}")
    message = run_ranks(1, refuse, config(other), run)[0]
    assert "data_fingerprint: " in message and "tokenizer_sha256: " in message
    settings = json.loads((run / "config.json").read_text())
    settings["config"]["model"]["num_layers"] = 3
    (run / "config.json").write_text(json.dumps(settings))
    path = settings["config"]["data"]["path"]
    with pytest.raises(RankFailure, match=r"is of another model: 'blocks\.2\..*here"):
        run_ranks(1, train_run, config(Path(path), "model.num_layers=3"), run)


def test_a_damaged_last_checkpoint_is_not_called_complete(
    reference: Path, dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    path = run / "checkpoints/step-000000008/rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert run_ranks(1, train_run, config(dataset), run) == ["complete"]
    assert losses(run) == losses(reference)
    open_checkpoint(run, 8).verify()


def test_a_torn_last_line_swallows_no_row(reference: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(1, train_run, config(dataset), run, 3)
    for name in ("metrics.jsonl", "attempts.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 4, "lo')
    run_ranks(1, train_run, config(dataset), run)
    assert losses(run) == losses(reference)
    assert [row["resumed_from"] for row in attempts(run) if row["event"] == "start"] == [None, 3]


def fail(world: World, config: RunConfig, run: Path) -> str:
    try:
        train_run(world, config, run)
    except ValueError as error:
        return str(error)
    return "not refused"


def test_a_foreign_tokenizer_beside_the_shards_is_refused(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(dataset, copy)
    with (copy / "tokenizer.model").open("ab") as file:
        file.write(b"\0")
    message = run_ranks(1, fail, config(copy), tmp_path / "run")[0]
    assert "is not the tokenizer that" in message and "headrace prepare" in message
    assert not (tmp_path / "run").exists()


def test_a_run_that_lost_its_checkpoints_does_not_start_again(
    reference: Path, dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    message = run_ranks(2, fail, config(dataset), run)[1]
    assert "recorded step 8, but" in message and "with another --run" in message
    assert len(list(run.glob("checkpoints/*/rank-*"))) == 3


def test_a_damaged_config_is_named(reference: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "config.json").write_text('{"kind": "pre')
    assert "config.json is damaged" in run_ranks(1, fail, config(dataset), run)[0]
