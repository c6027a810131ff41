"""One optimizer step over a sharded model: DeepSpeed ZeRO 0-3. train/plain.py says what it means.

The gradient of a step is d(sum of token losses)/dw divided by the step's *global* number of valid
tokens, whatever the world size and accumulation. DeepSpeed divides by ranks and by accumulation
instead, so that is multiplied back:

    backward(loss_sum / num_valid * ranks * accumulation)  ->  mean over ranks and micro-batches =
    sum / num_valid

Gradients are reduced and accumulated in fp32. The only module that imports deepspeed, with its
neighbour zero_state.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from data.loader import Batch as Batch
from train.config import ConfigError, JobConfig, Precision
from train.deepspeed_json import deepspeed_json
from train.inventory import Inventory
from train.optim import adamw, clip, finite_or_inf, gradient_norm, inventory_of, set_lr
from train.world import World
from train.zero_state import (
    Flat,
    adds_up_everywhere,
    deepspeed_flats,
    deepspeed_norm,
    partitions,
    plain_flats,
    reduced_gradients,
    refresh_deepspeed,
    replicated,
    spoiled_gradients,
)

log = logging.getLogger(__name__)

LossSum = Callable[[torch.nn.Module, Batch], torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step reports."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping."""


class Engine(Protocol):
    """A model with its optimizer. Parameters keep their own names; sharded state is reached as flat
    fp32 partitions.
    """

    module: torch.nn.Module
    """What `loss_sum` and evaluation call."""
    inventory: Inventory
    """Every parameter of the module, by its own name."""

    def forward_backward(self, batch: Batch, *, num_valid: int, loss_sum: LossSum) -> torch.Tensor:
        """Collective. Add one micro-batch's gradient; returns this rank's loss sum, detached fp32
        scalar.
        """

    def grad_norm(self) -> float:
        """Collective. The gradient norm that `step` will report, before anything is touched; inf
        when a gradient is NaN or infinite. After the last micro-batch of a step only.
        """

    def step(self, lr: float) -> StepStats:
        """Collective. Clip, update, clear the gradients."""

    def skip(self) -> None:
        """Collective. Drop the gradients in place of `step`: weights, optimizer state and every
        copy of them stay, and the next step is as if this one had not been.
        """

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What this rank holds of the step's reduced gradient, after `grad_norm`; views."""

    def replicas(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Named tensors that must be equal, bit for bit, on every rank, until `step` and after
        it.
        """

    def lent(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Named parts of the weights that this rank alone holds, and others compute with; views."""

    def flats(self) -> list[Flat]:
        """This rank's fp32 master partitions and their optimizer state; views, not copies."""

    def refresh(self) -> None:
        """Collective. Make every other copy of the weights follow the master partitions, after they
        were written.
        """


class DeepSpeedEngine:
    """DeepSpeed ZeRO stage 0-3 around any module; same step as PlainEngine at any world size."""

    def __init__(
        self,
        module: torch.nn.Module,
        config: JobConfig,
        world: World,
        *,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        check_precision(config.precision, world.device)
        deepspeed = load_deepspeed(world.device)
        ds_config = deepspeed_json(config, micro_batch=micro_batch, accumulation=accumulation)
        if config.zero.stage == 0:
            # DeepSpeed forgets the norm when it clips at stage 0; the engine clips by itself there.
            ds_config["gradient_clipping"] = 0.0
        self.optimizer = adamw(module, config.optim)
        # Stage 3 takes the shapes away.
        self.inventory = inventory_of(named(module), self.optimizer, config.precision)
        # Some of its optimizers print memory figures; stdout is for results.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=self.optimizer, config=ds_config, dist_init_required=False
            )
        self.module = self.engine
        _, accumulated = self.engine.get_data_types()
        log.debug(
            "%s: gradients reduced in %s, accumulated in %s",
            type(self.engine.optimizer).__name__,
            self.engine.communication_data_type,
            accumulated,
        )
        if {accumulated, self.engine.communication_data_type} != {torch.float32}:
            raise ConfigError(
                f"DeepSpeed would accumulate gradients in {accumulated} and reduce them in "
                f"{self.engine.communication_data_type}; both must be fp32: look at [deepspeed]"
            )
        self._stage = config.zero.stage
        self._clip_norm = config.optim.clip_norm
        self._scale = world.size * accumulation
        self._rank = world.rank
        self._world_size = world.size
        self._norm: torch.Tensor | None = None

    def forward_backward(self, batch: Batch, *, num_valid: int, loss_sum: LossSum) -> torch.Tensor:
        loss = loss_sum(self.engine, to_device(batch, self.engine.device))
        self.engine.backward(loss * (self._scale / num_valid))
        # Counts the micro-batch; updates only after the last one of the step.
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
        return loss.detach()

    def grad_norm(self) -> float:
        if self._stage == 0:
            self._norm = gradient_norm(self._with_gradient())
            return finite_or_inf(self._norm)
        return finite_or_inf(deepspeed_norm(self.engine.optimizer))

    def step(self, lr: float) -> StepStats:
        set_lr(self.optimizer, lr)
        norm = None
        if self._stage == 0:
            norm = clip(self._with_gradient(), self._clip_norm, self._norm)
            self._norm = None
        self.engine.step()
        return StepStats(
            grad_norm=float(self.engine.get_global_grad_norm()) if norm is None else norm
        )

    def skip(self) -> None:
        if self._stage == 0:
            self._norm = None
            self.engine.zero_grad()
            # The micro-batch was computed: else every later step would end one too early.
            self.engine.micro_steps += 1
            return
        # DeepSpeed itself drops a step with a gradient that is no number, and counts it.
        with spoiled_gradients(self.engine.optimizer):
            self.engine.step()
        assert not self.engine.was_step_applied()

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._stage == 0:
            return whole_gradients(self.flats())
        found = reduced_gradients(self.engine.optimizer)
        return ((f"gradient (part {number})", grad) for number, grad in enumerate(found, 1))

    def replicas(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._stage == 3:
            yield from replicated(self.engine.optimizer, _names(self.engine.module))
            return
        yield from whole_replicas(self.engine.module, self.flats() if self._stage == 0 else [])
        if self._stage > 0 and adds_up_everywhere(self.engine.optimizer):
            yield from self.gradients()

    def lent(self) -> Iterator[tuple[str, torch.Tensor]]:
        return partitions(named(self.engine.module)) if self._stage == 3 else iter(())

    def _with_gradient(self) -> list[torch.Tensor]:
        return [p for p in self.engine.module.parameters() if p.grad is not None]

    def flats(self) -> list[Flat]:
        if self._stage == 0:
            return plain_flats(
                named(self.engine.module),
                self.optimizer,
                rank=self._rank,
                num_ranks=self._world_size,
            )
        return deepspeed_flats(self.engine.optimizer, _names(self.engine.module), rank=self._rank)

    def refresh(self) -> None:
        if self._stage > 0:
            refresh_deepspeed(self.engine.optimizer)


def load_deepspeed(device: torch.device) -> Any:
    """The library, without what it would compile by itself."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    if device.type == "cpu":
        # Else it compiles a C++ all-reduce for inference at start: 86 s, and a failure without a
        # compiler. Merely to read what it could compile starts a compiler, too.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # Every engine imports its Muon, which nothing here uses, and whose decorator loads all of
    # torch's compiler: 1.0 of the 4.2 CPU-seconds that a rank takes to its first step.
    compiler.compile = lambda: compiler.dummy_decorator
    return deepspeed


def whole_replicas(
    module: torch.nn.Module, flats: list[Flat]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, and the fp32 twins, optimizer state and reduced gradients of `flats`, all of
    which every rank holds whole.
    """
    weights = named(module)
    yield from weights.items()
    own = {id(weight) for weight in weights.values()}
    for flat in flats:
        for key, tensor in flat.tensors().items():
            if key != "param" or id(flat.master) not in own:
                yield f"{flat.fragments[0].name} ({key})", tensor
    yield from whole_gradients(flats)


def whole_gradients(flats: list[Flat]) -> Iterator[tuple[str, torch.Tensor]]:
    """The reduced gradients of `flats`, which every rank holds whole."""
    for flat in flats:
        if flat.master.grad is not None:
            yield f"{flat.fragments[0].name} (gradient)", flat.master.grad


def check_precision(precision: Precision, device: torch.device) -> None:
    """ConfigError for a precision that cannot be trusted on this device."""
    if precision == "fp16":
        where = (
            "on a CPU, which has no fp16 kernels"
            if device.type == "cpu"
            else "until its loss scaler has a resume test"
        )
        raise ConfigError(
            f"precision='fp16' is refused {where}; write precision=bf16, or precision=fp32"
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the model is."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def named(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name."""
    return dict(module.named_parameters())


def _names(module: torch.nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in module.named_parameters()}
