"""A document leads to exactly the samples that hold some of it, and to the steps of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

import data.order
from data.config import DataSource, DataUsageError
from data.lookup import Occurrence, look_up
from data.manifest import read_manifest
from data.phases import Phases, RunPhase
from data.sources import open_datasets
from data.stream import SampleStream
from tests.data.tiny import documents, write_dataset

SEQ_LEN = 16
BATCH = 5


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[DataSource]:
    # Windows of two blocks: several in an epoch.
    monkeypatch.setattr(data.order, "WINDOW_TOKENS", 256)
    write_dataset(tmp_path / "a", {"train/main": documents(20)}, block_tokens=128)
    write_dataset(tmp_path / "b", {"train/main": documents(9, seed=1)}, block_tokens=128)
    return [
        DataSource(name="a", path=str(tmp_path / "a"), weight=1),
        DataSource(name="b", path=str(tmp_path / "b"), weight=2),
    ]


def test_every_document_is_found_where_brute_force_finds_it(sources: list[DataSource]) -> None:
    opened = open_datasets(sources, seq_len=SEQ_LEN)
    first = opened.slots()
    second = {"a": first["b"], "b": first["a"]}
    fingerprints = opened.fingerprints()
    changed = {"first_step": 9, "first_sample": 40, "batch_samples": 3, "slots": second}
    begun = {"first_step": 1, "first_sample": 0, "batch_samples": BATCH, "slots": first}
    phases = Phases([RunPhase(**row, fingerprints=fingerprints) for row in (begun, changed)])
    stream = SampleStream(opened, seq_len=SEQ_LEN, seed=1, phases=phases)
    steps = 100
    step_of = {s: step for step in range(1, steps + 1) for s in range(*phases.samples(step))}
    assert len(step_of) == 40 + 92 * 3
    places = [stream.placement(sample) for sample in range(1500)]

    for source in sources:
        reached = max(p.epoch for p in places[: len(step_of)] if p.source == source.name)
        for shard in read_manifest(Path(source.path)).shards:
            for number in range(shard.documents):
                found = look_up(
                    stream,
                    phases,
                    shard=shard.path,
                    number=number,
                    steps=steps,
                    dataset=Path(source.path),
                )
                expected = [
                    Occurrence(p.epoch, p.sample, step_of.get(p.sample))
                    for p in places
                    if p.source == source.name
                    and p.epoch <= reached
                    and any(d.shard == shard.path and d.number == number for d in p.documents)
                ]
                assert list(found.occurrences) == sorted(expected, key=lambda o: o.sample)


def test_what_is_no_document_is_refused(sources: list[DataSource]) -> None:
    stream = SampleStream(sources, seq_len=SEQ_LEN, seed=1)
    opened = open_datasets(sources, seq_len=SEQ_LEN)
    row = RunPhase(
        first_step=1,
        first_sample=0,
        batch_samples=BATCH,
        slots=opened.slots(),
        fingerprints=opened.fingerprints(),
    )
    shard = "train/main/shard-000000.tar"

    def find(shard: str, number: int, dataset: Path | None = None) -> None:
        look_up(stream, Phases([row]), shard=shard, number=number, steps=1, dataset=dataset)

    with pytest.raises(DataUsageError, match=r"in several datasets \(.*a, .*b\); name one of them"):
        find(shard, 0)
    with pytest.raises(DataUsageError, match=r"no dataset of training has a shard 'val/x'; name"):
        find("val/x", 0)
    held = read_manifest(Path(sources[0].path)).shards[0].documents
    with pytest.raises(DataUsageError, match=f"holds documents 0 to {held - 1}, and no document"):
        find(shard, held, Path(sources[0].path))
