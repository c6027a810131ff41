"""Best-fit samples from a plan on disk: every target once, the same on every layout, and no damage
that passes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import shards
from data.config import DataError, DataSource, DataUsageError, accumulation
from data.loader import Batch, SampleStream, micro_batches
from data.lookup import look_up
from data.manifest import read_manifest
from data.pack import pack_dataset
from data.phases import Phases, first_phase
from data.sources import open_datasets
from data.stats import dataset_stats
from launcher.cli import run_command
from tests.data.tiny import documents, flip_bit, write_dataset

SEQ_LEN, BATCH = 24, 11
PLACES = SEQ_LEN + 1
VOCAB = 100_000


def counted(count: int, *, first: int, seed: int) -> list[Any]:
    """Documents of 1 to 200 tokens in which every id is one more than that before it, and no two
    tokens have the same.
    """
    ends = first + np.cumsum(np.random.default_rng(seed).integers(2, 202, size=count))
    return [np.arange(a + 1, b) for a, b in zip([first, *ends[:-1]], ends, strict=True)]


TRAIN = {"train/a": counted(60, first=10, seed=0), "train/b": counted(30, first=20_000, seed=1)}
VAL = {"val/text": counted(9, first=50_000, seed=2)}


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Several shards for a source, several chunks for a shard."""
    monkeypatch.setattr(shards, "CHUNK_TOKENS", 500)
    folder = tmp_path / "dataset"
    write_dataset(folder, {**TRAIN, **VAL}, vocab_size=VOCAB)
    return folder


@pytest.fixture
def packed(dataset: Path) -> Path:
    pack_dataset(dataset, seq_len=SEQ_LEN)
    return dataset


def stream_of(dataset: Path, **changes: Any) -> SampleStream:
    given = {"seq_len": SEQ_LEN, "seed": 3, "packing": "best_fit", **changes}
    return SampleStream(dataset, **given)


def read(
    stream: SampleStream, *, num_ranks: int = 1, micro_batch: int = 4, num_workers: int = 0,
    boundaries: Any = "attention", samples: int | None = None, first: int = 0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The real rows of all ranks in training order, one step of all the samples of an epoch."""
    count = samples or stream.num_samples_per_epoch
    ranks: list[list[Batch]] = [
        list(
            micro_batches(
                stream,
                first_sample=first,
                batch_samples=count,
                num_steps=1,
                rank=rank,
                num_ranks=num_ranks,
                micro_batch=micro_batch,
                num_workers=num_workers,
                boundaries=boundaries,
            )
        )
        for rank in range(num_ranks)
    ]
    found: dict[str, list[torch.Tensor]] = {}
    for number in range(accumulation(count, num_ranks, micro_batch)):
        for batches in ranks:
            for name, value in batches[number].items():
                found.setdefault(name, []).append(value)
    hashes = torch.stack(found.pop("data_hash")).sum()
    rows = {name: torch.cat(values) for name, values in found.items()}
    assert rows["labels"][count:].eq(-100).all()
    return {**{name: value[:count] for name, value in rows.items()}, "data_hash": hashes}


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_has_every_token_but_the_first_of_a_document_as_target_once(
    packed: Path, epoch: int
) -> None:
    for name, texts in TRAIN.items():
        # Sources alone, so that an epoch of the stream is one of the source.
        folder = packed.parent / name.replace("/", "-")
        write_dataset(folder, {"train/only": texts}, vocab_size=VOCAB)
        pack_dataset(folder, seq_len=SEQ_LEN)
        stream = stream_of(folder)
        rows = read(stream, first=epoch * stream.num_samples_per_epoch)
        inputs, labels, doc_ids = rows["input_ids"], rows["labels"], rows["doc_ids"]
        real = labels != -100
        assert Counter(labels[real].tolist()) == Counter(
            token for ids in texts for token in ids.tolist()[1:]
        )
        # What a target follows is the token before it, in the same document.
        assert torch.equal(labels[real], inputs[real] + 1)
        assert torch.equal(inputs[:, 1:][real[:, :-1]], labels[:, :-1][real[:, :-1]])
        (source,) = stream.sources.values()
        assert int(real.sum()) == source.samples.num_targets
        assert (inputs[:, 0] > 0).all()
        assert 0 < int((inputs == 0).sum()) < inputs.numel() / 10
        # A new document id wherever a part ends, and one of its own for the padding.
        begins = torch.ones_like(real)
        begins[:, 1:] = (inputs[:, 1:] != inputs[:, :-1] + 1) & (inputs[:, 1:] != 0)
        begins[:, 1:] |= (inputs[:, 1:] == 0) & (inputs[:, :-1] != 0)
        assert torch.equal(begins.cumsum(1) - 1, doc_ids)
        assert torch.equal(rows["position_ids"] == 0, begins)


@pytest.mark.parametrize(
    ("num_ranks", "micro_batch", "num_workers"), [(1, 7, 2), (2, 4, 0), (3, 1, 0), (5, 2, 0)]
)
def test_layouts_change_nothing(
    packed: Path, num_ranks: int, micro_batch: int, num_workers: int
) -> None:
    stream = stream_of(packed)
    expected = read(stream, first=7, samples=40)
    found = read(
        stream, num_ranks=num_ranks, micro_batch=micro_batch, num_workers=num_workers,
        first=7, samples=40,
    )  # fmt: skip
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_boundaries_change_only_what_attention_sees(packed: Path) -> None:
    stream = stream_of(packed)
    rows = {name: read(stream, boundaries=name) for name in ("ignore", "labels", "attention")}
    for name in ("input_ids", "labels", "data_hash"):
        assert torch.equal(rows["ignore"][name], rows["attention"][name])
    assert rows["ignore"].keys() == rows["labels"].keys() == rows["attention"].keys() - {"doc_ids"}
    straight = torch.arange(SEQ_LEN).expand_as(rows["labels"]["position_ids"])
    assert torch.equal(rows["labels"]["position_ids"], straight)


def test_parts_of_a_sample_lie_in_one_chunk_and_lead_back_to_the_text(packed: Path) -> None:
    stream = stream_of(packed)
    texts = {name.split("/")[1]: documents for name, documents in TRAIN.items()}
    starts: dict[str, int] = {}
    for shard in read_manifest(packed).shards:
        starts[shard.path] = sum(
            e.documents
            for e in read_manifest(packed).source_shards(shard.split, shard.source)
            if e.path < shard.path
        )
    for sample in range(stream.num_samples_per_epoch + 5):
        placement, tokens = stream.placement(sample), stream.tokens(sample).tolist()
        assert len({part.shard for part in placement.documents}) == 1
        ids = [
            token
            for part in placement.documents
            for token in texts[placement.source][starts[part.shard] + part.number].tolist()[
                part.first_token : part.first_token + part.num_tokens
            ]
        ]
        assert tokens == ids + [0] * (PLACES - len(ids))


def test_every_document_is_found_where_brute_force_finds_it(packed: Path) -> None:
    opened = open_datasets(packed, seq_len=SEQ_LEN, packing="best_fit")
    phases = Phases([first_phase(BATCH, opened.slots(), opened.fingerprints(), seq_len=SEQ_LEN)])
    stream = SampleStream(opened, seq_len=SEQ_LEN, seed=3, phases=phases)
    count = stream.num_samples_per_epoch
    steps = count // BATCH
    held: dict[tuple[str, int], set[tuple[int, int]]] = {}
    for sample in range(2 * count):
        placement = stream.placement(sample)
        for part in placement.documents:
            held.setdefault((part.shard, part.number), set()).add((placement.epoch, sample))
    for entry in read_manifest(packed).shards:
        for number in range(entry.documents if entry.split == "train" else 0):
            found = look_up(stream, phases, shard=entry.path, number=number, steps=steps)
            places = {(place.epoch, place.sample) for place in found.occurrences}
            assert places == {p for p in held.get((entry.path, number), ()) if p[0] == 0}
            assert {place.step for place in found.occurrences} == {
                sample // BATCH + 1 if sample < steps * BATCH else None for _, sample in places
            }


def test_a_plan_is_the_same_for_any_number_of_workers_and_made_once(dataset: Path) -> None:
    first = pack_dataset(dataset, seq_len=SEQ_LEN, workers=1)
    files = sorted(path for path in (dataset / "packing").rglob("*") if path.is_file())
    assert len(files) == len(read_manifest(dataset).shards) + 1
    before = {path: path.read_bytes() for path in files}
    again = pack_dataset(dataset, seq_len=SEQ_LEN, workers=2)
    assert (first.was_complete, again.was_complete) == (False, True)
    assert again.sources == first.sources
    flip_bit(files[0], 200)
    assert not pack_dataset(dataset, seq_len=SEQ_LEN, workers=2).was_complete
    assert {path: path.read_bytes() for path in files} == before
    plans = b"".join(raw for path, raw in before.items() if path.suffix == ".npy")
    assert hashlib.sha256(plans).hexdigest()[:16] == "e1000f0d4b5df5f6"


def test_a_state_of_another_packing_is_refused(packed: Path) -> None:
    state = json.loads(json.dumps(stream_of(packed).state(50)))
    stream_of(packed).check_state(state)
    message = r"trained with packing best_fit, this run has concat; .* the old data\.packing, or"
    with pytest.raises(DataError, match=message):
        stream_of(packed, packing="concat").check_state(state)


def test_validation_reads_the_plan_in_the_order_of_the_text(packed: Path) -> None:
    val = stream_of(packed, split="val", shuffle=False)
    first = VAL["val/text"][0].tolist()[:PLACES]
    assert val.tokens(0).tolist()[: len(first)] == first
    rows = read(val)
    assert int((rows["labels"] != -100).sum()) == sum(len(ids) - 1 for ids in VAL["val/text"])


def test_plans_of_several_datasets_are_mixed(packed: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", {"train/main": documents(40)}, vocab_size=VOCAB)
    sources = [
        DataSource(name=name, path=str(path), weight=1)
        for name, path in (("first", packed), ("other", tmp_path / "other"))
    ]
    with pytest.raises(DataUsageError, match=rf"{tmp_path / 'other'} --seq-len 24`"):
        SampleStream(sources, seq_len=SEQ_LEN, seed=3, packing="best_fit")
    pack_dataset(tmp_path / "other", seq_len=SEQ_LEN)
    stream = SampleStream(sources, seq_len=SEQ_LEN, seed=3, packing="best_fit")
    assert set(stream.sources) == {"first/a", "first/b", "other"}
    assert {stream.placement(sample).source for sample in range(30)} == set(stream.sources)


def test_statistics_tell_what_packing_wastes(packed: Path) -> None:
    found = dataset_stats(packed, seq_len=SEQ_LEN)
    for plan, source in zip(found.plans, found.sources, strict=True):
        texts = {**TRAIN, **VAL}[f"{plan.split}/{plan.source}"]
        assert plan.cut_documents == sum(len(ids) > PLACES for ids in texts)
        assert plan.targets == sum(len(ids) - 1 for ids in texts)
        assert plan.padding == 1 - plan.targets / (plan.samples * SEQ_LEN)
        assert 0 <= plan.padding < 0.1
        # By brute force over the samples of concatenated text.
        held = [range(t, t + PLACES) for t in _cuts(sum(map(len, texts)))]
        begin = cut = 0
        for ids in texts:
            whole = any(begin in r and begin + len(ids) - 1 in r for r in held)
            cut += not whole
            begin += len(ids)
        assert source.cut_documents == cut > plan.cut_documents
    flip_bit(packed / "packing" / str(SEQ_LEN) / "plan.json", 20)
    assert dataset_stats(packed, seq_len=SEQ_LEN).plans == ()


def test_the_command_says_what_it_made(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    argv = ["data", "pack", str(dataset), "--seq-len", str(SEQ_LEN), "--workers", "1"]
    run_command(argv, standalone=False)
    out = capsys.readouterr().out
    assert "train/a: " in out and "% padding" in out
    assert f"{dataset} is packed; train with data.packing=best_fit seq_len=24" in out
    run_command([*argv, "--json"], standalone=False)
    found = json.loads(capsys.readouterr().out)
    assert found["was_complete"] and [s["source"] for s in found["sources"]] == ["a", "b", "text"]
    run_command(["data", "stats", str(dataset)], standalone=False)
    assert "best_fit 24" in capsys.readouterr().out


def _cuts(num_tokens: int, block: int = 512) -> list[int]:
    """First tokens of the samples of concatenated text."""
    return [
        t
        for begin in range(0, num_tokens, block)
        for t in range(begin, min(begin + block, num_tokens - 1) - SEQ_LEN + 1, SEQ_LEN)
    ]
