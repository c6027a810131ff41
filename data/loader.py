"""Micro-batches of a sample stream for one data-parallel rank, the same whatever the layout.

Step s of a run covers samples [C, C + G). Micro-batch m of rank r of R, with b samples each, covers
C + (m*R + r)*b + [0, b); places beyond the batch are dummies. Laid side by side over ranks and then
micro-batches, that is the order of the samples for every R, b and number of loader processes.
A batch is a pure function of its number, so loader processes hold no state and nothing is lost when
a run stops with batches in flight.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from data.boundaries import (
    document_ids,
    mask_first_tokens,
    mask_parts,
    positions_in_documents,
)
from data.config import Boundaries, DataError, OnDamage, accumulation
from data.order import Ints
from data.signals import STOP_SIGNALS
from data.stream import SampleStream as SampleStream
from data.stream import sample_hash as sample_hash
from data.targets import NO_TARGET

# B samples of a micro-batch, T tokens of a sample
PREFETCHED = 4
"""Micro-batches that a loader process keeps ready."""
LOCATED = (64, 512)
"""Micro-batches whose samples are looked up in the order at once: at first, and further on."""

log = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]
Arrays = dict[str, NDArray[Any]]
Loaded = tuple[Arrays, frozenset[str]]
"""A batch as it is handed over, and the damage that samples of it touch. Arrays and not tensors:
those would travel through /dev/shm, which containers keep small, with a message for each.
"""


def micro_batches(
    stream: SampleStream,
    *,
    first_sample: int,
    batch_samples: int,
    num_steps: int,
    rank: int,
    num_ranks: int,
    micro_batch: int,
    num_micro: int | None = None,
    num_workers: int = 0,
    boundaries: Boundaries = "ignore",
    on_damage: OnDamage = "fail",
) -> Iterator[Batch]:
    """The micro-batches of one rank in training order, accumulation * num_steps of them.

    `num_micro` asks for more micro-batches per step than the batch needs; those are dummies.

    Each holds int64 tensors: input_ids, labels and position_ids [B,T], labels already shifted
    (labels[t] is the target of input t; -100 where there is none), and data_hash, a scalar: the sum
    of the hashes of the real samples, modulo 2^64, as a signed number. `boundaries` changes labels
    and positions by data/boundaries.py, never the samples; "attention" adds doc_ids [B,T]. In
    samples of a best-fit plan the first token of a part and padding are never targets.
    With on_damage="quarantine" a sample that touches damage is zeros without a target, and
    `quarantined`, a scalar, counts those of the batch; otherwise, and for everything that cannot be
    read for another reason, DataError, also when a loader process found it.
    """
    assert 0 <= rank < num_ranks, "a rank of the data-parallel group"
    plan = Plan(
        stream=stream,
        first_sample=first_sample,
        batch_samples=batch_samples,
        rank=rank,
        num_ranks=num_ranks,
        micro_batch=micro_batch,
        num_micro=num_micro or accumulation(batch_samples, num_ranks, micro_batch),
        num_steps=num_steps,
        boundaries=boundaries,
        on_damage=on_damage,
    )
    if num_workers == 0:
        return _batches(plan, (plan.load(number) for number in range(len(plan))))
    return _batches(plan, _from_workers(plan, num_workers))


@dataclass(frozen=True)
class Plan(Dataset[Any]):
    """Micro-batches by number, counted over the steps: a map-style torch dataset."""

    stream: SampleStream
    first_sample: int
    batch_samples: int
    rank: int
    num_ranks: int
    micro_batch: int
    num_micro: int
    num_steps: int
    boundaries: Boundaries = "ignore"
    on_damage: OnDamage = "fail"
    _located: dict[int, list[tuple[Ints, Ints, Ints]]] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return self.num_micro * self.num_steps

    def __getitem__(self, number: int) -> Loaded | DataError:
        # Handed over as a value: torch would wrap an exception in the worker's whole traceback.
        try:
            return self.load(number)
        except DataError as error:
            return error

    def samples(self, number: int) -> Ints:
        """The samples of a micro-batch; fewer than micro_batch at the end of a step."""
        step, micro = divmod(number, self.num_micro)
        first = (micro * self.num_ranks + self.rank) * self.micro_batch
        places = np.arange(first, first + self.micro_batch, dtype=np.int64)
        real: Ints = places[places < self.batch_samples]
        return real + (self.first_sample + step * self.batch_samples)

    def _locate(self, number: int) -> tuple[Ints, Ints, Ints]:
        """Samples of a micro-batch, their sources and offsets. Many are located together: a call
        of the order costs as much as 300 samples.
        """
        size = min(max(1 << number.bit_length() >> 1, LOCATED[0]), LOCATED[1])
        first = number - number % size
        if first not in self._located:
            parts = [self.samples(n) for n in range(first, min(first + size, len(self)))]
            sources, _, offsets = self.stream.locate(np.concatenate(parts))
            cuts = np.cumsum([len(part) for part in parts])[:-1]
            found = zip(parts, np.split(sources, cuts), np.split(offsets, cuts), strict=True)
            self._located.clear()
            self._located[first] = list(found)
        return self._located[first][number - first]

    def load(self, number: int) -> Loaded:
        samples, sources, offsets = self._locate(number)
        damaged: dict[int, str] | None = {} if self.on_damage == "quarantine" else None
        tokens = self.stream.read(sources, offsets, damaged)
        num_dummies = self.micro_batch - len(samples)
        input_ids_BT = tokens[:, :-1].astype(np.int64)
        labels_BT = tokens[:, 1:].astype(np.int64)
        if damaged:
            labels_BT[list(damaged)] = NO_TARGET
        if num_dummies:
            padding = ((0, num_dummies), (0, 0))
            input_ids_BT = np.pad(input_ids_BT, padding)
            labels_BT = np.pad(labels_BT, padding, constant_values=NO_TARGET)
        total = sum(map(sample_hash, samples.tolist(), tokens)) % 2**64
        arrays: Arrays = {"input_ids": input_ids_BT, "labels": labels_BT}
        doc_ids_BT = self._documents(labels_BT, input_ids_BT, sources, offsets)
        if self.boundaries == "attention" and doc_ids_BT is not None:
            arrays["doc_ids"] = doc_ids_BT
            arrays["position_ids"] = positions_in_documents(doc_ids_BT)
        arrays["data_hash"] = np.array(total - 2**64 if total >= 2**63 else total)
        if damaged is not None:
            arrays["quarantined"] = np.array(len(damaged))
        return arrays, frozenset((damaged or {}).values())

    def _documents(
        self, labels_BT: Ints, input_ids_BT: Ints, sources: Ints, offsets: Ints
    ) -> Ints | None:
        """Take the targets that are none out of the labels; the documents of the inputs, where the
        samples' packing or boundaries want them known.
        """
        if self.stream.packing == "best_fit":
            lens = [parts.lens for parts in self.stream.parts(sources, offsets)]
            return mask_parts(labels_BT, lens)
        if self.boundaries == "ignore":
            return None
        mask_first_tokens(labels_BT, input_ids_BT, eos_id=self.stream.eos_id)
        if self.boundaries == "labels":
            return None
        return document_ids(input_ids_BT, eos_id=self.stream.eos_id)


def _same(found: Any) -> Any:
    return found


def _batches(plan: Plan, found: Iterator[Loaded]) -> Iterator[Batch]:
    """The batches as tensors, with a warning for all damage that this process has not warned of."""
    stream = plan.stream
    # One row for all of them.
    straight = torch.arange(stream.seq_len).expand(plan.micro_batch, -1)
    for arrays, damage in found:
        for what in sorted(damage - stream.told):
            log.warning("quarantined, samples that touch it train nothing: %s", what)
        stream.told |= damage
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch.setdefault("position_ids", straight)
        yield batch


def _from_workers(plan: Plan, num_workers: int) -> Iterator[Loaded]:
    # A fork server is a fresh process: workers inherit neither threads nor a GPU from the trainer.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader: DataLoader[Any] = DataLoader(
        plan,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=PREFETCHED,
        collate_fn=_same,
        multiprocessing_context=context,
        worker_init_fn=_end_with_parent,
    )
    with _deaf():
        batches = iter(loader)
    # To take a batch over costs milliseconds of messages; a thread does it during the step before.
    ahead = ThreadPoolExecutor(1, "loader")
    try:
        coming = ahead.submit(next, batches, None)
        while (found := _taken(coming)) is not None:
            coming = ahead.submit(next, batches, None)
            yield found
    finally:
        ahead.shutdown(cancel_futures=True)


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started in here hear none of STOP_SIGNALS: the trainer needs batches until
    the ranks have agreed to stop. They inherit what is blocked; a handler would be lost.
    """
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # It ignores SIGINT and SIGTERM by itself, and lets them through here where it is started.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _end_with_parent(_number: int) -> None:
    """In a loader process: end when the trainer does, however it ends, and when it says so.

    torch only sees that the fork server ends, and that waits for the loader processes.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a loader process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    def obey() -> None:
        # With SIGTERM torch ends a process that lingers. From anybody else it is for the trainer.
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent.pid:
            pass
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=obey, name="signals", daemon=True).start()


def _taken(coming: Future[Loaded | DataError | None]) -> Loaded | None:
    """What a loader process has brought; None at the end. Raises the DataError that it met."""
    try:
        found = coming.result()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a loader process died ({error}); when memory ran out, lower data.num_workers "
            "(0 reads in the training process)"
        ) from error
    if isinstance(found, DataError):
        raise found
    return found
