"""Samples are a pure function of dataset, seed and index; they say where they come from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from data.config import DataError, DataUsageError
from data.phases import Phases, first_phase
from data.sources import open_datasets
from data.stream import SampleStream, sample_hash
from tests.data.tiny import documents, write_dataset

TEXTS = documents(60)
STREAM = np.concatenate(TEXTS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, {"train/text": TEXTS, "val/text": documents(5, seed=1)})
    return folder


def test_epochs_of_a_run_are_counted_per_source(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train/a": documents(40), "train/b": documents(20, seed=1)})
    stream = SampleStream(tmp_path, seq_len=16, seed=0)
    count = 2 * stream.num_samples_per_epoch
    read = Counter(stream.placement(sample).source for sample in range(count))
    epochs = stream.epochs(count)
    per_epoch = {name: read[name] / epochs[name] for name in ("a", "b")}
    assert sum(per_epoch.values()) == pytest.approx(stream.num_samples_per_epoch)
    assert epochs == pytest.approx({"a": 2, "b": 2}, rel=0.01)


@pytest.mark.parametrize("seq_len", [1, 7, 32, 512])
def test_an_epoch_brings_every_sample_exactly_once(dataset: Path, seq_len: int) -> None:
    straight = _epoch(SampleStream(dataset, seq_len=seq_len, seed=0, shuffle=False), 0)
    stream = SampleStream(dataset, seq_len=seq_len, seed=3)
    first, second = _epoch(stream, 0), _epoch(stream, 1)

    assert Counter(first) == Counter(straight) == Counter(second)
    assert len(straight) == stream.num_samples_per_epoch
    if seq_len <= 32:
        assert len({tuple(order) for order in (straight, first, second)}) == 3


def test_unshuffled_samples_are_the_text_in_its_order(dataset: Path) -> None:
    stream = SampleStream(dataset, seq_len=32, seed=0, shuffle=False)
    for sample in range(stream.num_samples_per_epoch):
        start = sample * 32
        assert stream.tokens(sample).tolist() == STREAM[start : start + 33].tolist()


def test_splits_and_batches(dataset: Path) -> None:
    val = SampleStream(dataset, seq_len=8, seed=0, split="val", shuffle=False)
    assert val.tokens(0).tolist() == np.concatenate(documents(5, seed=1))[:9].tolist()
    train = SampleStream(dataset, seq_len=8, seed=0)
    rows = train.batch(np.array([5, 0, 10_000]))
    assert (rows.dtype, rows.shape) == (np.uint32, (3, 9))
    assert [row.tolist() for row in rows] == [train.tokens(i).tolist() for i in (5, 0, 10_000)]


def test_a_placement_leads_back_to_the_text(dataset: Path) -> None:
    stream = SampleStream(dataset, seq_len=100, seed=1)
    for sample in (0, 3, stream.num_samples_per_epoch + 1):
        placement = stream.placement(sample)
        assert (placement.sample, placement.source) == (sample, "text")
        assert placement.epoch == sample // stream.num_samples_per_epoch
        assert sum(part.num_tokens for part in placement.documents) == 101
        assert placement.documents == stream.documents(sample)
        assert placement.shard == placement.documents[0].shard
        shard = [
            path for path in dataset.rglob("shard-*.tar") if str(path).endswith(placement.shard)
        ]
        assert len(shard) == 1


def test_samples_are_golden(tmp_path: Path) -> None:
    text = [np.append(np.arange(n) ** 2 % 290 + 4, 2) for n in range(1, 100)]
    write_dataset(tmp_path, {"train/text": text})
    stream = SampleStream(tmp_path, seq_len=16, seed=7)
    assert stream.num_samples_per_epoch == 315
    hashes = [f"{sample_hash(i, stream.tokens(i)):016x}" for i in (0, 1, 1000)]
    assert hashes == ["bfcff7414dd0b8a5", "88668105d45436af", "b6bcc0f5e275bd24"]


def test_a_sample_hash_is_that_of_its_index_and_tokens() -> None:
    tokens = np.array([1, 2, 2**31], dtype=np.uint32)
    raw = np.array([77], dtype="<u8").tobytes() + tokens.astype("<u4").tobytes()
    assert sample_hash(77, tokens) == xxhash.xxh3_64_intdigest(raw)
    assert sample_hash(78, tokens) != sample_hash(77, tokens)


def test_several_sources_are_mixed_by_size_and_each_is_read_in_full(tmp_path: Path) -> None:
    large, small = documents(60), documents(20, seed=1)
    write_dataset(tmp_path, {"train/large": large, "train/small": small})
    stream = SampleStream(tmp_path, seq_len=16, seed=0)
    count = stream.num_samples_per_epoch
    placements = [stream.placement(sample) for sample in range(count)]
    held = Counter(placement.source for placement in placements)
    expected = {"large": (len(np.concatenate(large)) - 1) // 16}
    assert held["large"] == pytest.approx(expected["large"], abs=2)
    places = [(p.source, p.epoch, p.shard, p.token_offset) for p in placements]
    assert len(set(places)) == count


def test_a_state_goes_through_json_and_is_recognised(dataset: Path) -> None:
    stream = SampleStream(dataset, seq_len=32, seed=0)
    state = json.loads(json.dumps(stream.state(640)))
    assert state["consumed_samples"] == 640
    assert set(state) == {"consumed_samples", "seed", "packing", "phases", "fingerprints"}
    SampleStream(dataset, seq_len=32, seed=0).check_state(state)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, r"trained with seed 0, this run has 1; .* Continue with the old seed"),
        (
            {"seq_len": 16},
            r"trained with seq_len and mixture .*'seq_len': 32.*Continue with the old",
        ),
    ],
)
def test_a_state_of_another_order_is_refused(
    dataset: Path, other: dict[str, Any], message: str
) -> None:
    state = SampleStream(dataset, seq_len=32, seed=0).state(0)
    with pytest.raises(DataError, match=message):
        SampleStream(dataset, **{"seq_len": 32, "seed": 0, **other}).check_state(state)


def test_a_state_of_other_data_is_refused(dataset: Path, tmp_path: Path) -> None:
    state = SampleStream(dataset, seq_len=32, seed=0).state(0)
    write_dataset(tmp_path, {"train/text": documents(60, seed=5)})
    with pytest.raises(DataError, match=r"fingerprint .* Name the dataset that the run began with"):
        SampleStream(tmp_path, seq_len=32, seed=0).check_state(state)
    del state["packing"]
    with pytest.raises(DataError, match=r"has no 'packing'; it is incomplete"):
        SampleStream(dataset, seq_len=32, seed=0).check_state(state)


def test_what_gives_no_sample_is_refused(dataset: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, {"train/text": documents(1)})
    tokens = len(documents(1)[0])
    with pytest.raises(
        DataUsageError,
        match=rf"source 'text' of split 'train' holds {tokens} tokens, .* needs {tokens + 1}",
    ):
        SampleStream(tmp_path, seq_len=tokens, seed=0)
    assert SampleStream(tmp_path, seq_len=tokens - 1, seed=0).num_samples_per_epoch == 1
    with pytest.raises(DataUsageError, match=r"seq_len=513 is longer than a block .* 512 tokens"):
        SampleStream(dataset, seq_len=513, seed=0)
    with pytest.raises(DataUsageError, match=r"has no split 'val', only train; prepare it with"):
        SampleStream(tmp_path, seq_len=8, seed=0, split="val")


def _epoch(stream: SampleStream, epoch: int) -> list[bytes]:
    count = stream.num_samples_per_epoch
    rows = stream.batch(np.arange(epoch * count, (epoch + 1) * count))
    return [row.tobytes() for row in rows]


def test_a_dataset_that_was_replaced_is_told_with_every_way_on(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    write_dataset(folder, {"train/main": documents(40)})
    then = open_datasets(folder, seq_len=16)
    phases = Phases([first_phase(1, then.slots(), then.fingerprints(), seq_len=16)])
    SampleStream(then, seq_len=16, seed=0, phases=phases)
    write_dataset(folder, {"train/main": documents(40, seed=1)})
    now = open_datasets(folder, seq_len=16)
    with pytest.raises(DataError) as refused:
        SampleStream(now, seq_len=16, seed=0, phases=phases)
    was, is_now = (d.fingerprints()["main"][:16] for d in (then, now))
    assert str(refused.value) == (
        f"source 'main': {folder} holds other data than this run was trained on (fingerprint {was} "
        f"then, {is_now} now, with {now.sources[0].tokens.num_tokens:,} tokens): it was prepared "
        "again with other text, settings or tokenizer, or was replaced. Places in the old data "
        "mean nothing in the new, so samples would be repeated and left out. Put the old dataset "
        "back, or name it where it is now (data=PATH, or the source's path); or train on the new "
        "one, too, under a name of its own in [[data.sources]] with --allow-change data.sources; "
        "or begin a new --run"
    )
