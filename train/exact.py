"""Data-parallel training whose sums do not depend on how the batch is spread: `train.reproducible =
"across_world_sizes"`.

Floating point gives another sum in another order. Here the gradient of every micro-batch becomes
whole multiples of 2^-44, and those are added as integers: any number of ranks that divides the
batch comes to the same bits. A micro-batch must hold the same samples everywhere, its dropout must
not follow the ranks (train/passes.py), and its kernels must repeat themselves (train/build.py).

Cost: every rank holds all weights, gradients and optimizer state, 8 bytes per parameter for the
integer sum besides, and sends 8 bytes per parameter and step instead of 4. Elements below 2^-45 are
rounded to zero; one beyond 2^18 over the number of micro-batches counts as not finite, which the
guard answers. The loss needs nothing of the kind: sums of fp32 numbers of about one size are exact
in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from train.config import JobConfig
from train.engine import Batch, LossSum, StepStats, whole_gradients, whole_replicas
from train.plain import PlainEngine
from train.world import World
from train.zero_state import Flat

FRACTION_BITS = 44


class ExactEngine:
    """PlainEngine on every rank, with one gradient for all of them."""

    def __init__(
        self, module: torch.nn.Module, config: JobConfig, world: World, *, accumulation: int
    ) -> None:
        self._plain = PlainEngine(module, config, replace(world, rank=0, size=1))
        self.module = self._plain.module
        self.inventory = self._plain.inventory
        self._rank, self._num_ranks = world.rank, world.size
        self._sums = ExactSums(self._plain.parameters(), world, num_terms=accumulation * world.size)

    def forward_backward(self, batch: Batch, *, num_valid: int, loss_sum: LossSum) -> torch.Tensor:
        loss = self._plain.forward_backward(batch, num_valid=num_valid, loss_sum=loss_sum)
        self._sums.take()
        return loss

    def grad_norm(self) -> float:
        self._sums.give()
        return self._plain.grad_norm()

    def step(self, lr: float) -> StepStats:
        self._sums.give()
        return self._plain.step(lr)

    def skip(self) -> None:
        self._sums.give()
        self._plain.skip()

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return whole_gradients(self.flats())

    def replicas(self) -> Iterator[tuple[str, torch.Tensor]]:
        return whole_replicas(self._plain.module, self.flats())

    def lent(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ()

    def flats(self) -> list[Flat]:
        return self._plain.flats(rank=self._rank, num_ranks=self._num_ranks)

    def refresh(self) -> None:
        self._plain.refresh()


class ExactSums:
    """Sums of the gradients of some parameters over micro-batches and ranks."""

    def __init__(self, parameters: Sequence[torch.Tensor], world: World, *, num_terms: int) -> None:
        """`num_terms` micro-batches, over all ranks, are added at most."""
        self._parameters = parameters
        self._world = world
        self._totals = [torch.zeros_like(p, dtype=torch.int64) for p in parameters]
        # Of all terms together, so that no sum leaves 63 bits.
        self._limit = 2.0**62 / num_terms
        self._outside = torch.zeros((), dtype=torch.int64, device=world.device)
        self._has_terms = False

    @torch.no_grad()
    def take(self) -> None:
        """Move what lies in the gradients into the sums."""
        for parameter, total in zip(self._parameters, self._totals, strict=True):
            if parameter.grad is None:
                continue
            scaled = parameter.grad.double().mul_(2.0**FRACTION_BITS)
            # False for NaN, too.
            self._outside += ~(scaled.abs() < self._limit).all()
            total += scaled.round_().to(torch.int64)
            parameter.grad = None
        self._has_terms = True

    @torch.no_grad()
    def give(self) -> None:
        """Collective. Move the sums of all ranks into the gradients; nothing when they are there.

        NaN in all of them when a term was not finite or too large.
        """
        if not self._has_terms:
            return
        for total in (self._outside, *self._totals):
            self._world.add_up(total)
        spoiled = bool(self._outside)
        for parameter, total in zip(self._parameters, self._totals, strict=True):
            found = total.double().mul_(2.0**-FRACTION_BITS).to(parameter.dtype)
            parameter.grad = found.fill_(torch.nan) if spoiled else found
            total.zero_()
        self._outside.zero_()
        self._has_terms = False
