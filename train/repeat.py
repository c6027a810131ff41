"""Silent corruption of a gradient: some steps are computed twice, and compared with themselves.

A rank that holds only a part of the reduced gradient has no copy to compare it with, and a term
that was wrong before it was added up is wrong on all ranks (train/replicas.py). So every so many
steps the passes are made, their gradients dropped, and the passes made again, on the same samples
and with the same dropout. Each rank hashes the weights that others gather from it, its own losses
and gradients as they come out of the backward passes, and its part of the reduced gradient. Who has
failed is told by the first of these that differs on any rank: wrong weights make wrong gradients,
on whichever rank they matter, and one of those a wrong sum on all. Where weights are gathered, a
rank whose own numbers differ may have been sent wrong ones.

The step that is taken is the second one, to the bit what it is without a first. Found is what
happens in this step, and in one of the two only: a NaN there is no bad step, but a machine that
fails. One that errs in the same way every time shows in `headrace replay` on another. The kernels
must repeat themselves: those of CPUs do, on GPUs TrainConfig.repeats keeps to such, and without it
no step is made twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from train.engine import Engine
from train.replicas import Mark, accuse, in_words, mark, shortened
from train.world import World

EVENT = "repeat differs"

Passes = list[tuple[torch.Tensor, torch.Tensor]]
"""Of every micro-batch its loss, and what goes with it."""


class RepeatDiffers(ValueError):
    """A step that was computed twice has not given the same numbers twice."""

    exit_code: ClassVar[int] = 1


class _Odd(NamedTuple):
    """Names of what differs on a rank, in the order in which one makes the next differ."""

    lent: list[str]
    own: list[str]
    reduced: list[str]


FOUND = {
    "lent": "held other weights, which the others gather, the second time",
    "own": "had other numbers the second time",
    "reduced": "had another sum over the ranks the second time",
}


def twice(
    engine: Engine,
    world: World,
    run: Path,
    first: Callable[[], Passes],
    again: Callable[[], Passes],
    *,
    step: int,
    attempt: int,
) -> tuple[Passes, float]:
    """Collective. What `again` returns, which makes the same forward and backward passes of a step
    as `first` did before, and the seconds that the first time took; the engine is as after one of
    them. RepeatDiffers on every rank, with the event recorded, where the two differ on one.

    Costs those passes, an update that is given up, the norm of both gradients, and a read of what
    is hashed; of memory what a checksum takes on a GPU (train/replicas.py), within the backward
    passes.
    """
    # Who is late is late in the step, and not in what comes on top.
    world.barrier()
    begun = time.perf_counter()
    lent = _lent(engine)
    _, own, reduced = _marked(engine, first)
    engine.skip()
    lent_between = _lent(engine)
    seconds = time.perf_counter() - begun
    done, own_again, reduced_again = _marked(engine, again)
    odd = _Odd(
        lent=_differing(lent, lent_between) or _differing(lent, _lent(engine)),
        own=_differing(own, own_again),
        reduced=_differing(reduced, reduced_again),
    )
    if int(world.sum(torch.tensor(int(any(odd))))):
        rows: list[_Odd] = world.gather(odd)
        told = _told(world, run, rows, is_gathered=bool(lent), step=step, attempt=attempt)
        raise RepeatDiffers(told)
    return done, seconds


def _told(
    world: World, run: Path, rows: list[_Odd], *, is_gathered: bool, step: int, attempt: int
) -> str:
    """Collective. Record what was found on which rank; returns it in words."""
    kind = next(kind for kind in FOUND if any(getattr(odd, kind) for odd in rows))
    by_rank: list[list[str]] = [getattr(odd, kind) for odd in rows]
    ranks = [rank for rank, names in enumerate(by_rank) if names]
    names = list(dict.fromkeys(name for names in by_rank for name in names))
    is_certain = kind == "lent" or (kind == "own" and not is_gathered)
    place = {"step": step, "attempt": attempt}
    who = accuse(world, run, ranks, event=EVENT, names=names, is_certain=is_certain, **place)
    advice = ""
    if 1 < len(ranks) == world.size:
        who = "every rank"
        cause = "what all of them were sent was wrong, or kernels do not repeat themselves"
    elif is_certain:
        cause = "memory or arithmetic there has failed silently"
        advice = "take that node out (with Slurm, --exclude=NODE), and "
    else:
        cause = "memory, arithmetic or network has failed silently, there or where it was sent from"
    return (
        f"step {step}, computed twice: {who} {FOUND[kind]}, in {shortened(names)}: {cause}. "
        "Nothing is updated with it, and the steps before were not looked at so: "
        f"{advice}run the same command, which goes on from the last checkpoint; `headrace replay "
        f"{run} --step N` tells whether an earlier step was right. Should it end so on other "
        "machines, too, its kernels do not repeat themselves: guard.repeat_every=0 leaves the look "
        "out"
    )


def _lent(engine: Engine) -> dict[str, str]:
    return in_words({name: [mark(tensor)] for name, tensor in engine.lent()})


def _marked(
    engine: Engine, passes: Callable[[], Passes]
) -> tuple[Passes, dict[str, str], dict[str, str]]:
    """Collective. Make the passes; hashes of this rank's own terms, and of its part of the sum."""
    with _own_terms(engine) as terms:
        done = passes()
    terms |= {f"loss of micro-batch {n}": [mark(loss)] for n, (loss, _) in enumerate(done, 1)}
    # Where sums are integers, that brings them into the gradients.
    engine.grad_norm()
    reduced = {name: [mark(tensor)] for name, tensor in engine.gradients()}
    return done, in_words(terms), in_words(reduced)


@contextmanager
def _own_terms(engine: Engine) -> Iterator[dict[str, list[Mark]]]:
    """Marks of every parameter's gradient, one for each backward pass inside, before it is reduced
    or accumulated.
    """
    found: dict[str, list[Mark]] = {name: [] for name in engine.inventory}

    def keeping(name: str) -> Callable[[torch.Tensor], None]:
        return lambda gradient: found[name].append(mark(gradient))

    # Under the names of its own: DeepSpeed's wrapper prefixes them.
    parameters = zip(engine.inventory, engine.module.parameters(), strict=True)
    hooks = [
        parameter.register_hook(keeping(name))  # type: ignore[no-untyped-call]
        for name, parameter in parameters
        if parameter.requires_grad
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _differing(first: dict[str, str], second: dict[str, str]) -> list[str]:
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]
