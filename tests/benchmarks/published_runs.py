"""Runs that others have published, and ours on one H200, as the model of a step takes them.

tests/benchmarks/published.py says what is compared, and how.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.gpus import GPUS, Gpu
from launcher.step_time import Layout, step_time
from model.config import ModelConfig
from model.flops import flops_per_token

ROOT = Path(__file__).parents[2]
OUR_GPU = ROOT / "docs" / "evidence" / "gpu_speed.json"

Unit = Literal["tokens/s", "TFLOP/s", "TFLOP/s with recomputation"]


@dataclass(frozen=True)
class Run:
    """A run and what was published of it, per GPU."""

    name: str
    model: ModelConfig
    seq_len: int
    gpu: str
    layout: Layout
    published: float
    unit: Unit
    source: str
    kind: Literal["step", "compute"] = "step"
    fitted: str = ""
    """The rate that was fitted to this run; empty when it is only predicted."""
    note: str = ""

    def predicted(self) -> float:
        """The same figure by launcher/step_time.py."""
        found = step_time(self.model, self.seq_len, layout=self.layout, gpu=self._gpu())
        seconds = found.compute if self.kind == "compute" else found.total
        tokens = self.layout.micro_batch * self.layout.accumulation * self.seq_len
        if self.unit == "tokens/s":
            return tokens / seconds
        # The convention of Megatron-LM: a fourth forward pass on top of three.
        counted = 4 / 3 if self.unit == "TFLOP/s with recomputation" else 1.0
        return counted * tokens * flops_per_token(self.model, self.seq_len) / seconds / 1e12

    def row(self) -> dict[str, Any]:
        """What the evidence keeps."""
        found = self.predicted()
        return {
            "name": self.name,
            "kind": self.kind,
            "fitted": self.fitted,
            "gpus": f"{self.layout.ranks} x {self.gpu}",
            "unit": self.unit,
            "published": round(self.published, 1),
            "predicted": round(found, 1),
            "published_mfu": round(self._mfu(self.published), 3),
            "predicted_mfu": round(self._mfu(found), 3),
            "error": round(found / self.published - 1, 3),
            "source": self.source,
            "note": self.note,
        }

    def _mfu(self, figure: float) -> float:
        """MFU of a figure in this run's unit: recomputed activations do not count."""
        flops = figure * 1e12
        if self.unit == "tokens/s":
            flops = figure * flops_per_token(self.model, self.seq_len)
        elif self.unit == "TFLOP/s with recomputation":
            flops *= 3 / 4
        return flops / self._gpu().bf16_flops

    def _gpu(self) -> Gpu:
        if self.gpu == "a100 40GB":
            # Its memory is slower: 1,555 GB/s (NVIDIA A100 data sheet).
            return replace(GPUS["a100"], hbm_bytes=1.555e12)
        return GPUS[self.gpu]


def gpt(layers: int, hidden: int, heads: int, vocab: int, *, recomputes: bool) -> ModelConfig:
    """A model of ours with the products of a GPT."""
    return ModelConfig(
        vocab_size=vocab,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        ffn_size=round(8 * hidden / 3),
        tie_embeddings=True,
        activation_checkpointing=recomputes,
    )


def llama(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, *, recomputes: bool
) -> ModelConfig:
    """A Llama."""
    return ModelConfig(
        vocab_size=vocab,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_size=ffn,
        activation_checkpointing=recomputes,
    )


def sharded(ranks: int, micro_batch: int, accumulation: int = 1) -> Layout:
    """Stage 3 as FSDP and others have it: gradients in two bytes, none of DeepSpeed's hooks."""
    return Layout(
        nodes=ranks // 8,
        gpus_per_node=8,
        micro_batch=micro_batch,
        accumulation=accumulation,
        stage=3,
        gradient_bytes=2,
        has_hooks=False,
    )


ALONE = Layout(nodes=1, gpus_per_node=1, micro_batch=1, accumulation=1, stage=1)
"""One sequence on one GPU: for runs of which only the computation is compared."""

MPT = "github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md (FSDP; shapes: yamls)"
MPT_SHAPES = {
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}
MPT_ROWS = (
    # GPU, model, seq_len, GPUs, micro-batch, accumulation, recomputes, tokens/s/GPU
    ("a100", "1b", 2048, 8, 14, 4, False, 20513),
    ("a100", "3b", 2048, 8, 10, 2, False, 10811),
    ("a100", "7b", 2048, 8, 6, 2, False, 4641),
    ("a100", "13b", 2048, 8, 2, 3, False, 2262),
    ("a100", "30b", 2048, 8, 3, 21, True, 916),
    ("a100", "70b", 2048, 32, 2, 16, True, 373),
    ("a100", "70b", 2048, 64, 8, 4, True, 410),
    ("a100", "3b", 512, 8, 40, 6, False, 12127),
    ("a100", "7b", 8192, 8, 8, 2, True, 3206),
    ("a100", "1b", 16384, 8, 2, 4, False, 9956),
    ("a100", "7b", 32768, 8, 2, 2, True, 1672),
    ("h100", "1b", 2048, 8, 14, 1, False, 45455),
    ("h100", "3b", 2048, 64, 6, 3, False, 22525),
    ("h100", "7b", 2048, 8, 6, 1, False, 10643),
    ("h100", "13b", 2048, 8, 2, 1, False, 4792),
    ("h100", "13b", 2048, 64, 2, 1, False, 4800),
    ("h100", "30b", 2048, 32, 14, 3, True, 2308),
    ("h100", "70b", 2048, 64, 8, 4, True, 1039),
    ("h100", "1b", 16384, 8, 2, 4, False, 19649),
    ("h100", "7b", 32768, 8, 2, 2, True, 3318),
)
MPT_FITTED = ("a100", "7b", 2048)

MEGATRON = "arXiv 2104.04473, table 1"
MEGATRON_ROWS = (
    # billions of parameters, heads, hidden, layers, TFLOP/s/GPU
    (1.7, 24, 2304, 24, 137),
    (3.6, 32, 3072, 30, 138),
    (7.5, 32, 4096, 36, 142),
    (18.4, 48, 6144, 40, 135),
    (39.1, 64, 8192, 48, 138),
    (76.1, 80, 10240, 60, 140),
    (145.6, 96, 12288, 80, 148),
    (310.1, 128, 16384, 96, 155),
    (529.6, 128, 20480, 105, 163),
    (1008.0, 160, 25600, 128, 163),
)
GPT3 = gpt(96, 12288, 96, 51200, recomputes=True)


def our_gpu() -> Iterator[Run]:
    """What was measured on one H200, by tests/benchmarks/gpu_speed.py."""
    figures = json.loads(OUR_GPU.read_text())["figures"]
    model = llama(22, 2048, 32, 4, 5632, 32000, recomputes=False)
    again = model.model_copy(update={"activation_checkpointing": True})
    for name, shape, stage, accumulation, masked, fitted in (
        ("1b stage 1", model, 1, 4, False, "matmul_share, attention_share of the h200 and h100"),
        ("1b stage 2", model, 2, 4, False, "HOOK_SECONDS of stage 2"),
        ("1b stage 3", model, 3, 4, False, "HOOK_SECONDS of stage 3"),
        ("1b masked, one micro-batch", model, 1, 1, True, "MASKED_SHARE"),
        ("1b stage 1, one micro-batch", model, 1, 1, False, ""),
        ("1b recomputed, one micro-batch", again, 1, 1, False, ""),
    ):
        yield Run(
            f"llama-{name}",
            shape,
            2048,
            "h200",
            Layout(1, 1, 8, accumulation, stage, is_masked=masked),
            figures[name]["tokens_per_second"],
            "tokens/s",
            "docs/evidence/gpu_speed.json, measured",
            fitted=fitted,
        )


def data_parallel() -> Iterator[Run]:
    """Published runs without tensor or pipeline parallelism."""
    for gpu, name, seq_len, ranks, micro_batch, accumulation, recomputes, rate in MPT_ROWS:
        yield Run(
            f"MPT-{name}, {seq_len:,} tokens",
            gpt(*MPT_SHAPES[name], 50368, recomputes=recomputes),
            seq_len,
            gpu,
            sharded(ranks, micro_batch, accumulation),
            rate,
            "tokens/s",
            MPT,
            fitted="matmul_share of the a100" if (gpu, name, seq_len) == MPT_FITTED else "",
            note="an older attention kernel (Triton, 2023)" if seq_len > 8192 else "",
        )
    yield Run(
        "TinyLlama 1.1B",
        llama(22, 2048, 32, 4, 5632, 32000, recomputes=False),
        2048,
        "a100 40GB",
        sharded(16, 8),
        24_000,
        "tokens/s",
        "github.com/jzhang38/TinyLlama, README.md",
    )
    for name, shape, micro_batch, rate in (
        ("7B", llama(32, 4096, 32, 32, 11008, 32000, recomputes=False), 2, 3760),
        ("13B", llama(40, 5120, 40, 40, 13824, 32000, recomputes=False), 1, 1700),
        ("70B", llama(80, 8192, 64, 8, 28672, 32000, recomputes=True), 6, 380),
    ):
        yield Run(
            f"Llama 2 {name} by IBM",
            shape,
            4096,
            "a100",
            sharded(128, micro_batch),
            rate,
            "tokens/s",
            "github.com/foundation-model-stack/fms-fsdp, README.md",
            note="its network is not told; ours is that of the data sheet",
        )
    yield Run(
        "Llama 3 70B by torchtitan",
        llama(80, 8192, 64, 8, 28672, 128256, recomputes=True),
        8192,
        "a100",
        sharded(64, 1),
        331,
        "tokens/s",
        "github.com/pytorch/torchtitan, docs/performance.md, while it had A100 figures",
        note="8,192 tokens follow from the MFU that stands beside",
    )
    for ranks, micro_batch, rate in ((384, 4, 144), (768, 2, 88), (1536, 1, 44)):
        yield Run(
            f"GPT-3 175B, DeepSpeed ZeRO-3 of 2021, micro-batch {micro_batch}",
            GPT3,
            2048,
            "a100",
            sharded(ranks, micro_batch),
            rate,
            "TFLOP/s with recomputation",
            "arXiv 2104.04473, table 2",
            note="65 to 80 s a step at any micro-batch: traffic was slower than assumed here",
        )


def other_parallelism() -> Iterator[Run]:
    """Published runs of which only the computation is compared."""
    for billions, heads, hidden, layers, rate in MEGATRON_ROWS:
        yield Run(
            f"Megatron-LM {billions:g}B",
            gpt(layers, hidden, heads, 51200, recomputes=True),
            2048,
            "a100",
            ALONE,
            rate,
            "TFLOP/s with recomputation",
            MEGATRON,
            kind="compute",
        )
    for name, shape, rate, source in (
        ("GPT-3 175B, Megatron-LM on 384 GPUs", GPT3, 153, "arXiv 2104.04473, table 2"),
        (
            "BLOOM 176B",
            gpt(70, 14336, 112, 250680, recomputes=True),
            150,
            "bigscience.notion.site (BigScience 176B Model: about 150 TFLOPs); counted with "
            "recomputation: github.com/bigscience-workshop/bigscience, train/tr11-176B-ml",
        ),
        (
            "OPT 175B",
            gpt(96, 12288, 96, 50272, recomputes=True),
            147,
            "arXiv 2205.01068, section 2.4 (up to); that it counts recomputation is our guess",
        ),
    ):
        yield Run(
            name, shape, 2048, "a100", ALONE, rate, "TFLOP/s with recomputation", source, "compute"
        )
    big = llama(126, 16384, 128, 8, 53248, 128256, recomputes=False)
    for gpus, seq_len, rate in ((8192, 8192, 430), (16384, 8192, 400), (16384, 131072, 380)):
        yield Run(
            f"Llama 3 405B, {gpus:,} GPUs, {seq_len:,} tokens",
            big,
            seq_len,
            "h100",
            ALONE,
            rate,
            "TFLOP/s",
            "arXiv 2407.21783, table 4",
            kind="compute",
        )
    for name, shape, hours in (
        ("7B", llama(32, 4096, 32, 32, 11008, 32000, recomputes=False), 184_320),
        ("13B", llama(40, 5120, 40, 40, 13824, 32000, recomputes=False), 368_640),
        ("70B", llama(80, 8192, 64, 8, 28672, 32000, recomputes=False), 1_720_320),
    ):
        yield Run(
            f"Llama 2 {name}, all its GPU-hours",
            shape,
            4096,
            "a100",
            ALONE,
            2e12 / hours / 3600,
            "tokens/s",
            "arXiv 2307.09288, table 2: 2 T tokens in those GPU-hours; layout not published",
            kind="compute",
        )


RUNS = (*our_gpu(), *data_parallel(), *other_parallelism())
