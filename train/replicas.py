"""Silent corruption: what every rank should hold alike is compared, and the odd rank is named.

Stage 0 holds weights and optimizer state alike on every rank, stages 1 and 2 the weights that the
forward pass uses, stage 3 its small whole parameters. One hash of all of it goes around (16 bytes a
rank, between the hosts); only where those differ does one per tensor follow. What is sharded has no
copy to compare with: `headrace replay` recomputes it.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import torch
import xxhash

from data.durable import StorageError
from train.engine import Engine
from train.events import record
from train.exclusion import exclude, minority
from train.world import World

log = logging.getLogger(__name__)

EVENT = "replicas differ"


class ReplicasDiffer(ValueError):
    """A rank holds other bits than the rest."""

    exit_code: ClassVar[int] = 1


def check_replicas(engine: Engine, world: World, run: Path, *, step: int, attempt: int) -> None:
    """Collective. ReplicasDiffer on every rank, with the event recorded, when ranks differ.

    Costs a read of what is compared, and on a GPU its copy to the host: 6 to 24 ms, 0.6 to 1.5 % of
    one step, for 5 M parameters on two ranks of a CPU.
    """
    if world.size == 1:
        return
    whole = xxhash.xxh3_128()
    for _, tensor in engine.replicas():
        whole.update(_bytes(tensor))
    if len(set(world.gather(whole.hexdigest()))) == 1:
        return
    own = {name: xxhash.xxh3_64_hexdigest(_bytes(tensor)) for name, tensor in engine.replicas()}
    told, culprits, names = _differences(world.gather(own))
    with world.together("recording that replicas differ"):
        if world.is_main:
            record(run, EVENT, step=step, attempt=attempt, ranks=culprits, names=names)
    hosts = world.gather(world.host)
    if world.is_main and len(culprits) < world.size:
        # A disk that is full must not hide what was found.
        with suppress(OSError, StorageError):
            exclude(run, minority((hosts[rank] for rank in culprits), hosts))
    where = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in culprits)
    raise ReplicasDiffer(
        f"step {step}: {told} ({where}): memory or arithmetic of that machine has failed silently. "
        "Nothing since the last checkpoint can be trusted: take that node out (with Slurm, "
        "--exclude=NODE), and run the same command, which goes on from there; `headrace replay "
        f"{run} --step N` tells whether an earlier step was right"
    )


def _differences(rows: list[dict[str, str]]) -> tuple[str, list[int], list[str]]:
    """What to say, the ranks in the minority (all of them where there is none), the tensors."""
    culprits: set[int] = set()
    names = []
    for name in rows[0]:
        counts = Counter(row[name] for row in rows).most_common()
        if len(counts) == 1:
            continue
        names.append(name)
        # As many against as for: nobody knows who is right.
        tied = counts[0][1] == counts[1][1]
        odd = [r for r, row in enumerate(rows) if tied or row[name] != counts[0][0]]
        culprits.update(odd)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    ranks = sorted(culprits)
    if len(ranks) * 2 > len(rows):
        return (
            f"the ranks {ranks} differ in {shown}, and no majority tells which is wrong",
            ranks,
            names,
        )
    who = " and ".join(map(str, ranks))
    return f"rank {who} differs from the other {len(rows) - len(ranks)} in {shown}", ranks, names


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().reshape(-1).contiguous().cpu()
    return flat.view(torch.uint8).numpy().data
