"""One optimizer step in plain torch, on one process: what every other engine is held against.

The gradient of a step is d(sum of token losses)/dw divided by the step's *global* number of valid
tokens. Weights of low precision have fp32 twins, which the optimizer updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from train.config import ConfigError, JobConfig
from train.engine import (
    DTYPES,
    Batch,
    LossSum,
    StepStats,
    check_precision,
    named,
    to_device,
    whole_gradients,
)
from train.optim import adamw, clip, finite_or_inf, gradient_norm, inventory_of, set_lr
from train.settings import OptimConfig
from train.world import World
from train.zero_state import Flat, plain_flats

MakeOptimizer = Callable[[torch.nn.Module, OptimConfig], torch.optim.Optimizer]


class PlainEngine:
    """The reference that defines what a step means."""

    def __init__(
        self,
        module: torch.nn.Module,
        config: JobConfig,
        world: World,
        *,
        make_optimizer: MakeOptimizer = adamw,
    ) -> None:
        if world.size != 1:
            raise ConfigError(
                f"PlainEngine runs on one rank, this world has {world.size}; use DeepSpeedEngine"
            )
        check_precision(config.precision, world.device)
        low = config.precision != "fp32"
        self.module = module.to(world.device, DTYPES[config.precision] if low else None)
        self._clip_norm = config.optim.clip_norm
        self._device = world.device
        self._masters = _MasterCopy(self.module) if low else None
        self.optimizer = make_optimizer(self._masters or self.module, config.optim)
        parameters = self._masters.masters() if self._masters else named(self.module)
        self.inventory = inventory_of(parameters, self.optimizer, config.precision)
        self._norm: torch.Tensor | None = None

    def forward_backward(self, batch: Batch, *, num_valid: int, loss_sum: LossSum) -> torch.Tensor:
        loss = loss_sum(self.module, to_device(batch, self._device))
        torch.autograd.backward(loss / num_valid)
        if self._masters is not None:
            self._masters.take_gradients()
        return loss.detach()

    def grad_norm(self) -> float:
        self._norm = gradient_norm(self.parameters())
        return finite_or_inf(self._norm)

    def step(self, lr: float) -> StepStats:
        norm = clip(self.parameters(), self._clip_norm, self._norm)
        self._norm = None
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.refresh()
        return StepStats(grad_norm=norm)

    def skip(self) -> None:
        self._norm = None
        self.optimizer.zero_grad()

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return whole_gradients(self.flats())

    def replicas(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ()

    def lent(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ()

    def parameters(self) -> list[torch.Tensor]:
        """The fp32 tensors that the optimizer updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def flats(self, *, rank: int = 0, num_ranks: int = 1) -> list[Flat]:
        masters = self._masters.masters() if self._masters else named(self.module)
        return plain_flats(masters, self.optimizer, rank=rank, num_ranks=num_ranks)

    def refresh(self) -> None:
        if self._masters is not None:
            self._masters.write_back()


class _MasterCopy(torch.nn.Module):
    """fp32 twins of a low-precision module's parameters, with fp32 gradient accumulation."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._low = dict(module.named_parameters())
        # ParameterList, because names with dots are not allowed as attributes.
        self.twins = torch.nn.ParameterList(p.detach().float().clone() for p in self._low.values())

    def masters(self) -> dict[str, torch.Tensor]:
        return dict(zip(self._low, self.twins, strict=True))

    @torch.no_grad()
    def take_gradients(self) -> None:
        for low, master in zip(self._low.values(), self.twins, strict=True):
            if low.grad is not None:
                master.grad = (
                    low.grad.float() if master.grad is None else master.grad.add_(low.grad)
                )
                low.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        torch._foreach_copy_(list(self._low.values()), list(self.twins))
