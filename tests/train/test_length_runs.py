"""Runs whose samples get another length: real engines, refusals, steps that are repeated, rows that
are looked at again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import data.order
from data.config import DataUsageError
from data.phases import Phases
from data.sources import open_datasets
from data.stream import SampleStream, sample_hash
from launcher.inspect import inspect_sample, inspect_step
from tests.data.tiny import documents, write_dataset
from tests.ranks import run_ranks
from tests.train.test_lengths import BLOCK, SEED, WINDOW, configured
from tests.train.test_lengths import small_windows as small_windows
from train.checkpoint import open_checkpoint
from train.config import ConfigError, RunConfig
from train.metrics import read_metrics
from train.phases import History, read_phases
from train.pretrain import pretrain_on, pretraining
from train.run import open_run, read_config, record_phase
from train.world import World


def train_to(
    world: World, config: RunConfig, run: Path, stop_at: int | None, allow: tuple[str, ...]
) -> str:
    data.order.WINDOW_TOKENS = WINDOW
    return pretrain_on(world, config, run, stop_at=stop_at, allow_change=allow)


def model_of(folder: Path, seq_len: int, batch: int, **keys: Any) -> RunConfig:
    model = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 32}
    table = {"precision": "fp32", "eval": {"samples": 4}, "model": model}
    table["data"] = {"path": str(folder)}
    return configured(seq_len, batch, 8, **{**table, **keys})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_dataset(
        path, {"train/main": documents(12), "val/main": documents(4, seed=1)}, block_tokens=BLOCK
    )
    return path


def test_a_run_goes_on_with_longer_samples_on_another_world(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short, long = model_of(dataset, 16, 8), model_of(dataset, 32, 4)
    assert run_ranks(2, train_to, short, run, 4, ()) == ["stopped"] * 2
    assert run_ranks(1, train_to, long, run, 6, ("seq_len",)) == ["stopped"]
    assert run_ranks(2, train_to, long, run, None, ()) == ["complete"] * 2

    rows = [row for row in read_metrics(run) if "loss" in row]
    assert [row["samples"] for row in rows] == [
        *([8 * i, 8 * i + 8] for i in range(4)),
        *([32 + 4 * i, 32 + 4 * i + 4] for i in range(4)),
    ]
    assert [row["tokens"] for row in rows] == [128 * (i + 1) for i in range(8)]
    assert [row["step"] for row in read_metrics(run) if "val_loss" in row] == [0, 8]
    opened = open_datasets(dataset, seq_len=32)
    stream = SampleStream(opened, seq_len=32, seed=SEED, phases=Phases(read_phases(run)))
    for row in rows:
        samples = range(*row["samples"])
        total = sum(sample_hash(i, stream.of(i).tokens(i)) for i in samples) % 2**64
        assert row["data_hash"] == f"{total:016x}"
    state = open_checkpoint(run).state["data"]
    assert [(p["seq_len"], p["start"], p.get("bases")) for p in state["phases"]] == [
        (16, 0, None),
        (32, 32, {"main": 16}),
    ]
    assert len(open_checkpoint(run, 4).state["data"]["phases"]) == 1
    found = read_config(run)
    assert isinstance(found, RunConfig)
    assert (found.seq_len, found.model.max_seq_len) == (32, 32)


def begin(run: Path, config: RunConfig) -> None:
    work = pretraining(config, num_ranks=1)
    open_run(run, work.config, work.identity)
    assert work.phase is not None
    record_phase(run, work.config, work.identity, work.phase)


def reopen(run: Path, config: RunConfig, *allow: str, steps: int) -> RunConfig:
    history = History(read_phases(run), steps)
    work = pretraining(config, num_ranks=1, history=history, allow_change=allow)
    open_run(run, work.config, work.identity, allow_change=allow)
    assert work.phase is not None
    record_phase(run, work.config, work.identity, work.phase)
    found = read_config(run)
    assert isinstance(found, RunConfig)
    return found


def test_a_new_length_is_refused_unless_it_was_asked_for(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run, model_of(dataset, 16, 8))
    with pytest.raises(ConfigError) as refused:
        reopen(run, model_of(dataset, 32, 4), steps=3)
    message = str(refused.value)
    assert "seq_len: 16 in the run, 32 now" in message
    assert "model.max_seq_len: 16 in the run, 32 now" in message
    assert message.endswith("with the new seq_len from here, add --allow-change seq_len")
    with pytest.raises(DataUsageError, match=r"go on to step 4 \(--stop-at 4\)"):
        reopen(run, model_of(dataset, 32, 4), "seq_len", steps=3)
    assert len(read_phases(run)) == 1
    found = reopen(run, model_of(dataset, 32, 4), "seq_len", steps=4)
    assert (found.seq_len, found.model.max_seq_len) == (32, 32)
    # Back again: the model keeps the context that it has been trained with.
    found = reopen(run, model_of(dataset, 8, 16), "seq_len", steps=6)
    assert (found.seq_len, found.model.max_seq_len) == (8, 32)
    assert [(p.first_step, p.first_sample, p.seq_len) for p in read_phases(run)] == [
        (1, 0, 16),
        (5, 32, 32),
        (7, 40, 8),
    ]
    # Given by hand it does not follow.
    by_hand = model_of(dataset, 16, 8)
    by_hand = by_hand.model_copy(
        update={"model": by_hand.model.model_copy(update={"max_seq_len": 64})}
    )
    begin(tmp_path / "other", by_hand)
    longer = by_hand.model_copy(update={"seq_len": 32})
    found = reopen(tmp_path / "other", longer, "seq_len", steps=4)
    assert (found.seq_len, found.model.max_seq_len) == (32, 64)


def test_steps_of_another_length_are_repeated_as_they_were(dataset: Path, tmp_path: Path) -> None:
    """The checkpoint in front of the change is lost; the run stands at step 3 again."""
    run = tmp_path / "run"
    short, long = model_of(dataset, 16, 8), model_of(dataset, 32, 4)
    begin(run, short)
    reopen(run, long, "seq_len", steps=4)
    history = History(read_phases(run), 3)
    work = pretraining(long, num_ranks=1, history=history)
    with pytest.raises(ConfigError) as refused:
        work.task.micro_batches(4, 8, rank=0, num_ranks=1)
    assert (
        "repeat those steps with `seq_len=16 batch_tokens=128 --allow-change seq_len "
        "--allow-change batch_tokens --stop-at 4`"
    ) in str(refused.value)
    # With micro-batches that fit both nothing has to be repeated by hand.
    fitting = long.model_copy(update={"micro_batch": 8})
    work = pretraining(fitting, num_ranks=1, history=history)
    batches = list(work.task.micro_batches(4, 6, rank=0, num_ranks=1))
    assert [batch["input_ids"].shape[1] for batch in batches] == [16, 32, 32]
    assert [work.task.num_valid(step) for step in (4, 5)] == [128, 128]
    reopen(run, short, "seq_len", steps=3)
    assert [(p.first_step, p.seq_len) for p in read_phases(run)] == [(1, 16), (4, 16)]


def test_rows_from_before_lengths_could_change_are_read(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run, model_of(dataset, 16, 8))
    row = json.loads((run / "phases.jsonl").read_text())
    del row["seq_len"], row["bases"], row["config"]["seq_len"], row["config"]["model.max_seq_len"]
    old = json.dumps(row) + "\n"
    (run / "phases.jsonl").write_text(old)
    assert [p.seq_len for p in read_phases(run)] == [16]
    reopen(run, model_of(dataset, 16, 8), steps=2)
    assert (run / "phases.jsonl").read_text() == old
    found = reopen(run, model_of(dataset, 32, 4), "seq_len", steps=4)
    assert (found.seq_len, [p.seq_len for p in read_phases(run)]) == (32, [16, 32])


def test_steps_of_both_lengths_are_inspected(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.inspect.decoder", lambda *_: str)
    run = tmp_path / "run"
    begin(run, model_of(dataset, 16, 8))
    reopen(run, model_of(dataset, 32, 4), "seq_len", steps=4)
    for step, seq_len, samples in ((4, 16, (24, 32)), (5, 32, (32, 36))):
        found = inspect_step(dataset, step=step, run=run, recipe="tiny-cpu", overrides=())
        assert (found.seq_len, (found.first, found.last)) == (seq_len, samples)
        for sample in found.samples:
            assert sum(piece.num_tokens for piece in sample.pieces) == seq_len + 1
    one = inspect_sample(dataset, sample=33, run=run, recipe="tiny-cpu", overrides=())
    assert (one.step, one.samples) == (5, found.samples[1:2])
