"""mosaicml-streaming at the job of data_speed.py: samples of 2,049 token ids, shuffled, in batches.

It is no dependency: it pins older versions of numpy and torchvision. Where it can be imported (an
environment of its own, or one laid over .venv), data_speed.py measures it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def write_samples(samples: Iterator[NDArray[Any]], folder: Path) -> None:
    """One record of raw bytes per sample, uncompressed: what it reads fastest."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": "bytes"}) as writer:
        for sample in samples:
            writer.write({"tokens": sample.tobytes()})


def read_samples(folder: Path, dtype: str, *, batch: int) -> int:
    """One epoch in its own shuffled order, as int64 tensors; returns the number of targets."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=1, batch_size=batch)
    rows: list[NDArray[np.int64]] = []
    count = 0
    for sample in dataset:
        rows.append(np.frombuffer(sample["tokens"], dtype).astype(np.int64))
        if len(rows) == batch:
            tokens = torch.from_numpy(np.stack(rows))
            count += tokens[:, 1:].numel()
            rows.clear()
    return count
