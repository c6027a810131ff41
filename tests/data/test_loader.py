"""Every layout of ranks, micro-batches and loader processes brings the same samples in order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.config import DataError, accumulation
from data.loader import Batch, SampleStream, micro_batches, sample_hash
from data.manifest import read_manifest
from data.shard_index import index_path, read_index
from data.signals import STOP_SIGNALS
from tests.data.tiny import documents, flip_bit, write_dataset
from tests.ranks import _context as processes

SEQ_LEN = 16
BATCH = 11
STEPS = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, {"train/text": documents(60)})
    return folder


@pytest.fixture
def stream(dataset: Path) -> SampleStream:
    return SampleStream(dataset, seq_len=SEQ_LEN, seed=0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_samples_do_not_depend_on_the_number_of_ranks(
    stream: SampleStream, num_ranks: int, micro_batch: int
) -> None:
    found = _gather(stream, num_ranks=num_ranks, micro_batch=micro_batch)
    first = 7 * BATCH
    expected = stream.batch(np.arange(first, first + STEPS * BATCH))
    assert found["tokens"].tolist() == expected.tolist()
    for step in range(STEPS):
        samples = range(first + step * BATCH, first + (step + 1) * BATCH)
        total = sum(sample_hash(i, stream.tokens(i)) for i in samples) % 2**64
        assert found["data_hash"][step] == total


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
def test_loader_processes_change_nothing(stream: SampleStream, num_ranks: int) -> None:
    here = _gather(stream, num_ranks=num_ranks, micro_batch=2, num_workers=0)
    there = _gather(stream, num_ranks=num_ranks, micro_batch=2, num_workers=2)
    assert there["tokens"].tolist() == here["tokens"].tolist()
    assert there["data_hash"] == here["data_hash"]


def test_a_run_cut_in_two_sees_the_same_batches(stream: SampleStream) -> None:
    whole = [*_rank(stream, first_sample=0, num_steps=4)]
    halves = [
        *_rank(stream, first_sample=0, num_steps=2),
        *_rank(stream, first_sample=2 * BATCH, num_steps=2),
    ]
    assert len(whole) == len(halves) == 4 * accumulation(BATCH, 2, 2)
    for a, b in zip(whole, halves, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_has_shifted_labels_and_empty_dummies(stream: SampleStream) -> None:
    batches = list(_rank(stream, rank=1, num_ranks=2, micro_batch=4, num_steps=1))
    # Rank 1 of 2 has places 4-7 and 12-15 of a batch of 11.
    assert len(batches) == 2
    full, dummies = batches
    assert full["input_ids"].shape == (4, SEQ_LEN)
    for name in ("input_ids", "labels", "position_ids"):
        assert full[name].dtype == dummies[name].dtype == torch.int64
    assert full["input_ids"].is_contiguous() and full["labels"].is_contiguous()
    expected = torch.from_numpy(stream.batch(np.arange(4, 8)).astype(np.int64))
    assert torch.equal(full["input_ids"], expected[:, :-1])
    assert torch.equal(full["labels"], expected[:, 1:])
    assert torch.equal(full["position_ids"], torch.arange(SEQ_LEN).expand(4, SEQ_LEN))
    assert dummies["input_ids"].eq(0).all()
    assert dummies["labels"].eq(-100).all()
    assert torch.equal(dummies["position_ids"], full["position_ids"])
    assert int(dummies["data_hash"]) == 0
    assert full["data_hash"].shape == ()


def test_a_batch_that_is_part_real_hashes_only_what_is_real(stream: SampleStream) -> None:
    (batch,) = _rank(stream, num_ranks=1, micro_batch=16, num_steps=1)
    total = sum(sample_hash(i, stream.tokens(i)) for i in range(BATCH)) % 2**64
    assert int(batch["data_hash"]) % 2**64 == total
    assert batch["labels"].ne(-100).sum() == BATCH * SEQ_LEN


@pytest.mark.parametrize(
    ("batch_samples", "num_ranks", "micro_batch", "expected"),
    [(8, 2, 4, 1), (8, 1, 4, 2), (9, 2, 4, 2), (1, 64, 8, 1), (11, 5, 1, 3)],
)
def test_accumulation_is_the_batch_over_what_a_round_takes(
    batch_samples: int, num_ranks: int, micro_batch: int, expected: int
) -> None:
    assert accumulation(batch_samples, num_ranks, micro_batch) == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_found_by_the_loader_is_told_as_it_is(tmp_path: Path, num_workers: int) -> None:
    write_dataset(tmp_path, {"train/text": documents(60)})
    entry = read_manifest(tmp_path).shards[0]
    chunk = read_index(index_path(tmp_path / entry.path)).chunks[0]
    flip_bit(tmp_path / entry.path, chunk.tokens_offset)
    stream = SampleStream(tmp_path, seq_len=SEQ_LEN, seed=0)
    with pytest.raises(DataError) as found:
        list(_rank(stream, num_steps=30, num_workers=num_workers))
    assert str(found.value).startswith(
        f"{tmp_path / entry.path}, chunk {chunk.key}: its tokens are damaged"
    )


def test_a_loader_process_that_dies_is_told(dataset: Path) -> None:
    stream = _DeadlyStream(dataset, seq_len=SEQ_LEN, seed=0)
    with pytest.raises(DataError, match=r"a loader process died .*lower data\.num_workers"):
        list(_rank(stream, num_workers=1))


def test_a_run_that_stops_early_leaves_its_loader_processes_behind_cleanly(
    stream: SampleStream,
) -> None:
    batches = _rank(stream, num_steps=100, num_workers=2)
    next(batches)
    del batches


def _read_and_stay(pipe: Connection, stream: SampleStream) -> None:
    batches = _rank(stream, num_steps=100, num_workers=2)
    next(batches)
    pipe.send([process.pid for process in multiprocessing.active_children()])
    pipe.recv()


def test_the_loader_processes_of_a_killed_trainer_end(stream: SampleStream) -> None:
    """Nobody else ends them, and they hold memory that the next attempt needs."""
    here, there = processes.Pipe()
    trainer = processes.Process(target=_read_and_stay, args=(there, stream))
    trainer.start()
    assert here.poll(60), "the trainer hangs"
    workers = here.recv()
    assert len(workers) == 2 and all(_lives(pid) for pid in workers)
    trainer.kill()
    trainer.join()
    deadline = time.monotonic() + 30
    while any(_lives(pid) for pid in workers):
        assert time.monotonic() < deadline, "loader processes outlive their trainer"
        time.sleep(0.05)


def _read_until_told(pipe: Connection, stream: SampleStream) -> None:
    os.setsid()
    # The fork server of this test may have been started for loader processes.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    asked: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: asked.append(number))
    batches = _rank(stream, num_steps=100, num_workers=2)
    next(batches)
    pipe.send(os.getpid())
    while len(asked) < len(STOP_SIGNALS):
        time.sleep(0.01)
    # More than can have been ready, and from every process.
    found = sum(1 for _ in itertools.islice(batches, 100))
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
        worker.join(10)
    pipe.send((found, [worker.exitcode for worker in workers]))


def test_a_stop_that_reaches_all_processes_leaves_the_loader_processes_at_work(
    stream: SampleStream,
) -> None:
    """The trainer needs them until the ranks have agreed at which step they stop. What the trainer
    sends itself ends them.
    """
    here, there = processes.Pipe()
    trainer = processes.Process(target=_read_until_told, args=(there, stream))
    trainer.start()
    there.close()
    try:
        assert here.poll(60), "the trainer hangs"
        group = here.recv()
        for number in STOP_SIGNALS:
            os.killpg(group, number)
        assert here.poll(20), "the loader processes are gone"
        assert here.recv() == (100, [1, 1])
    finally:
        trainer.kill()
        trainer.join()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class _DeadlyStream(SampleStream):
    """Ends its process when it is asked to read, as a machine out of memory would."""

    def read(self, sources: Any, offsets: Any, damaged: dict[int, str] | None = None) -> Any:
        os._exit(9)


def _rank(stream: SampleStream, **layout: Any) -> Iterator[Batch]:
    settings = {"first_sample": 0, "num_steps": 2, "rank": 0, "num_ranks": 2, "micro_batch": 2}
    return micro_batches(stream, batch_samples=BATCH, **{**settings, **layout})


def _gather(
    stream: SampleStream, *, num_ranks: int, micro_batch: int, num_workers: int = 0
) -> dict[str, Any]:
    """What all ranks see: real samples in training order, and the hash of each step."""
    ranks = [
        list(
            _rank(
                stream,
                first_sample=7 * BATCH,
                num_steps=STEPS,
                rank=rank,
                num_ranks=num_ranks,
                micro_batch=micro_batch,
                num_workers=num_workers,
            )
        )
        for rank in range(num_ranks)
    ]
    rounds = accumulation(BATCH, num_ranks, micro_batch)
    assert {len(batches) for batches in ranks} == {rounds * STEPS}
    rows = []
    hashes = [0] * STEPS
    for number in range(rounds * STEPS):
        for batches in ranks:
            batch = batches[number]
            hashes[number // rounds] += int(batch["data_hash"])
            for inputs, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                if labels[0] != -100:
                    rows.append([*inputs.tolist(), int(labels[-1])])
    return {"tokens": np.array(rows), "data_hash": [total % 2**64 for total in hashes]}
