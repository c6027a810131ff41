"""What only ranks together can measure before a run: arithmetic, disk and network at once.

All ranks measure at the same time, as they train, and the best of a few tries counts: what disturbs
one try alone is no property of a node. Rates of an all-reduce are 2 (n - 1) / n x bytes / seconds,
what each of n ranks sends. Cost: under 10 s on two CPU ranks; on GPUs not measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from train.ceiling import matmul_flops_per_second
from train.world import Group, World

TRIES = 5
MATMUL_SECONDS = 0.2
DISK_BYTES = 2**26
ALL_PAIRS = 8
"""Up to so many nodes every pair is tried; of more, each node with NUM_PARTNERS others."""
NUM_PARTNERS = 3


@dataclass(frozen=True)
class Measured:
    """What this rank has measured; a node's own by its first rank alone."""

    matmul: float
    disk: float | None
    disk_problem: str
    skew_seconds: float
    pairs: dict[str, float]
    all_reduce: float | None


def num_gpus() -> int:
    """GPUs that this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def measure(world: World, folder: Path, enter: Callable[[str], None]) -> Measured:
    """Collective. Measure this rank, its disk at `folder` and its network; `enter` hears of each
    phase.
    """
    enter("matmul")
    world.barrier()
    dtype = torch.float32 if world.device.type == "cpu" else torch.bfloat16
    matmul = max(
        matmul_flops_per_second(world.device, dtype, seconds=MATMUL_SECONDS) for _ in range(TRIES)
    )
    enter("disk")
    world.barrier()
    disk, problem = None, ""
    if world.local_rank == 0:
        try:
            disk = _write_rate(folder / f".disk-{world.rank:05d}")
        except OSError as error:
            problem = f"{folder} cannot be written: {error.strerror}"
    enter("network")
    world.barrier()
    return Measured(
        matmul, disk, problem, _skew(world), _pair_rates(world), _all_reduce_rate(world, None)
    )


def rounds_of(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of nodes, round by round; no node is in two pairs of a round, none is tried twice with
    the same other one.
    """
    # The circle method: one stays, the others move on by a place each round.
    places = list(range(num_nodes + num_nodes % 2))
    num_rounds = len(places) - 1 if num_nodes <= ALL_PAIRS else NUM_PARTNERS
    rounds = []
    for _ in range(num_rounds if num_nodes > 1 else 0):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(min(p), max(p)) for p in pairs if max(p) < num_nodes])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def _pair_rates(world: World) -> dict[str, float]:
    """Collective. The rate with each node that this one is tried with, over all ranks of both."""
    hosts = world.gather(world.host)
    names = list(dict.fromkeys(hosts))
    ranks = [[rank for rank, host in enumerate(hosts) if host == name] for name in names]
    own = names.index(world.host)
    rates = {}
    for pairs in rounds_of(len(names)):
        parts = [ranks[first] + ranks[second] for first, second in pairs]
        with world.groups(parts) as group:
            world.barrier()
            for first, second in pairs:
                if own in (first, second):
                    rate = _all_reduce_rate(world, group, len(ranks[first] + ranks[second]))
                    rates[names[first + second - own]] = rate or 0.0
    return rates


def _all_reduce_rate(world: World, group: Group | None, size: int = 0) -> float | None:
    """Collective. Bytes/s over the ranks of a group, or of all; None for a single rank."""
    size = size or world.size
    if size == 1:
        return None
    num_bytes = 2**28 if world.device.type == "cuda" else 2**24
    values = torch.ones(num_bytes // 4, device=world.device)
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        world.add_up(values, group)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - start)
        values.fill_(1.0)
    return 2 * (size - 1) / size * num_bytes / min(seconds)


def _write_rate(path: Path) -> float:
    """Bytes/s of a file that is written and synced, in the best of two tries."""
    piece = os.urandom(2**20)
    seconds = []
    try:
        for _ in range(2):
            start = time.perf_counter()
            with path.open("wb", buffering=0) as file:
                for _ in range(DISK_BYTES // len(piece)):
                    file.write(piece)
                os.fsync(file.fileno())
            seconds.append(time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)
    return DISK_BYTES / min(seconds)


def _skew(world: World) -> float:
    """Collective. By how much this clock is ahead of rank 0's; as exact as a barrier ends on all
    ranks at once.
    """
    found: list[float] = []
    for _ in range(TRIES):
        world.barrier()
        times = world.gather(time.time())
        found.append(times[world.rank] - times[0])
    return median(found)
