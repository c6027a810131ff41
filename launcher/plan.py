"""What a pretraining run needs, from its config alone: memory, waste, time and disk.

Every figure carries the formula that it came from. Memory is an estimate of the allocator's peak:
weights, gradients and optimizer state are known; activations are counted from what one forward pass
keeps; the reserve for CUDA, NCCL and fragmentation is assumed. Time follows from an assumed MFU.
Nothing here has been measured on the machine it speaks of.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from launcher.memory import (
    GB,
    Figure,
    advice,
    batch_figures,
    counted,
    in_units,
    memory_figures,
    sized,
)
from model.config import ModelConfig
from model.flops import flops_per_token, num_parameters
from train.config import RunConfig

ASSUMED_VOCAB_SIZE = 32_000
WASTE_LIMIT = 0.05


class PlanError(ValueError):
    """A plan that was asked for with something unknown."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says about one GPU."""

    memory_bytes: int
    bf16_flops: float
    """Dense bf16 FLOP/s, without sparsity."""
    source: str


GPUS = {
    "a100": Gpu(80 * GB, 312e12, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Gpu(80 * GB, 989.4e12, "NVIDIA H100 SXM5 data sheet: 1,978.9 with sparsity"),
    "h200": Gpu(141 * GB, 989.4e12, "NVIDIA H200 SXM data sheet: 1,978.9 with sparsity"),
}


@dataclass(frozen=True)
class Plan:
    """Figures in reading order, and what is wrong with the run that they describe."""

    title: str
    figures: tuple[Figure, ...]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    fits: bool
    """Whether the memory of a GPU is enough."""

    def __getitem__(self, key: str) -> float:
        return next(figure.value for figure in self.figures if figure.key == key)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it; memory in bytes."""
        return {
            **{figure.key: figure.value for figure in self.figures},
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
            "fits": self.fits,
        }


def make_plan(
    config: RunConfig, *, nodes: int, gpus_per_node: int, gpu: str, mfu: float = 0.4
) -> Plan:
    """The plan of `config` on nodes * gpus_per_node GPUs that reach `mfu` of their peak FLOP/s."""
    chosen = find_gpu(gpu)
    ranks = nodes * gpus_per_node
    assumptions = []
    if config.model.vocab_size == 0:
        vocab_size = _vocab_size(config)
        if vocab_size is None:
            vocab_size = ASSUMED_VOCAB_SIZE
            assumptions.append(
                f"vocabulary of {vocab_size:,} ids (model.vocab_size=0: the dataset decides, "
                "data=DATASET names one)"
            )
        model = config.model.model_copy(update={"vocab_size": vocab_size})
        config = config.model_copy(update={"model": model})
    assumptions.append(f"{mfu:.0%} of the peak FLOP/s (--mfu)")
    assumptions.append(f"GPU figures: {chosen.source}")
    batch = list(batch_figures(config, ranks))
    waste = next(figure.value for figure in batch if figure.key == "dummy_waste")
    micro_batch = int(batch[0].value)
    memory = list(memory_figures(config, ranks, micro_batch))
    total = sum(figure.value for figure in memory)
    figures = (
        counted("num_parameters", num_parameters(config.model), _parameter_formula(config.model)),
        *batch,
        *memory,
        sized("memory_per_gpu", total, "sum of the memory lines"),
        sized("gpu_memory", chosen.memory_bytes, chosen.source),
        *_time(config, ranks, chosen, mfu, waste),
        *_epochs(config),
    )
    fits = total <= chosen.memory_bytes
    warnings = list(_waste_warnings(config, ranks, waste))
    if not fits:
        todo = advice(config, ranks=ranks, gpus_per_node=gpus_per_node, limit=chosen.memory_bytes)
        warnings.append(
            f"{total / GB:,.1f} GB do not fit into {chosen.memory_bytes / GB:,.0f} GB; {todo}"
        )
    title = f"{nodes} x {gpus_per_node} {gpu}, ZeRO stage {config.zero.stage}, {config.precision}"
    return Plan(title, figures, tuple(assumptions), tuple(warnings), fits)


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`; PlanError lists the names."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise PlanError(f"unknown GPU {name!r}; {hint}known: {', '.join(GPUS)}")


def _parameter_formula(model: ModelConfig) -> str:
    return (
        f"{model.num_layers} layers of hidden {model.hidden_size}, feed-forward {model.ffn_size}, "
        f"and {1 if model.tie_embeddings else 2} embedding tables of {model.vocab_size:,} rows"
    )


def _time(config: RunConfig, ranks: int, gpu: Gpu, mfu: float, waste: float) -> Iterator[Figure]:
    per_token = flops_per_token(config.model, config.seq_len)
    per_step = per_token * config.batch_tokens
    # Dummies are computed like real samples.
    rate = ranks * gpu.bf16_flops * mfu * (1 - waste) / per_token
    tokens = config.steps * config.batch_tokens
    checkpoint = 12 * num_parameters(config.model)
    yield Figure(
        "flops_per_token",
        per_token,
        in_units(per_token, "FLOP"),
        "forward and backward: 6 x matrix values + 12 x layers x hidden x seq_len",
    )
    yield Figure(
        "flops_per_step",
        per_step,
        in_units(per_step, "FLOP"),
        f"flops per token x {config.batch_tokens:,} batch_tokens",
    )
    yield Figure(
        "tokens_per_second",
        rate,
        f"{rate:,.0f} tokens/s",
        f"{ranks:,} x {gpu.bf16_flops / 1e12:,.1f} TFLOP/s x {mfu} x (1 - waste) / flops per token",
    )
    yield Figure("tokens_per_day", rate * 86400, in_units(rate * 86400, ""), "x 86,400 s")
    yield Figure(
        "days",
        tokens / rate / 86400,
        _duration(tokens / rate),
        f"{config.steps:,} steps x {config.batch_tokens:,} tokens / tokens per day",
    )
    yield sized("checkpoint_bytes", checkpoint, "(4 weights + 8 moments) B x parameters, in fp32")


def _epochs(config: RunConfig) -> Iterator[Figure]:
    """How often each source is read, when data is named; DataUsageError when that is none."""
    if not config.data.paths:
        return
    from data.epochs import check_epochs, uses
    from data.sources import data_of, open_datasets
    from data.stream import SampleStream

    datasets = open_datasets(
        data_of(config.data), seq_len=config.seq_len, config=config.data, commands=True
    )
    stream = SampleStream(datasets, seq_len=config.seq_len, seed=config.seed)
    found = uses(stream, config.steps * config.batch_samples)
    check_epochs(found, config.data.max_epochs)
    for use in found:
        yield Figure(
            f"epochs_{use.source}",
            use.epochs,
            f"{use.epochs:,.0f}" if use.epochs >= 100 else f"{use.epochs:.3g}",
            f"{use.needed_tokens:,} tokens of the run / {use.available_tokens:,} of one epoch",
        )


def _vocab_size(config: RunConfig) -> int | None:
    """Ids of the dataset's tokenizer, when data is named."""
    if not config.data.paths:
        return None
    from data.manifest import read_manifest

    return read_manifest(Path(config.data.paths[0])).vocab_size


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.3g} seconds"


def _waste_warnings(config: RunConfig, ranks: int, waste: float) -> Iterator[str]:
    if waste > WASTE_LIMIT:
        yield (
            f"{waste:.1%} of every step is spent on dummies: {config.batch_samples:,} sequences "
            f"do not fill {ranks:,} ranks evenly; change batch_tokens, micro_batch or the GPUs"
        )
