"""Where DeepSpeed keeps the fp32 weights and optimizer state of this rank, as flat tensors with
named ranges.

Every private attribute of DeepSpeed 0.19 that the checkpoint relies on is named in this file and in
PRIVATE, so that a new release that renames one fails in a test and not in a resume. Reading costs
nothing: tensors are views of the live state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

PRIVATE = {
    "BF16_Optimizer": (
        "bf16_groups",
        "fp32_groups_flat_partition",
        "fp32_groups_gradients_flat",
        "get_grads_for_norm",
        "update_lp_params",
        "optimizer",
    ),
    "DeepSpeedZeroOptimizer": (
        "round_robin_bit16_groups",
        "round_robin_bit16_offsets",
        "single_partition_of_fp32_groups",
        "averaged_gradients",
        "scaled_global_norm",
        "loss_scale",
        "update_lp_params",
        "optimizer",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "persistent_parameters",
        "averaged_gradients",
        "_get_norm_groups",
        "loss_scale",
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
        "_reassign_or_swap_out_partitioned_parameters",
        "optimizer",
    ),
}
"""DeepSpeed's optimizer classes and the attributes of each that are read or called here."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of a flattened parameter, lying at `offset` of a flat
    tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    offset: int


@dataclass(frozen=True)
class Flat:
    """One fp32 master partition of this rank, its optimizer state, and what lies where in it.

    `fragments` is all that this rank holds; `owned` the part that it writes into a checkpoint (they
    differ only where state is replicated).
    """

    master: torch.Tensor
    state: dict[str, Any]
    fragments: tuple[Fragment, ...]
    owned: tuple[Fragment, ...]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Flat tensors by kind: `param`, and every optimizer state of the same size, discovered and
        not listed.
        """
        found = {"param": self.master.detach().view(-1)}
        for key, value in self.state.items():
            if torch.is_tensor(value) and value.numel() == self.master.numel() and value.dim() > 0:
                found[key] = value.view(-1)
        return found

    def scalars(self) -> dict[str, float]:
        """Optimizer state with one value for the whole partition, such as AdamW's `step`."""
        flat = self.tensors()
        return {key: float(value) for key, value in self.state.items() if key not in flat}

    def prepare(self, keys: Iterable[str], scalars: Mapping[str, float]) -> None:
        """Give the optimizer the state that a load will fill, and none besides: one that has
        stepped is as new where what is loaded has nothing.
        """
        for key in self.state.keys() - {*keys, *scalars}:
            del self.state[key]
        for key in keys:
            if key not in self.state:
                self.state[key] = torch.zeros_like(self.master, requires_grad=False)
        for key, value in scalars.items():
            # The fused kernels want the count beside the parameter.
            self.state[key] = torch.tensor(value, dtype=torch.float32, device=self.master.device)


def plain_flats(
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> list[Flat]:
    """One flat per parameter, held by every rank; rank r of R owns elements [n*r/R, n*(r+1)/R) of
    each.
    """
    flats = []
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        size = parameter.numel()
        first, last = size * rank // num_ranks, size * (rank + 1) // num_ranks
        whole = Fragment(name, tuple(parameter.shape), 0, size, 0)
        owned = Fragment(name, tuple(parameter.shape), first, last - first, first)
        flats.append(
            Flat(parameter, optimizer.state[parameter], (whole,), (owned,) if last > first else ())
        )
    return flats


def deepspeed_flats(optimizer: Any, names: Mapping[int, str], *, rank: int) -> list[Flat]:
    """The flat partitions of a ZeRO optimizer of stage 1, 2 or 3 on this rank."""
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        places = [_stage3_fragments(group, names, rank) for group in optimizer.fp16_groups]
        masters = optimizer.fp32_partitioned_groups_flat
    elif kind == "BF16_Optimizer":
        masters = optimizer.fp32_groups_flat_partition
        places = [
            _stage12_fragments(group, _running_offsets(group), names, rank, master.numel())
            for group, master in zip(optimizer.bf16_groups, masters, strict=True)
        ]
    elif kind == "DeepSpeedZeroOptimizer":
        masters = optimizer.single_partition_of_fp32_groups
        places = [
            _stage12_fragments(group, offsets, names, rank, master.numel())
            for group, offsets, master in zip(
                optimizer.round_robin_bit16_groups,
                optimizer.round_robin_bit16_offsets,
                masters,
                strict=True,
            )
        ]
    else:
        raise TypeError(f"{kind} has no save and load test; known are {', '.join(PRIVATE)}")
    state = optimizer.optimizer.state
    return [
        Flat(master, state[master], fragments, fragments)
        for master, fragments in zip(masters, places, strict=True)
    ]


@torch.no_grad()
def deepspeed_norm(optimizer: Any) -> torch.Tensor:
    """Collective. The gradient norm that the optimizer's step is going to find; below zero or not
    finite when a gradient is no number.

    The step computes it once more: one more pass over this rank's gradients, and one more reduction
    of a number per parameter group; 0.4 to 1.6 % of a step of 5 M parameters on two ranks of a CPU.
    The functions are the step's own, so the bits are the same.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

    kind = type(optimizer).__name__
    if kind == "BF16_Optimizer":
        grads, _ = optimizer.get_grads_for_norm()
        norm: torch.Tensor = get_global_norm_of_tensors(input_tensors=grads)
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        norm = combine_grad_norm_groups(optimizer._get_norm_groups()) / optimizer.loss_scale
    else:
        norm = optimizer.scaled_global_norm() / optimizer.loss_scale
    return norm


def reduced_gradients(optimizer: Any) -> list[torch.Tensor]:
    """What the last micro-batch of a step has left of the reduced gradient on this rank."""
    if type(optimizer).__name__ == "BF16_Optimizer":
        return list(optimizer.fp32_groups_gradients_flat)
    groups = optimizer.averaged_gradients.values()
    return [grad for group in groups for grad in group or () if grad is not None]


def adds_up_everywhere(optimizer: Any) -> bool:
    """Whether every rank holds the whole reduced gradient, though it updates a part."""
    return type(optimizer).__name__ == "BF16_Optimizer"


@contextmanager
def spoiled_gradients(optimizer: Any) -> Iterator[None]:
    """Collective. Inside, every reduced gradient of this rank is NaN, so that the optimizer drops
    its step.

    The buffers are left at zero: stage 3 keeps them, and never writes to their padding again.
    """
    found = reduced_gradients(optimizer)
    with torch.no_grad():
        for grad in found:
            grad.fill_(torch.nan)
        yield
        for grad in found:
            grad.zero_()
        if type(optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3":
            # The step has dropped the whole small parameters and gathers them only when it updates.
            optimizer.checkpoint_event_epilogue()


def replicated(optimizer: Any, names: Mapping[int, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """What stage 3 keeps whole on every rank: its small parameters."""
    for parameter in optimizer.persistent_parameters:
        yield names[id(parameter)], parameter.data


def partitions(parameters: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's part of every parameter of stage 3, from which the others gather it."""
    for name, parameter in parameters.items():
        yield name, parameter.ds_tensor  # type: ignore[attr-defined]


@torch.no_grad()
def refresh_deepspeed(optimizer: Any) -> None:
    """Collective. Rebuild every low-precision and gathered copy of the weights from the fp32
    partitions.
    """
    if type(optimizer).__name__ != "DeepSpeedZeroOptimizer_Stage3":
        optimizer.update_lp_params()
        return
    # Small parameters stay whole on every rank: drop those copies first, or they outlive the load.
    optimizer.checkpoint_event_prologue()
    for sub_group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    optimizer.checkpoint_event_epilogue()


def _stage12_fragments(
    group: list[Any], offsets: list[int], names: Mapping[int, str], rank: int, partition: int
) -> tuple[Fragment, ...]:
    first, last = rank * partition, (rank + 1) * partition
    fragments = []
    for parameter, offset in zip(group, offsets, strict=True):
        low, high = max(offset, first), min(offset + parameter.numel(), last)
        if low < high:
            shape = tuple(parameter.shape)
            fragments.append(
                Fragment(names[id(parameter)], shape, low - offset, high - low, low - first)
            )
    return tuple(fragments)


def _stage3_fragments(
    group: list[Any], names: Mapping[int, str], rank: int
) -> tuple[Fragment, ...]:
    fragments, offset = [], 0
    for parameter in group:
        partition = parameter.partition_numel()
        start = rank * partition
        length = max(0, min(parameter.ds_numel - start, partition))
        if length:
            fragments.append(
                Fragment(names[id(parameter)], tuple(parameter.ds_shape), start, length, offset)
            )
        offset += partition
    return tuple(fragments)


def _running_offsets(group: list[Any]) -> list[int]:
    offsets, total = [], 0
    for parameter in group:
        offsets.append(total)
        total += parameter.numel()
    return offsets
