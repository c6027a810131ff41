"""Silent corruption: what every rank should hold alike is compared, and the odd rank is named.

    stage 0          weights, moments, fp32 twins   a flipped bit stays until the next look
    0, 1 with bf16   the reduced gradient           gone with the update: only a look before it
    1 and 2          the weights that are used      rebuilt by every update: as the gradient
    3                its small whole parameters     as at 1 and 2

So a step is looked at before its update, while what it has computed with is there; so is every step
whose loss or gradient the guard finds bad or high, and the state once more before a checkpoint. One
hash of all of it goes around (16 bytes a rank, between the hosts); only where those differ does one
per tensor follow. Bits on a GPU are summed up there.

What is sharded has no copy to compare with, and a term of the gradient that was wrong before it was
added up is in all copies. Some steps are computed twice for that (train/repeat.py); masters and
moments that are sharded, and updates of those, only `headrace replay` computes again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
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
Mark = str | torch.Tensor
"""A hash, or the number on a GPU that one will be made of."""
PIECE = 2**22
"""Numbers of a tensor that are weighed at once."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_GOLDEN = -0x61C8864680B583EB
"""2^64 divided by the golden ratio, as a signed number."""


class ReplicasDiffer(ValueError):
    """A rank holds other bits than the rest."""

    exit_code: ClassVar[int] = 1


def check_replicas(engine: Engine, world: World, run: Path, *, step: int, attempt: int) -> None:
    """Collective. ReplicasDiffer on every rank, with the event recorded, when ranks differ. Not
    between the parts of an update.

    Costs a read of what is compared, where it is: for 10.7 M parameters on two ranks of a CPU 2 to
    13 ms, which every hundred steps of 4,096 tokens is 0.01 % of the training at most
    (tests/benchmarks/check_cost.py).
    """
    if world.size == 1:
        return
    own = in_words({name: [mark(tensor)] for name, tensor in engine.replicas()})
    whole = xxhash.xxh3_128_hexdigest("".join(own.values()).encode())
    if len(set(world.gather(whole))) == 1:
        return
    told, culprits, names = _differences(world.gather(own))
    where = accuse(world, run, culprits, event=EVENT, step=step, attempt=attempt, names=names)
    raise ReplicasDiffer(
        f"step {step}: {told} ({where}): memory or arithmetic of that machine has failed silently. "
        "Nothing since the last checkpoint can be trusted: take that node out (with Slurm, "
        "--exclude=NODE), and run the same command, which goes on from there; `headrace replay "
        f"{run} --step N` tells whether an earlier step was right"
    )


def accuse(
    world: World,
    run: Path,
    ranks: list[int],
    *,
    event: str,
    step: int,
    attempt: int,
    names: list[str],
    is_certain: bool = True,
) -> str:
    """Collective. Record what was found, and keep the run off the hosts of these ranks, if it is
    certain and they are the minority; returns who is where.
    """
    hosts = world.gather(world.host)
    if world.is_main:
        # A disk that is full must not hide what was found.
        try:
            record(run, event, step=step, attempt=attempt, ranks=ranks, names=names)
            if is_certain and len(ranks) < world.size:
                exclude(run, minority((hosts[rank] for rank in ranks), hosts))
        except (OSError, StorageError) as error:
            log.warning("what was found could not be recorded: %s", error)
    # The launcher ends all ranks as soon as one has told.
    world.barrier()
    return ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)


def mark(tensor: torch.Tensor) -> Mark:
    """A hash of its bits, or the number on a GPU that will be one: nothing waits."""
    return xxhash.xxh3_128_hexdigest(_bytes(tensor)) if is_near(tensor) else checksum(tensor)


def in_words(marks: Mapping[str, list[Mark]]) -> dict[str, str]:
    """The marks under each name as one text. One wait for a GPU."""
    far = [one for several in marks.values() for one in several if isinstance(one, torch.Tensor)]
    values = iter(torch.stack(far).tolist() if far else [])
    return {
        name: " ".join(
            f"{next(values) % 2**64:016x}" if isinstance(one, torch.Tensor) else one
            for one in several
        )
        for name, several in marks.items()
    }


def is_near(tensor: torch.Tensor) -> bool:
    """Whether its bytes can be read without a copy."""
    return tensor.device.type == "cpu"


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A number, int64 [], that follows from every bit of a tensor, computed where that is: to copy
    all weights of a GPU to the host every hundred steps would cost more than the bits are worth.

    The sum modulo 2^64 of all numbers, read as integers, times odd factors by place: a flipped bit
    changes it by an odd multiple of a power of two up to 2^31, so always; several cancel out with a
    chance of 2^-33. Integers add up to the same in any order. Memory: 100 MB. Time on a GPU: not
    measured.
    """
    flat = tensor.detach().contiguous()
    # A tensor of one number is contiguous whatever its stride.
    bits = flat.as_strided((flat.numel(),), (1,)).view(_INTEGERS[flat.element_size()])
    places = torch.arange(min(len(bits), PIECE), device=bits.device)
    factors = (places * _GOLDEN).bitwise_right_shift(16).bitwise_xor(places << 1).bitwise_or(1)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for number, first in enumerate(range(0, len(bits), PIECE)):
        piece = bits[first : first + PIECE]
        weighed = piece.to(torch.int64, copy=True).mul_(factors[: len(piece)])
        total += weighed.sum() * (2 * number + 1)
    return total


def shortened(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    shown = shortened(names)
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
