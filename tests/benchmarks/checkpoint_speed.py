"""What a checkpoint costs, beside a plain write and fsync of the same bytes, interleaved.

One rank with ZeRO-1 and AdamW in fp32, a third of a gigabyte of state. `save` waits for the disk,
`unhashed` is a save that leaves out the hashes, and what it saves is what hashing costs; `stall` is
what training stands still for when the save runs beside it, the commit included. The copy of the
state, as long as `copy`, is no part of that while the forward and backward passes of the next step
take longer: `passes`; `beside` is the same with the save beside them, on the same cores. Wall time,
because a disk is waited for; medians.

    .venv/bin/python -m tests.benchmarks.checkpoint_speed
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.bars import Bar, judge
from train import checkpoint, slices
from train.config import JobConfig
from train.engine import DeepSpeedEngine
from train.saver import Saver
from train.settings import CheckpointConfig
from train.slices import WRITE_BYTES
from train.world import World, join_world

WIDTH, LAYERS, ROUNDS = 2048, 7, 21
"""29.4 million parameters: 352 MB of weights and moments."""
TOKENS = 64
"""Of a step."""


def plain_write(path: Path, content: memoryview) -> float:
    """Seconds to write and sync the bytes as a new file, which is then removed."""
    begun = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    rest = content
    while rest:
        rest = rest[os.write(descriptor, rest[:WRITE_BYTES]) :]
    os.fsync(descriptor)
    os.close(descriptor)
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds


def warm(path: Path, content: memoryview) -> None:
    """Write the bytes and give their memory back, on every CPU.

    Memory that a virtual machine has never used costs it three to six times the write, and what was
    given back stays with the CPU that had it: a writer of its own, on the other one, found none of
    it in half of its saves, and a plain write almost always.
    """
    allowed = os.sched_getaffinity(0)
    for cpu in allowed:
        os.sched_setaffinity(0, {cpu})
        plain_write(path, content)
    os.sched_setaffinity(0, allowed)


def copying(source: np.ndarray, target: np.ndarray) -> float:
    """Seconds to copy one into the other."""
    begun = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - begun


@contextmanager
def no_hashes() -> Iterator[None]:
    """Within, a checkpoint gets none."""
    real = slices._Hashes.add
    slices._Hashes.add = lambda self, data: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        slices._Hashes.add = real  # type: ignore[method-assign]


def made(world: World) -> DeepSpeedEngine:
    """An engine that has stepped once, so that it has moments."""
    module = torch.nn.Sequential(
        *(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
    )
    config = JobConfig.model_validate({"precision": "fp32"})
    engine = DeepSpeedEngine(module, config, world, micro_batch=1, accumulation=1)
    passing(engine)
    engine.step(1e-4)
    return engine


def passing(engine: DeepSpeedEngine) -> float:
    """Seconds of a forward and a backward pass."""
    begun = time.perf_counter()
    engine.forward_backward(
        {"x": torch.ones(TOKENS, WIDTH)},
        num_valid=TOKENS,
        loss_sum=lambda m, b: m(b["x"]).square().sum(),
    )
    return time.perf_counter() - begun


def measure(world: World, folder: Path) -> dict[str, float]:
    """Median seconds of each, and the bytes of a checkpoint."""
    engine = made(world)
    size = 3 * 4 * sum(p.numel() for p in engine.engine.module.parameters())
    content = memoryview(os.urandom(2**20) * (size >> 20))
    savers = {
        kind: Saver(engine, world, folder / kind, config=CheckpointConfig(background=background))
        for kind, background in (("save", False), ("stall", True))
    }
    buffers = [np.ones(size // 4, np.float32) for _ in range(2)]
    steps = iter(range(1, 1000))

    def save() -> float:
        begun = time.perf_counter()
        savers["save"].save(next(steps), {})
        return time.perf_counter() - begun

    beside: list[float] = []

    def stall() -> float:
        saver = savers["stall"]
        saver.save(next(steps), {})
        beside.append(passing(engine))
        saver.wait_for_copy()
        engine.step(1e-4)
        while not saver.is_written:
            # As between two steps.
            time.sleep(0.001)
        saver.commit()
        assert saver.committed is not None
        return saver.committed.stall_seconds

    def alone() -> float:
        found = passing(engine)
        engine.step(1e-4)
        return found

    def unhashed() -> float:
        with no_hashes():
            return save()

    cases: dict[str, Callable[[], float]] = {
        "plain": lambda: plain_write(folder / "plain", content),
        "save": save,
        "stall": stall,
        "unhashed": unhashed,
        "copy": lambda: copying(*buffers),
        "passes": alone,
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(ROUNDS + 1):
        for name, case in cases.items():
            warm(folder / "warm", content)
            found = case()
            # The plain file is removed behind the clock, and so is what it is compared with.
            for saver in savers.values():
                saver.finish()
            checkpoint.remove(checkpoint.retire_but(folder / "save", ()))
            # The first round makes the buffers.
            if number:
                seconds[name].append(found)
    seconds["beside"] = beside[1:]
    return {"bytes": float(size), **{n: statistics.median(found) for n, found in seconds.items()}}


def main() -> None:
    """Print the figures; exit code 1 names a bar that is missed."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name, join_world() as world:
        found = measure(world, Path(name))
    megabytes = found["bytes"] / 1e6
    for case in ("plain", "save", "unhashed", "copy"):
        print(f"{case:8} {found[case]:.3f} s  {megabytes / found[case]:8.0f} MB/s")
    for case in ("stall", "passes", "beside"):
        print(f"{case:8} {found[case]:.3f} s")
    bars = [
        Bar(
            "save bandwidth over plain write + fsync", found["plain"] / found["save"], at_least=0.8
        ),
        Bar("hashing, share of a save", 1 - found["unhashed"] / found["save"], below=0.05),
        Bar("stall over a save that waits", found["stall"] / found["save"], below=0.1),
    ]
    for bar in bars:
        print(f"{bar.name}: {bar.value:.3f}")
    sys.exit(judge(bars))


if __name__ == "__main__":
    main()
