"""What a pretraining run needs, from its config alone: memory, waste, time and disk.

Every figure carries the formula that it came from. Memory is an estimate of the allocator's peak:
weights, gradients and optimizer state are known; activations are counted from what one forward pass
keeps; the reserve for CUDA, NCCL and fragmentation is assumed. Time follows from an assumed MFU.
Nothing here has been measured on the machine it speaks of.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

from model.config import ModelConfig
from model.flops import activation_bytes, flops_per_token, num_parameters
from train.config import RunConfig

GB = 10**9
ASSUMED_VOCAB_SIZE = 32_000
RESERVE_BYTES = 6 * GB
BUCKET_ELEMENTS = 5 * 10**8
"""DeepSpeed's default reduce_bucket_size."""
LIVE_ELEMENTS = 10**9
"""DeepSpeed's default stage3_max_live_parameters."""
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
class Figure:
    """One number of a plan."""

    key: str
    value: float
    text: str
    """The value with its unit, for people."""
    formula: str
    """How it follows from the config, with the numbers filled in."""


@dataclass(frozen=True)
class Plan:
    """Figures in reading order, and what is wrong with the run that they describe."""

    title: str
    figures: tuple[Figure, ...]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]

    def __getitem__(self, key: str) -> float:
        return next(figure.value for figure in self.figures if figure.key == key)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it; memory in bytes."""
        return {
            **{figure.key: figure.value for figure in self.figures},
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
        }


def make_plan(
    config: RunConfig, *, nodes: int, gpus_per_node: int, gpu: str, mfu: float = 0.4
) -> Plan:
    """The plan of `config` on nodes * gpus_per_node GPUs that reach `mfu` of their peak FLOP/s."""
    chosen = find_gpu(gpu)
    ranks = nodes * gpus_per_node
    assumptions = []
    if config.model.vocab_size == 0:
        model = config.model.model_copy(update={"vocab_size": ASSUMED_VOCAB_SIZE})
        config = config.model_copy(update={"model": model})
        assumptions.append(
            f"vocabulary of {ASSUMED_VOCAB_SIZE:,} ids (model.vocab_size=0: the dataset decides)"
        )
    assumptions.append(f"{mfu:.0%} of the peak FLOP/s (--mfu)")
    assumptions.append(f"GPU figures: {chosen.source}")
    batch = list(_batch(config, ranks))
    waste = next(figure.value for figure in batch if figure.key == "dummy_waste")
    micro_batch = int(batch[0].value)
    memory = list(_memory(config, ranks, micro_batch))
    total = sum(figure.value for figure in memory)
    figures = (
        _count("num_parameters", num_parameters(config.model), _parameter_formula(config.model)),
        *batch,
        *memory,
        _bytes("memory_per_gpu", total, "sum of the memory lines"),
        _bytes("gpu_memory", chosen.memory_bytes, chosen.source),
        *_time(config, ranks, chosen, mfu, waste),
        *_epochs(config),
    )
    warnings = tuple(_warnings(config, ranks, total, chosen.memory_bytes, waste))
    title = f"{nodes} x {gpus_per_node} {gpu}, ZeRO stage {config.zero.stage}, {config.precision}"
    return Plan(title, figures, tuple(assumptions), warnings)


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`; PlanError lists the names."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise PlanError(f"unknown GPU {name!r}; {hint}known: {', '.join(GPUS)}")


def show_plan(plan: Plan, *, explain: bool, as_json: bool) -> None:
    """Print a plan on stdout, with every formula when `explain`."""
    if as_json:
        print(json.dumps(plan.as_dict(), indent=2))
        return
    console = Console()
    table = Table(title=plan.title, title_justify="left", box=None, pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    if explain:
        table.add_column("formula", overflow="fold")
    for figure in plan.figures:
        row = [figure.key.replace("_", " "), figure.text]
        table.add_row(*row, *([figure.formula] if explain else []))
    console.print(table)
    for text in plan.assumptions:
        console.print(f"assumed: {text}", soft_wrap=True, highlight=False)
    for text in plan.warnings:
        console.print(f"warning: {text}", soft_wrap=True, highlight=False, style="yellow")


def _parameter_formula(model: ModelConfig) -> str:
    return (
        f"{model.num_layers} layers of hidden {model.hidden_size}, feed-forward {model.ffn_size}, "
        f"and {1 if model.tie_embeddings else 2} embedding tables of {model.vocab_size:,} rows"
    )


def _batch(config: RunConfig, ranks: int) -> Iterator[Figure]:
    samples = config.batch_samples
    micro_batch, accumulation = config.layout(samples, num_ranks=ranks)
    places = accumulation * ranks * micro_batch
    yield _count("micro_batch", micro_batch, "micro_batch, or the rank's whole share when it is 0")
    yield _count(
        "accumulation",
        accumulation,
        f"ceil(batch / (ranks x micro)) = ceil({samples:,} / ({ranks:,} x {micro_batch}))",
    )
    waste = 1 - samples / places
    yield Figure(
        "dummy_waste",
        waste,
        f"{waste:.1%}",
        f"1 - batch / (accumulation x ranks x micro) = 1 - {samples:,} / {places:,}",
    )


def _memory(config: RunConfig, ranks: int, micro_batch: int) -> Iterator[Figure]:
    """Bytes per GPU by component (arXiv 1910.02054 counts weights, gradients, optimizer state)."""
    count, stage = num_parameters(config.model), config.zero.stage
    width = 4 if config.precision == "fp32" else 2

    def share(from_stage: int) -> tuple[int, str]:
        return (ranks, f" / {ranks:,} ranks") if stage >= from_stage else (1, "")

    divisor, by = share(3)
    yield _bytes("memory_weights", width * count / divisor, f"{width} B x parameters{by}")
    divisor, by = share(2)
    yield _bytes("memory_gradients", 4 * count / divisor, f"4 B (fp32) x parameters{by}")
    divisor, by = share(1)
    # DeepSpeed keeps an fp32 copy of its partition even when the weights are fp32 already.
    state = 12 if stage >= 1 or width == 2 else 8
    parts = "4 master + 8 moments" if state == 12 else "8 moments"
    yield _bytes("memory_optimizer", state * count / divisor, f"({parts}) B x parameters{by}")
    if stage >= 1:
        bucket = 4 * min(count, BUCKET_ELEMENTS)
        yield _bytes("memory_buckets", bucket, "4 B x min(parameters, 5e8 of reduce_bucket_size)")
    if stage == 3:
        live = width * min(count, LIVE_ELEMENTS)
        yield _bytes("memory_gathered", live, f"{width} B x min(parameters, 1e9 live ones)")
    model, tokens = config.model, micro_batch * config.seq_len
    yield _bytes(
        "memory_activations",
        activation_bytes(model, micro_batch=micro_batch, seq_len=config.seq_len, value_bytes=width),
        f"{tokens:,} tokens x (layers x (6 hidden + 2 kv + 3 feed-forward) x {width} B + fp32 log-"
        f"probabilities){', one layer kept whole' if model.activation_checkpointing else ''}",
    )
    yield _bytes(
        "memory_logits",
        (width + 4) * tokens * model.vocab_size,
        f"({width} logits + 4 gradient) B x {tokens:,} tokens x {model.vocab_size:,} ids",
    )
    yield _bytes("memory_reserve", RESERVE_BYTES, "assumed: CUDA, NCCL, fragmentation")


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
        f"{per_token / 1e9:,.2f} GFLOP",
        "forward and backward: 6 x matrix values + 12 x layers x hidden x seq_len",
    )
    yield Figure(
        "flops_per_step",
        per_step,
        f"{per_step / 1e15:,.2f} PFLOP",
        f"flops per token x {config.batch_tokens:,} batch_tokens",
    )
    yield Figure(
        "tokens_per_second",
        rate,
        f"{rate:,.0f}",
        f"{ranks:,} x {gpu.bf16_flops / 1e12:,.1f} TFLOP/s x {mfu} x (1 - waste) / flops per token",
    )
    yield Figure("tokens_per_day", rate * 86400, f"{rate * 86400 / 1e9:,.2f} G", "x 86,400 s")
    yield Figure(
        "days",
        tokens / rate / 86400,
        f"{tokens / rate / 86400:,.2f}",
        f"{config.steps:,} steps x {config.batch_tokens:,} tokens / tokens per day",
    )
    yield _bytes("checkpoint_bytes", checkpoint, "(4 weights + 8 moments) B x parameters, in fp32")


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
            f"{use.epochs:,.3g}",
            f"{use.needed_tokens:,} tokens of the run / {use.available_tokens:,} of one epoch",
        )


def _warnings(
    config: RunConfig, ranks: int, memory: float, limit: int, waste: float
) -> Iterator[str]:
    if waste > WASTE_LIMIT:
        yield (
            f"{waste:.1%} of every step is spent on dummies: {config.batch_samples:,} sequences "
            f"do not fill {ranks:,} ranks evenly; change batch_tokens, micro_batch or the GPUs"
        )
    if memory > limit:
        yield (
            f"{memory / GB:,.1f} GB do not fit into {limit / GB:,.0f} GB; lower micro_batch, set "
            "model.activation_checkpointing=true, or raise zero.stage"
        )


def _count(key: str, value: int, formula: str) -> Figure:
    return Figure(key, value, f"{value:,}", formula)


def _bytes(key: str, value: float, formula: str) -> Figure:
    return Figure(key, value, f"{value / GB:,.2f} GB", formula)
