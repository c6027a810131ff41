"""A run whose batch, weights or sources change on purpose goes on at the sample where it stood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, DataError, DataSource, DataUsageError, PrepareConfig
from data.prepare import prepare
from data.sources import data_of, open_datasets
from data.stream import SampleStream, sample_hash
from launcher.inspect import inspect_step
from tests.ranks import run_ranks
from train.checkpoint import open_checkpoint
from train.config import ConfigError, RunConfig
from train.metrics import read_metrics
from train.phases import History, append_phase, phases_of, read_phases
from train.pretrain import pretrain_on, pretraining
from train.run import open_run, read_config, record_phase
from train.world import World


@pytest.fixture(scope="module")
def datasets(corpus: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two datasets of one tokenizer, and a third of another."""
    folder = tmp_path_factory.mktemp("datasets")
    text = str(corpus / "textwrap.txt")
    config = PrepareConfig(vocab_size=400, val_fraction=0.1)
    tokenizer = dataset / "tokenizer.model"
    brought = PrepareConfig(val_fraction=0.1)
    prepare([text], folder / "second", brought, workers=1, tokenizer=tokenizer)
    prepare([text], folder / "foreign", config, workers=1)
    return [dataset, folder / "second", folder / "foreign"]


def config(
    datasets: list[Path], weights: tuple[float, float] = (0.7, 0.3), **keys: Any
) -> RunConfig:
    sources = [
        DataSource(name=name, path=str(path), weight=weight)
        for name, path, weight in zip(("web", "code"), datasets, weights, strict=False)
    ]
    model = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 32}
    table = {
        "steps": 9, "seq_len": 32, "batch_tokens": 384, "seed": 3, "precision": "fp32",
        "eval": {"samples": 4}, "model": model, "data": {"sources": sources}, **keys,
    }  # fmt: skip
    return RunConfig.model_validate(table)


def train_to(
    world: World, config: RunConfig, run: Path, stop_at: int | None, allow: tuple[str, ...]
) -> str:
    return pretrain_on(world, config, run, stop_at=stop_at, allow_change=allow)


def test_weights_and_batch_change_between_worlds_and_no_sample_is_lost(
    datasets: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changed = config(datasets, (0.2, 0.8), batch_tokens=160)
    options = ("data.sources", "batch_tokens")
    assert run_ranks(2, train_to, config(datasets), run, 4, ()) == ["stopped"] * 2
    assert run_ranks(1, train_to, changed, run, 7, options) == ["stopped"]
    # From now on the change is the run's own config.
    assert run_ranks(2, train_to, changed, run, None, ()) == ["complete"] * 2

    rows = [row for row in read_metrics(run) if "loss" in row]
    assert [row["samples"] for row in rows] == [
        *([12 * i, 12 * i + 12] for i in range(4)),
        *([48 + 5 * i, 48 + 5 * i + 5] for i in range(5)),
    ]
    assert rows[-1]["tokens"] == 73 * 32
    assert rows[4]["lr"] < rows[3]["lr"]
    for row in rows:
        found = inspect_step(None, step=row["step"], run=run, recipe="tiny-cpu", overrides=())
        assert (found.data_hash, [found.first, found.last]) == (row["data_hash"], row["samples"])
    state = open_checkpoint(run).state["data"]
    assert [phase["start"] for phase in state["phases"]] == [0, 48]
    assert state["batches"] == [
        {"first_step": 1, "first_sample": 0, "batch_samples": 12},
        {"first_step": 5, "first_sample": 48, "batch_samples": 5},
    ]
    assert set(state["fingerprints"]) == {"web", "code"}
    assert len(open_checkpoint(run, 4).state["data"]["phases"]) == 1


def begin(run: Path, config: RunConfig) -> None:
    """A run directory with its first phase, as rank 0 opens it."""
    work = pretraining(config, num_ranks=1)
    open_run(run, work.config, work.identity)
    assert work.phase is not None
    record_phase(run, work.config, work.identity, work.phase)


def reopen(run: Path, config: RunConfig, *allow: str, steps: int) -> None:
    """Open the run again where `steps` steps are done."""
    history = History(read_phases(run), steps)
    work = pretraining(config, num_ranks=1, history=history, allow_change=allow)
    open_run(run, work.config, work.identity, allow_change=allow)
    assert work.phase is not None
    record_phase(run, work.config, work.identity, work.phase)


def test_a_change_is_refused_key_by_key_unless_it_was_asked_for(
    datasets: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    begin(run, config(datasets))
    changed = config(datasets, (0.5, 0.5), batch_tokens=64)
    with pytest.raises(ConfigError) as refused:
        reopen(run, changed, steps=4)
    message = str(refused.value)
    assert "batch_tokens: 384 in the run, 64 now" in message
    assert "data.sources.web.weight: 0.7 in the run, 0.5 now" in message
    assert "add --allow-change batch_tokens --allow-change data.sources" in message
    with pytest.raises(ConfigError, match=r"weight: 0\.3 in the run, 0\.5 now"):
        reopen(run, changed, "batch_tokens", steps=4)
    assert len(read_phases(run)) == 1
    reopen(run, changed, "batch_tokens", "data.sources", steps=4)
    assert [(p.first_step, p.first_sample) for p in read_phases(run)] == [(1, 0), (5, 48)]
    assert read_config(run) == pretraining(changed, num_ranks=1).config
    # A change that was made at a step whose samples were not kept takes the other's place.
    reopen(run, config(datasets, batch_tokens=128), "batch_tokens", "data.sources", steps=4)
    assert [p.batch_samples for p in read_phases(run)] == [12, 4]
    assert len((run / "phases.jsonl").read_text().splitlines()) == 3


def test_what_no_phase_can_bring_is_refused(datasets: list[Path], tmp_path: Path) -> None:
    begin(tmp_path / "run", config(datasets))
    message = r"optim\.lr cannot change .*: only batch_tokens, data\.sources and seq_len can; leave"
    with pytest.raises(ConfigError, match=message):
        reopen(tmp_path / "run", config(datasets), "optim.lr", steps=4)


def test_a_dropped_source_is_known_when_it_comes_back(datasets: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run, config(datasets))
    alone = config(datasets[:1])
    reopen(run, alone, "data.sources", steps=2)
    reopen(run, config(datasets), "data.sources", steps=5)
    opened = open_datasets(data_of(config(datasets).data), seq_len=32)
    phases = phases_of(config(datasets), opened, History(read_phases(run), 5))
    stream = SampleStream(opened, seq_len=32, seed=3, phases=phases)
    placements = [stream.placement(i) for i in range(200)]
    own = [(p.epoch, p.shard, p.token_offset) for p in placements if p.source == "code"]
    reference = SampleStream(
        [DataSource(name="code", path=str(datasets[1]), weight=1)], seq_len=32, seed=3
    )
    expected = [reference.placement(i) for i in range(len(own))]
    assert own == [(p.epoch, p.shard, p.token_offset) for p in expected]
    assert {p.source for p in placements[24:60]} == {"web"}

    renamed = [s.model_copy(update={"name": "new"}) for s in config(datasets).data.sources[1:]]
    with pytest.raises(DataUsageError, match=r"'new' is the data that this run reads as 'code'"):
        reopen(run, config(datasets, data={"sources": renamed}), "data.sources", steps=6)
    swapped = config([datasets[1], datasets[0]])
    message = r"source '\w+': .* is the data that this run reads as '\w+' .*paths were exchanged"
    with pytest.raises(DataError, match=message):
        reopen(run, swapped, "data.sources", steps=6)


def test_a_share_too_small_to_be_kept_begins_no_run(datasets: list[Path]) -> None:
    tiny = config(datasets, (1, 1e-6))
    with pytest.raises(DataUsageError, match=r"source 'code' has weight 1e-06, less than one 65,5"):
        phases_of(tiny, open_datasets(data_of(tiny.data), seq_len=32), History((), 0))


def test_one_named_dataset_gives_the_samples_of_the_short_form(datasets: list[Path]) -> None:
    short = SampleStream(datasets[0], seq_len=32, seed=3)
    (inner,) = short.sources
    named = SampleStream(
        data_of(DataConfig(sources=(DataSource(name=inner, path=str(datasets[0]), weight=7),))),
        seq_len=32,
        seed=3,
    )
    for i in (0, 5, 3000):
        assert sample_hash(i, short.tokens(i)) == sample_hash(i, named.tokens(i))
    assert named.state(5) == short.state(5)


def test_datasets_that_do_not_fit_each_other_are_refused(datasets: list[Path]) -> None:
    first, _, foreign = datasets
    with pytest.raises(DataUsageError) as refused:
        open_datasets(data_of(config([first, foreign]).data), seq_len=32)
    message = str(refused.value)
    hashes = [
        json.loads((p / "manifest.json").read_text())["tokenizer_sha256"] for p in (first, foreign)
    ]
    assert all(value in message for value in hashes)
    assert f"`--tokenizer {first / 'tokenizer.model'}`" in message
    with pytest.raises(DataUsageError, match=r"'code' and 'web' are the same|'web' and 'code' are"):
        open_datasets(data_of(config([first, first]).data), seq_len=32)


def test_too_many_epochs_are_refused_before_anything_is_written(
    datasets: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = config(datasets, steps=1000)
    with caplog.at_level("INFO"):
        pretraining(wanted, num_ranks=1)
    assert any(r.getMessage().startswith("web: ") for r in caplog.records)
    assert any(" epochs of " in r.getMessage() for r in caplog.records)
    limited = wanted.data.model_copy(update={"max_epochs": 2})
    with pytest.raises(DataUsageError) as refused:
        pretraining(wanted.model_copy(update={"data": limited}), num_ranks=1)
    code = open_datasets(data_of(wanted.data), seq_len=32).sources[0]
    assert code.name == "code"
    needed = round(12_000 * 0.3) * 32
    message = str(refused.value)
    assert "source 'code' would be read" in message and "data.max_epochs=2" in message
    assert f"one epoch holds {code.geometry.num_samples * 32:,}" in message
    assert any(f"needs {needed + 32 * k:,} of its" in message for k in (-1, 0, 1))


def test_a_damaged_row_is_named_and_a_torn_one_was_no_change(
    datasets: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    begin(run, config(datasets))
    with (run / "phases.jsonl").open("a") as file:
        file.write('{"first_step": 5, "fi')
    assert len(read_phases(run)) == 1
    second = read_phases(run)[0].model_copy(update={"first_step": 3, "first_sample": 24})
    append_phase(run, second, json.loads((run / "config.json").read_text()))
    assert read_phases(run)[1] == second
    with (run / "phases.jsonl").open("a") as file:
        file.write('{"first_step": 0}\n')
    with pytest.raises(DataError, match=r"phases\.jsonl:4 is damaged .* put back a copy"):
        read_phases(run)
