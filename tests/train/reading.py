"""A process that reads what a rank of a history is to read.

It imports no pytest, which would cost every process that takes the place of a killed one a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

import data.order
from data.loader import micro_batches
from data.phases import Phases
from data.stream import SampleStream

BLOCK, WINDOW = 128, 256
"""Windows of two blocks, so that a few hundred tokens have several."""


class SmallWindows(SampleStream):
    """A stream that brings its windows along, to ranks and to their loader processes."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        data.order.WINDOW_TOKENS = WINDOW
        self.__dict__.update(state)


@dataclass(frozen=True)
class Reading:
    """What one rank is to read, and by how many loader processes."""

    stream: SmallWindows
    phases: Phases
    first: int
    last: int
    rank: int
    num_ranks: int
    micro_batch: int
    num_micro: int
    num_workers: int


@dataclass(frozen=True)
class Micro:
    """What a rank has read of one micro-batch: the tokens of its real samples."""

    tokens: NDArray[np.int64]
    data_hash: int


def read(pipe: Connection) -> None:
    """A rank: reads what it is told and hands on every micro-batch.

    Its loader processes come from a fork server of its own: one that a killed rank was just asking
    for a process ends of it, in Python 3.11, and would take the others' with it.
    """
    while True:
        job: Reading = pipe.recv()
        for start, end, phase in job.phases.segments(job.first, job.last):
            for batch in micro_batches(
                job.stream.at(phase.seq_len),
                first_sample=job.phases.samples(start)[0],
                batch_samples=phase.batch_samples,
                num_steps=end - start + 1,
                rank=job.rank,
                num_ranks=job.num_ranks,
                micro_batch=job.micro_batch,
                num_micro=job.num_micro,
                num_workers=job.num_workers,
            ):
                labels = batch["labels"].numpy()
                tokens = np.concatenate([batch["input_ids"].numpy(), labels[:, -1:]], axis=1)
                pipe.send(Micro(tokens[labels[:, 0] >= 0], int(batch["data_hash"])))
        pipe.send(None)
