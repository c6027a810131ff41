"""How long an optimizer step takes on GPUs: a roofline of our own operations, and ZeRO's traffic.

    step = accumulation x (compute + hooks + traffic of a micro-batch) + traffic of a step + AdamW

Compute is the sum, not the larger, of arithmetic at the share of the peak that a large product
reaches and of the bytes that it moves, so that small matrices and few tokens come out slower.
Pointwise operations and AdamW run at HBM_SHARE of the memory's bandwidth. Collectives are rings:
over NVLink in a node, else as fast as the ports of a node together. Stages 0 to 2 wait for them,
as DeepSpeed does by default; stage 3 hides them behind the computation, but for EXPOSED_SHARE.

Fitted to one H200 (docs/evidence/gpu_speed.json) and one published A100 run; traffic between
GPUs has been compared with published runs, and measured by us on no cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launcher.gpus import Gpu
from model.config import ModelConfig
from model.flops import num_parameters, num_tensors

HBM_SHARE = 0.8
"""Assumed: of the memory's bandwidth, by kernels that only move data."""
LINK_SHARE = 0.8
"""Assumed: of NVLink's and the network's bandwidth, by large collectives."""
EXPOSED_SHARE = 0.1
"""Assumed: of the traffic that runs beside computation, what it cannot hide: first and last."""
MASKED_SHARE = 0.8
"""Of the attention kernel's rate, with a mask in place of a plain causal one; it also computes all
pairs, not half of them. Fitted to `1b masked` of gpu_speed.json.
"""
HOOK_SECONDS = {0: 0.0, 1: 0.0, 2: 61e-6, 3: 324e-6}
"""What DeepSpeed adds per parameter tensor and micro-batch, by stage, beyond stage 1: fitted to
stages 2 and 3 of gpu_speed.json, one GPU.
"""
HOP_SECONDS = 5e-6
"""Assumed: per rank that a ring passes, for each collective."""
BUCKET_ELEMENTS = 5 * 10**8
"""DeepSpeed's default reduce_bucket_size, and that of its bf16 stage 1 and stage 0 in any case."""
PREFETCH_ELEMENTS = 5 * 10**7
"""DeepSpeed's default stage3_prefetch_bucket_size."""
BACKWARD_ATTENTION = 2.5
"""Products of the attention kernel's backward pass, in forward passes: it computes scores again."""
LOSS_BYTES = 36
"""Per logit, forward and backward, in fp32 but for the first read and the last write: widened,
log_softmax, their gradients, narrowed.
"""
ACCUMULATE_BYTES = 12
"""Per parameter and micro-batch: the gradient written, and added in fp32."""
UPDATE_BYTES = 50
"""Per parameter of a partition and step: norm, clipping, fused AdamW, weights cast, zeroed."""


@dataclass(frozen=True)
class Layout:
    """How a step lies on the ranks."""

    nodes: int
    gpus_per_node: int
    micro_batch: int
    accumulation: int
    stage: int
    precision: str = "bf16"
    is_masked: bool = False
    """Attention stops at the end of a document."""
    overlap: bool | None = None
    """Traffic beside computation; None as DeepSpeed does by default, at stage 3 alone."""
    gradient_bytes: int = 4
    """Of a gradient on its way; ours are reduced in fp32."""
    has_hooks: bool = True
    """DeepSpeed's; published runs of other trainers have none of them."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def value_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def overlaps(self) -> bool:
        return self.stage == 3 if self.overlap is None else self.overlap


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they are spent on."""

    matmul: float
    attention: float
    pointwise: float
    recomputation: float
    hooks: float = 0.0
    communication: float = 0.0
    """That computation does not hide."""
    optimizer: float = 0.0

    @property
    def compute(self) -> float:
        return self.matmul + self.attention + self.pointwise + self.recomputation

    @property
    def total(self) -> float:
        return self.compute + self.hooks + self.communication + self.optimizer


def step_time(model: ModelConfig, seq_len: int, *, layout: Layout, gpu: Gpu) -> StepTime:
    """The seconds of a step; model.vocab_size must be known."""
    tokens = layout.micro_batch * seq_len
    count = num_parameters(model)
    block, head = _matmul_seconds(model, tokens, layout, gpu)
    attention = _attention_seconds(model, tokens, seq_len, layout, gpu)
    forward, backward = (
        model.num_layers * tokens * values * layout.value_bytes / (HBM_SHARE * gpu.hbm_bytes)
        for values in _pointwise_values(model)
    )
    rest = LOSS_BYTES * tokens * model.vocab_size + ACCUMULATE_BYTES * count
    again = block + attention + forward if model.activation_checkpointing else 0.0
    times = layout.accumulation
    computed = StepTime(
        matmul=times * 3 * (block + head),
        attention=times * (1 + BACKWARD_ATTENTION) * attention,
        pointwise=times * (forward + backward + rest / (HBM_SHARE * gpu.hbm_bytes)),
        recomputation=times * again,
    )
    hooks = HOOK_SECONDS[layout.stage] * num_tensors(model) if layout.has_hooks else 0.0
    share = count / layout.ranks if layout.stage >= 1 else count
    return replace(
        computed,
        hooks=times * hooks,
        communication=_communication_seconds(count, layout, gpu, compute=computed.compute / times),
        optimizer=UPDATE_BYTES * share / (HBM_SHARE * gpu.hbm_bytes),
    )


def _matmul_seconds(
    model: ModelConfig, tokens: int, layout: Layout, gpu: Gpu
) -> tuple[float, float]:
    """Forward seconds of all blocks' matrices, and of the head; a backward pass takes twice that.

    A product of [M, K] and [K, N] does 2 M K N operations and moves M K + K N + M N values.
    """
    hidden, ffn = model.hidden_size, model.ffn_size
    key_value = model.kv_heads * model.head_size
    rate = gpu.matmul_share * gpu.peak(layout.precision)

    def seconds(width: int, other: int) -> float:
        moved = tokens * (width + other) + width * other
        arithmetic = 2.0 * tokens * width * other / rate
        return arithmetic + layout.value_bytes * moved / gpu.hbm_bytes

    block = 2 * seconds(hidden, hidden) + 2 * seconds(hidden, key_value) + 3 * seconds(hidden, ffn)
    return model.num_layers * block, seconds(hidden, model.padded_vocab_size)


def _attention_seconds(
    model: ModelConfig, tokens: int, seq_len: int, layout: Layout, gpu: Gpu
) -> float:
    """Forward seconds of all attention kernels: 4 D T operations per token, half with a causal
    kernel, which skips the pairs that a token may not see.
    """
    rate = gpu.attention_share * gpu.peak(layout.precision)
    pairs = 1 / MASKED_SHARE if layout.is_masked else 0.5
    return pairs * 4.0 * model.num_layers * model.hidden_size * seq_len * tokens / rate


def _pointwise_values(model: ModelConfig) -> tuple[int, int]:
    """Values that a block reads and writes per token, forward and backward, around its products.

    Forward: two norms (2 D each), two sums (3 D), rotary positions of query and key (4 per value),
    SwiGLU (5 F). Backward: norms (4 D), sums of gradients (3 D, five times: two residual, three of
    query, key, value and gate, up), rotary (4), SwiGLU (11 F).
    """
    hidden, ffn = model.hidden_size, model.ffn_size
    rotary = 4 * (hidden + model.kv_heads * model.head_size)
    return 10 * hidden + rotary + 5 * ffn, 23 * hidden + rotary + 11 * ffn


def _communication_seconds(count: int, layout: Layout, gpu: Gpu, *, compute: float) -> float:
    """Seconds per step that training waits for other ranks."""
    if layout.ranks == 1:
        return 0.0
    wire, width = layout.gradient_bytes * count, layout.value_bytes * count
    buckets = -(-count // BUCKET_ELEMENTS)
    gathers = -(-count // PREFETCH_ELEMENTS)

    def ring(passes: int, size: float, collectives: int) -> float:
        """`passes` times (n - 1) / n of `size` through the slowest link, in so many collectives."""
        others = layout.ranks - 1
        moved = size * others / layout.ranks / ring_bandwidth(layout, gpu)
        return passes * (moved + collectives * others * HOP_SECONDS)

    if layout.stage == 3:
        each, once = ring(2, width, gathers) + ring(1, wire, buckets), 0.0
    elif layout.stage == 2:
        # DeepSpeed sums whole buckets (use_multi_rank_bucket_allreduce), with each micro-batch.
        each, once = ring(2, wire, buckets), ring(1, width, buckets)
    else:
        gathered = ring(1, width, buckets) if layout.stage == 1 else 0.0
        each, once = 0.0, ring(2, wire, buckets) + gathered
    if layout.overlaps:
        each = max(each - compute, EXPOSED_SHARE * each)
    return layout.accumulation * each + once


def ring_bandwidth(layout: Layout, gpu: Gpu) -> float:
    """Bytes/s of each rank in a ring of all. Between nodes the ring of each GPU leaves through a
    port of its own, so that a node's ports add up.
    """
    inside = LINK_SHARE * gpu.nvlink_bytes
    if layout.nodes == 1:
        return inside
    return min(inside, LINK_SHARE * layout.gpus_per_node * gpu.network_bytes)


def formulas(layout: Layout, gpu: Gpu) -> Iterator[tuple[str, str]]:
    """Field of StepTime -> how it follows, with this layout's rates filled in."""
    peak = gpu.peak(layout.precision) / 1e12
    memory = f"{HBM_SHARE:g} x {gpu.hbm_bytes / 1e12:g} TB/s"
    times = f"{layout.accumulation:,} passes x "
    yield (
        "matmul",
        f"{times}3 x sum over matrices of (2 M K N / ({gpu.matmul_share:g} x {peak:,.1f} TFLOP/s) "
        f"+ (M K + K N + M N) x {layout.value_bytes} B / {gpu.hbm_bytes / 1e12:g} TB/s)",
    )
    yield (
        "attention",
        f"{times}3.5 x {'4' if layout.is_masked else '2'} x layers x hidden x seq_len x tokens / "
        f"({gpu.attention_share * (MASKED_SHARE if layout.is_masked else 1):g} x {peak:,.1f} "
        "TFLOP/s)",
    )
    yield (
        "pointwise",
        f"{times}(layers x tokens x (33 hidden + 8 (hidden + kv) + 16 feed-forward) x "
        f"{layout.value_bytes} B + {LOSS_BYTES} B x logits + {ACCUMULATE_BYTES} B x parameters) / "
        f"({memory})",
    )
    yield "recomputation", f"{times}one forward pass of all blocks, with activation checkpointing"
    yield (
        "hooks",
        f"{times}{HOOK_SECONDS[layout.stage] * 1e6:g} us x parameter tensors: DeepSpeed, as on one "
        "H200",
    )
    yield "communication", _traffic(layout, gpu)
    yield (
        "optimizer",
        f"{UPDATE_BYTES} B x parameters{f' / {layout.ranks:,} ranks' if layout.stage else ''} / "
        f"({memory})",
    )


def _traffic(layout: Layout, gpu: Gpu) -> str:
    if layout.ranks == 1:
        return "one rank, nothing to send"
    wire, width = layout.gradient_bytes, layout.value_bytes
    sums = f"all-reduce of {wire} B x parameters (twice (n - 1) / n)"
    told = {
        0: f"{sums} once",
        1: f"{sums}, and all-gather of {width} B x parameters, once",
        2: f"{sums} per pass, and all-gather of {width} B x parameters once",
        3: f"2 all-gathers of {width} B and a reduce-scatter of {wire} B x parameters per pass",
    }[layout.stage]
    hidden = (
        f"hidden by computation but for {EXPOSED_SHARE:.0%}" if layout.overlaps else "waited for"
    )
    return (
        f"ring over {layout.ranks:,} ranks at {ring_bandwidth(layout, gpu) / 1e9:,.0f} GB/s "
        f"({LINK_SHARE:g} x {'NVLink' if layout.nodes == 1 else 'a node' + chr(39) + 's links'}): "
        f"{told}, {hidden}, + {HOP_SECONDS * 1e6:g} us x ranks per collective"
    )
