"""A run on data from a URL is the one on the folder, to the bit; damage is quarantined once."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import shards
from data.config import PrepareConfig
from data.manifest import read_manifest
from data.prepare import prepare
from data.shard_index import index_path, read_index
from data.sources import open_datasets
from data.stream import SampleStream
from launcher.inspect import inspect_step
from tests.data.servers import serving
from tests.data.tiny import flip_bit
from tests.ranks import RankFailure, run_ranks
from tests.train.test_pretrain import config
from train.attempt import run_attempt
from train.checkpoint import open_checkpoint
from train.config import RunConfig
from train.metrics import read_metrics
from train.pretrain import pretraining
from train.world import RankError, World


def train_many(world: World, jobs: list[tuple[RunConfig, Path, int | None]]) -> list[str]:
    """What the ranks warned of in each run, once trained."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("data.loader").addHandler(handler)
    for settings, run, stop_at in jobs:
        run_attempt(world, run, pretraining(settings, num_ranks=world.size), stop_at=stop_at)
    return told


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run) if "loss" in row]


def numbers(run: Path) -> list[tuple[Any, ...]]:
    """Everything of a run that does not depend on time, its validations included."""
    keys = ("step", "samples", "data_hash", "loss", "grad_norm", "val_loss", "quarantined")
    return [tuple(row.get(key) for key in keys) for row in read_metrics(run)]


@pytest.fixture(scope="module")
def chunked(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of several shards and many chunks."""
    folder = tmp_path_factory.mktemp("chunked") / "dataset"
    lines = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    text = "".join(path.read_text() for path in sorted(corpus.glob("*.txt")))
    pieces = [text[at : at + 2000] for at in range(0, len(text), 2000)]
    lines.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    settings = PrepareConfig(
        vocab_size=400, val_fraction=0.1, shard_bytes=20_000, part_bytes=10_000
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK_TOKENS", 2000)
        prepare([str(lines)], folder, settings, workers=1)
    return folder


def test_a_run_from_a_url_is_the_local_run_to_the_bit(chunked: Path, tmp_path: Path) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    with serving(chunked) as server:
        staged = config(chunked, "data.stage=true", f"data.cache_dir={tmp_path / 'other'}")
        jobs = [
            (config(chunked), tmp_path / "local", None),
            (config(server.url, cache, "data.num_workers=2"), tmp_path / "far", 5),
            # The data has moved in the middle of the run, and so has the cache.
            (staged, tmp_path / "far", None),
            (config(f"pipe:cat {chunked}/{{path}}", cache), tmp_path / "piped", None),
        ]
        run_ranks(1, train_many, jobs)
        expected = numbers(tmp_path / "local")
        assert len(expected) == 8 + 2
        assert numbers(tmp_path / "far") == expected
        assert numbers(tmp_path / "piped") == expected
        assert any(path.endswith(".tar") for path, _ in server.asked)
        step = inspect_step(server.url, step=2, run=tmp_path / "far", recipe="", overrides=())
        assert step.data_hash == expected[2][2]
        assert step.samples[0].pieces[0].text
    for name in ("config.json", "tokenizer.model"):
        assert (tmp_path / "far" / name).is_file()


def damage(folder: Path) -> tuple[str, str]:
    """One chunk and one shard; returns what names them."""
    entries = read_manifest(folder).source_shards("train", "main")
    path = folder / entries[1].path
    chunk = read_index(index_path(path)).chunks[1]
    flip_bit(path, chunk.tokens_offset + 5)
    os.truncate(folder / entries[3].path, 1000)
    return f"{path}, chunk {chunk.key}: its tokens are damaged", f"{folder / entries[3].path} is"


def touched(intact: Path, folder: Path, samples: int) -> list[int]:
    """Samples that hold a token of a damaged chunk, by the tokens' places in the intact copy."""
    stream = SampleStream(open_datasets(intact, seq_len=32), seq_len=32, seed=3)
    (source,) = stream.sources.values()
    entries = read_manifest(intact).source_shards("train", "main")
    found = []
    for sample in range(samples):
        _, _, offsets = stream.locate(np.array([sample]))
        places = [source.tokens.place(int(offsets[0]) + i)[:2] for i in range(33)]
        if any(
            shard == entries[3].path or (shard == entries[1].path and chunk.endswith("-00001"))
            for shard, chunk in places
        ):
            found.append(sample)
    return found


def test_damage_is_quarantined_once_whoever_reads_it(chunked: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(chunked, folder)
    named = damage(folder)
    one, two = tmp_path / "one", tmp_path / "two"
    quarantine = config(folder, "data.on_damage=quarantine")
    by_workers = config(folder, "data.on_damage=quarantine", "data.num_workers=1", "micro_batch=5")
    (told,) = run_ranks(1, train_many, [(quarantine, one, None)])
    both = run_ranks(2, train_many, [(by_workers, two, 4)])
    # Free to change on resume: without quarantine the first damage stops the run.
    with pytest.raises(RankFailure, match=r"its tokens are damaged|is damaged: 1000 bytes"):
        run_ranks(1, train_many, [(config(folder), two, None)])
    run_ranks(1, train_many, [(quarantine, two, None)])

    expected, steps = numbers(one), rows(one)
    bad = touched(chunked, folder, 96)
    assert 5 < len(bad) < 60
    assert [row["quarantined"] for row in steps] == [
        sum(sample < row["samples"][1] for sample in bad) for row in steps
    ]
    assert [row["tokens"] for row in steps] == [
        32 * (row["samples"][1] - row["quarantined"]) for row in steps
    ]
    assert open_checkpoint(one, 8).state["quarantined"] == len(bad)
    for row, wanted in zip(numbers(two), expected, strict=True):
        assert (row[:3], row[6]) == (wanted[:3], wanted[6])
        # fp32: only the order of additions differs.
        assert row[3] == (wanted[3] and pytest.approx(wanted[3], rel=2e-4))
    # Each damage is told once by every rank that meets it.
    for what in named:
        assert sum(what in message for message in told) == 1
        assert all(sum(what in message for message in rank) <= 1 for rank in both)
        assert any(what in message for rank in both for message in rank)

    shown = [
        inspect_step(None, step=row["step"], run=one, recipe="", overrides=()) for row in steps
    ]
    assert [step.data_hash for step in shown] == [row["data_hash"] for row in steps]
    found = [sample for step in shown for sample in step.samples if sample.quarantined]
    assert [sample.sample for sample in found] == bad
    assert all(any(what in sample.quarantined for what in named) for sample in found)
    assert not any(sample.pieces for sample in found)


def see_other_data(world: World, configs: list[RunConfig], run: Path) -> str:
    try:
        run_attempt(world, run, pretraining(configs[world.rank], num_ranks=world.size))
    except RankError as error:
        return str(error)
    return "nobody noticed"


def test_ranks_that_see_other_data_do_not_train(
    chunked: Path, dataset: Path, tmp_path: Path
) -> None:
    told = run_ranks(2, see_other_data, [config(chunked), config(dataset)], tmp_path / "run")
    assert all("do not see the same data" in message for message in told)
    assert not (tmp_path / "run").exists()
