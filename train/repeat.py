"""Silent corruption of a gradient: some steps are computed twice, and compared with themselves.

A rank that holds only a part of the reduced gradient has no copy to compare it with, and a term
that was wrong before it was added up is wrong on all ranks (train/replicas.py). So every so many
steps the passes are made, their gradients dropped, and the passes made again, on the same samples
and with the same dropout. Each rank hashes its losses, its own gradients as they come out of the
backward passes, and its part of the reduced one. A rank whose own numbers differ has failed; where
nobody's do, the sum over ranks has.

The step that is taken is the second one, to the bit what it is without a first. Found is what does
not happen twice alike: a machine that errs in the same way every time shows in `headrace replay` on
another one. The kernels must repeat themselves, as those of CPUs do; those of GPUs do with
train.deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch

from train.engine import Engine
from train.replicas import Mark, accuse, in_words, mark, shortened
from train.world import World

EVENT = "repeat differs"

Passes = list[tuple[torch.Tensor, torch.Tensor]]
"""Of every micro-batch its loss, and what goes with it."""


class RepeatDiffers(ValueError):
    """A step that was computed twice has not given the same gradient twice."""

    exit_code: ClassVar[int] = 1


def twice(
    engine: Engine,
    world: World,
    run: Path,
    passes: Callable[[], Passes],
    *,
    step: int,
    attempt: int,
) -> Passes:
    """Collective. What `passes`, the forward and backward passes of a step, return the second time;
    the engine is as after one time. RepeatDiffers on every rank, with the event recorded, where the
    two differ on one.

    Costs the passes of a step and a read of the gradients of both; no memory but for the hashes.
    """
    _, own, reduced = _marked(engine, passes)
    engine.skip()
    done, own_again, reduced_again = _marked(engine, passes)
    odd = (_differing(own, own_again), _differing(reduced, reduced_again))
    if not int(world.sum(torch.tensor(int(any(odd))))):
        return done
    rows: list[tuple[list[str], list[str]]] = world.gather(odd)
    raise RepeatDiffers(_told(world, run, rows, step=step, attempt=attempt))


def _told(
    world: World, run: Path, rows: list[tuple[list[str], list[str]]], *, step: int, attempt: int
) -> str:
    """Collective. Record what was found; returns it in words. `rows` are what differs on each rank:
    of its own numbers, and of its part of the sum.
    """
    # A wrong term is in every part of the sum: who has only that has done nothing wrong.
    which = 0 if any(own for own, _ in rows) else 1
    ranks = [rank for rank, differing in enumerate(rows) if differing[which]]
    names = list(dict.fromkeys(name for rank in ranks for name in rows[rank][which]))
    where = accuse(
        world, run, ranks, event=EVENT, step=step, attempt=attempt, names=names, certain=which == 0
    )
    who, advice = f"rank {' and '.join(map(str, ranks))}", ""
    if which == 1:
        found = f"had another sum over the ranks the second time, of the same terms ({where})"
        cause = "memory, arithmetic or network has failed silently, there or on the way there"
        advice = "look at its memory and its network, and "
    elif 1 < len(ranks) == world.size:
        who, found = "every rank", f"had other numbers the second time, in {shortened(names)}"
        cause = (
            "what all of them use, such as weights gathered from their parts, has changed on one"
        )
    else:
        found = f"had other numbers the second time, in {shortened(names)} ({where})"
        cause = "memory or arithmetic of that machine has failed silently"
        advice = "take that node out (with Slurm, --exclude=NODE), and "
    return (
        f"step {step}, computed twice: {who} {found}: {cause}. Nothing is updated with it, and "
        f"nothing since the last checkpoint can be trusted: {advice}run the same command, which "
        f"goes on from there; `headrace replay {run} --step N` tells whether an earlier step was "
        "right. Should this step always end so, its kernels do not repeat themselves: "
        "guard.repeat_every=0 leaves the look out"
    )


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
