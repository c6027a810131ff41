"""What every GPU of a run must hold, and what would make it fit.

Weights, gradients and optimizer state are those of ZeRO (arXiv 1910.02054), activations what one
forward pass keeps, buckets DeepSpeed's; the margins for fragmentation, CUDA and NCCL are flat.
Without them the sum is the allocator's peak within 1 % on one H200, by which it was corrected
(docs/evidence/gpu_speed.json), and within 10 % at every stage on two ranks of a CPU (tests/
launcher/test_memory.py). Advice is never general: what is named has been tried on the same
arithmetic, and fits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.figures import Figure, counted, sized
from launcher.gpus import GB
from launcher.step_time import BUCKET_ELEMENTS, PREFETCH_ELEMENTS
from model.flops import activation_bytes, num_parameters
from train.config import RunConfig

RESERVE_BYTES = 3 * GB // 2
"""Assumed, for the CUDA context and NCCL."""
FRAGMENTATION_BYTES = 9 * GB // 2
"""The most that the allocator of one H200 held beyond what it had given out: reserved_gb less
peak_gb in docs/evidence/gpu_speed.json.
"""
MARGINS = ("memory_fragmentation", "memory_reserve")
"""Figures that are no tensors."""
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
    """Bytes per GPU by component, at the moment when most are held: in the backward pass of the
    loss, unless buckets need more than the activations that have gone by then.
    """
    count, width = num_parameters(config.model), 4 if config.precision == "fp32" else 2
    stage = config.zero.stage
    weights, by = _shared(width * count, ranks, stage >= 3)
    yield sized("memory_weights", weights, f"{width} B x parameters{by}")
    gradients, later, formula = _gradients(config, ranks, micro_batch)
    yield sized("memory_gradients", gradients, formula)
    # DeepSpeed keeps an fp32 copy of its partition even when the weights are fp32 already.
    state = 12 if stage >= 1 or width == 2 else 8
    parts = "4 master + 8 moments" if state == 12 else "8 moments"
    optimizer, by = _shared(state * count, ranks, stage >= 1)
    yield sized("memory_optimizer", optimizer, f"({parts}) B x parameters{by}")
    if stage == 3 and ranks > 1:
        yield _gathered(config, width)
    activations = list(_activation_figures(config, micro_batch, width))
    yield from activations
    yield _buckets(
        config,
        ranks,
        later=later,
        room=sum(f.value for f in activations),
        tokens=micro_batch * config.seq_len,
    )
    yield sized(
        "memory_fragmentation",
        FRAGMENTATION_BYTES,
        "the most that the allocator of one H200 held beyond what it had given out",
    )
    yield sized("memory_reserve", RESERVE_BYTES, "assumed: CUDA context, NCCL")


def _gathered(config: RunConfig, width: int) -> Figure:
    """Whole weights of stage 3: those in use, and the flat buffer that the next ones arrive in."""
    count = num_parameters(config.model)
    live = _zero_option(config, "stage3_max_live_parameters", LIVE_ELEMENTS)
    ahead = _zero_option(config, "stage3_prefetch_bucket_size", PREFETCH_ELEMENTS)
    return sized(
        "memory_gathered",
        width * (min(count, live) + min(count, ahead)),
        f"{width} B x (min(parameters, {live:.3g} live) + min(parameters, {ahead:.3g} prefetched))",
    )


def _shared(size: int, ranks: int, is_shared: bool) -> tuple[float, str]:
    """Bytes per rank, and how to say so."""
    return (size / ranks, f" / {ranks:,} ranks") if is_shared else (size, "")


def _gradients(config: RunConfig, ranks: int, micro_batch: int) -> tuple[float, float, str]:
    """Bytes held during the backward pass of the loss; bytes at the end of the backward pass beyond
    those; the formula of the first.

    What one pass hands to the next lies there all the time. In a step of one pass, gradients come
    while activations go. DeepSpeed's bf16 stage 1 has fp32 ones at all times, and keeps the bf16
    ones of the pass before; stage 3 has its fp32 partition at all times.
    """
    count, stage = num_parameters(config.model), config.zero.stage
    accumulates = config.batch_samples > ranks * micro_batch
    whole, by = _shared(4 * count, ranks, stage >= 2)
    told = f"4 B (fp32) x parameters{by}"
    if stage == 3:
        return whole, 0.0, told
    if stage == 1 and config.precision != "fp32":
        narrow = 2 * count
        if accumulates:
            return whole + narrow, 0.0, "(4 B fp32 + 2 B of the pass before) x parameters"
        return whole, narrow, told
    if accumulates:
        return whole, 0.0, told
    return 0.0, whole, f"one pass per step: {told}, while activations go"


def _activation_figures(config: RunConfig, micro_batch: int, width: int) -> Iterator[Figure]:
    """Activations, masks and the tensors of the loss."""
    model, tokens = config.model, micro_batch * config.seq_len
    kept = activation_bytes(
        model, micro_batch=micro_batch, seq_len=config.seq_len, value_bytes=width
    )
    layer = f"((6 hidden + 2 kv + 3 feed-forward) x {width} B + (heads + 2) x 4 B)"
    if model.activation_checkpointing:
        summed = f"layers x hidden x {width} B + {layer} of one layer"
    else:
        summed = f"layers x {layer}"
    yield sized(
        "memory_activations",
        kept,
        f"{tokens:,} tokens x ({summed} + 2 hidden x {width} B + (ids + 1) x 4 B)",
    )
    if config.data.boundaries == "attention":
        # torch makes a bias of the compute type of it in every layer, and keeps that.
        layers = 1 if model.activation_checkpointing else model.num_layers
        yield sized(
            "memory_masks",
            (layers * width + 1) * tokens * config.seq_len,
            f"({layers} layers x {width} B + 1 B) x {tokens:,} tokens x seq_len",
        )
    # Two gradients in fp32: of the log-probabilities and, as torch widens bf16 logits before their
    # log_softmax, of the wide logits.
    logits = 8 * tokens * model.vocab_size
    told = f"8 B (two fp32 gradients) x {tokens:,} tokens x {model.vocab_size:,} ids"
    if model.activation_checkpointing:
        shapes = {"micro_batch": micro_batch, "seq_len": config.seq_len, "value_bytes": width}
        one, two = (
            activation_bytes(
                model.model_copy(update={"num_layers": n, "activation_checkpointing": False}),
                **shapes,
            )
            for n in (1, 2)
        )
        logits = max(0, logits - (two - one))
        told += ", less the layer that is kept whole when these are gone"
    yield sized("memory_logits", logits, told)


def _buckets(config: RunConfig, ranks: int, *, later: float, room: float, tokens: int) -> Figure:
    """What gradients and their buckets need beyond the `room` that activations leave them."""
    count, stage = num_parameters(config.model), config.zero.stage
    elements = _zero_option(config, "reduce_bucket_size", BUCKET_ELEMENTS)
    if stage == 3:
        return sized("memory_buckets", 4 * elements, f"4 B x {elements:.3g} of reduce_bucket_size")
    if stage == 2 or (stage == 1 and config.precision == "fp32"):
        # Allocated when the loss has freed its log-probabilities and their gradients.
        width = 4 if config.precision == "fp32" else 2
        size, left = width * elements, 12 * tokens * config.model.vocab_size
        told = f"{width} B x {elements:.3g} of reduce_bucket_size"
        extra = max(size - left, size + later - room)
        where = "beyond what the loss has freed"
    else:
        size = 4 * min(count, BUCKET_ELEMENTS) if ranks > 1 else 0
        told = f"4 B x min(parameters, {BUCKET_ELEMENTS:.3g}) at the end of the step"
        extra = size + later - room
        where = "beyond what activations and loss have freed"
    return sized("memory_buckets", max(0.0, extra), f"{told}, {where}")


def _zero_option(config: RunConfig, name: str, default: int) -> int:
    """A size in the raw [deepspeed] table, or DeepSpeed's default."""
    return int(config.deepspeed.get("zero_optimization", {}).get(name, default))


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
