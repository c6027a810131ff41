"""What every GPU of a run must hold, and what would make it fit.

Weights, gradients and optimizer state are known; activations are counted from what one forward pass
keeps; the reserve for CUDA, NCCL and fragmentation is assumed. Advice is never general: what is
named has been tried on the same arithmetic, and fits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.figures import Figure, counted, sized
from launcher.gpus import GB
from model.flops import activation_bytes, num_parameters
from train.config import RunConfig

RESERVE_BYTES = 6 * GB
BUCKET_ELEMENTS = 5 * 10**8
"""DeepSpeed's default reduce_bucket_size."""
LIVE_ELEMENTS = 10**9
"""DeepSpeed's default stage3_max_live_parameters."""

Change = Mapping[str, Any]
"""Dotted keys of a config with new values."""


def batch_figures(config: RunConfig, ranks: int) -> Iterator[Figure]:
    """How a global batch lies on the ranks."""
    samples = config.batch_samples
    micro_batch, accumulation = config.layout(samples, num_ranks=ranks)
    places = accumulation * ranks * micro_batch
    yield counted("micro_batch", micro_batch, "micro_batch, or the rank's whole share when it is 0")
    yield counted(
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


def memory_figures(config: RunConfig, ranks: int, micro_batch: int) -> Iterator[Figure]:
    """Bytes per GPU by component (arXiv 1910.02054 counts weights, gradients, optimizer state)."""
    count, stage = num_parameters(config.model), config.zero.stage
    width = 4 if config.precision == "fp32" else 2

    def share(from_stage: int) -> tuple[int, str]:
        return (ranks, f" / {ranks:,} ranks") if stage >= from_stage else (1, "")

    divisor, by = share(3)
    yield sized("memory_weights", width * count / divisor, f"{width} B x parameters{by}")
    divisor, by = share(2)
    yield sized("memory_gradients", 4 * count / divisor, f"4 B (fp32) x parameters{by}")
    divisor, by = share(1)
    # DeepSpeed keeps an fp32 copy of its partition even when the weights are fp32 already.
    state = 12 if stage >= 1 or width == 2 else 8
    parts = "4 master + 8 moments" if state == 12 else "8 moments"
    yield sized("memory_optimizer", state * count / divisor, f"({parts}) B x parameters{by}")
    if stage >= 1:
        bucket = 4 * min(count, BUCKET_ELEMENTS)
        yield sized("memory_buckets", bucket, "4 B x min(parameters, 5e8 of reduce_bucket_size)")
    if stage == 3:
        live = width * min(count, LIVE_ELEMENTS)
        yield sized("memory_gathered", live, f"{width} B x min(parameters, 1e9 live ones)")
    model, tokens = config.model, micro_batch * config.seq_len
    yield sized(
        "memory_activations",
        activation_bytes(model, micro_batch=micro_batch, seq_len=config.seq_len, value_bytes=width),
        f"{tokens:,} tokens x (layers x (6 hidden + 2 kv + 3 feed-forward) x {width} B + fp32 log-"
        f"probabilities){', one layer kept whole' if model.activation_checkpointing else ''}",
    )
    yield sized(
        "memory_logits",
        (width + 4) * tokens * model.vocab_size,
        f"({width} logits + 4 gradient) B x {tokens:,} tokens x {model.vocab_size:,} ids",
    )
    yield sized("memory_reserve", RESERVE_BYTES, "assumed: CUDA, NCCL, fragmentation")


def memory_per_gpu(config: RunConfig, ranks: int) -> float:
    """Bytes that each of `ranks` GPUs must hold."""
    micro_batch, _ = config.layout(config.batch_samples, num_ranks=ranks)
    return sum(figure.value for figure in memory_figures(config, ranks, micro_batch))


def advice(config: RunConfig, *, ranks: int, gpus_per_node: int, limit: int) -> str:
    """What makes the run fit into `limit` bytes per GPU: every single change that does; where none
    does, all that help together; then those with more GPUs.
    """

    def told(change: Change, on: int) -> str | None:
        made = memory_per_gpu(changed(config, change), on)
        if made > limit:
            return None
        gpus = [f"{on:,} GPUs"] if on != ranks else []
        keys = [" ".join(settings(change))] if change else []
        return f"{' with '.join([*gpus, *keys])} ({made / GB:,.1f} GB)"

    levers = list(_levers(config, ranks))
    alone = [
        next(filter(None, (told(change, ranks) for change in lever)), None) for lever in levers
    ]
    found = [*alone, told({}, _enough_gpus(config, ranks, gpus_per_node, limit))]
    if not any(found):
        found = [told(_least(levers), ranks)]
    if not any(found):
        # On several ranks there is more to shard.
        least = _least(list(_levers(config, 2 * ranks)))
        enough = _enough_gpus(changed(config, least), ranks, gpus_per_node, limit)
        found = [told(least, enough)]
    if not any(found):
        return "no number of these GPUs holds it: take one with more memory, or a smaller model"
    return "what fits: " + ", or ".join(filter(None, found))


def _levers(config: RunConfig, ranks: int) -> Iterator[list[Change]]:
    """What can change the memory on these ranks, the mildest change of each kind first."""
    micro_batch, _ = config.layout(config.batch_samples, num_ranks=ranks)
    halves = [micro_batch >> shift for shift in range(1, micro_batch.bit_length())]
    if halves:
        yield [{"micro_batch": half} for half in halves]
    if not config.model.activation_checkpointing:
        yield [{"model.activation_checkpointing": True}]
    # One rank has nobody to share with.
    if ranks > 1 and config.zero.stage < 3:
        yield [{"zero.stage": stage} for stage in range(config.zero.stage + 1, 4)]


def _least(levers: list[list[Change]]) -> Change:
    """The strongest change of every kind together."""
    return {key: value for lever in levers for key, value in lever[-1].items()}


def _enough_gpus(config: RunConfig, ranks: int, gpus_per_node: int, limit: int) -> int:
    """The fewest GPUs, in whole nodes, on which the run fits; `ranks` where none do. More GPUs than
    sequences in a batch would compute dummies.
    """
    most = max(config.batch_samples, ranks) // gpus_per_node
    nodes = range(ranks // gpus_per_node, most + 1)
    first = bisect_left(
        nodes, True, key=lambda count: memory_per_gpu(config, count * gpus_per_node) <= limit
    )
    return nodes[first] * gpus_per_node if first < len(nodes) else ranks


def changed(config: RunConfig, change: Change) -> RunConfig:
    """The run with some keys changed, without asking whether they go together."""
    for key, value in change.items():
        table, _, leaf = key.rpartition(".")
        if table:
            inner = getattr(config, table).model_copy(update={leaf: value})
            config = config.model_copy(update={table: inner})
        else:
            config = config.model_copy(update={leaf: value})
    return config


def settings(change: Change) -> list[str]:
    """A change as a command line takes it."""
    return [f"{key}={str(value).lower()}" for key, value in change.items()]
