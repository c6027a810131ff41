"""What data sheets say about GPUs, and what share of it the work of this trainer reaches.

Bandwidths are in one direction, per GPU. The shares are not from data sheets: each names the run
that it was fitted to (docs/evidence/published_runs.json lists those runs apart from those that are
only predicted).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import ClassVar

GB = 10**9


class GpuError(ValueError):
    """A GPU that nothing is known of."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Gpu:
    """One GPU of a server with eight of them."""

    memory_bytes: int
    bf16_flops: float
    """Dense bf16 FLOP/s, without sparsity."""
    fp32_flops: float
    """FLOP/s outside the tensor cores: torch multiplies fp32 matrices exactly by default."""
    hbm_bytes: float
    """Bytes/s of its own memory."""
    nvlink_bytes: float
    """Bytes/s to the other GPUs of its server."""
    network_bytes: float
    """Bytes/s to other servers: one network port for each GPU."""
    host_bytes: float
    """Bytes/s to the host's memory, over PCIe x16."""
    tdp_watts: float
    matmul_share: float
    """Of the peak FLOP/s, by large matrix products, operands from memory aside."""
    attention_share: float
    """Of the peak FLOP/s, by the attention kernel, forward and backward."""
    source: str

    def peak(self, precision: str) -> float:
        """FLOP/s that a share is taken of."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops


GPUS = {
    "a100": Gpu(
        80 * GB, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 32e9, 400, 0.76, 0.50,
        "NVIDIA A100 80GB SXM data sheet; network: 200 Gb/s per GPU (arXiv 2104.04473, section 5)",
    ),
    "h100": Gpu(
        80 * GB, 989.4e12, 67e12, 3.35e12, 450e9, 50e9, 64e9, 700, 0.67, 0.33,
        "NVIDIA H100 SXM5 data sheet (1,978.9 TFLOP/s with sparsity); network: 400 Gb/s per GPU "
        "(arXiv 2407.21783, section 3.3.1)",
    ),
    "h200": Gpu(
        141 * GB, 989.4e12, 67e12, 4.8e12, 450e9, 50e9, 64e9, 700, 0.67, 0.33,
        "NVIDIA H200 SXM data sheet (1,978.9 TFLOP/s with sparsity); network: 400 Gb/s per GPU, as "
        "for the H100",
    ),
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`; GpuError lists the names."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise GpuError(f"unknown GPU {name!r}; {hint}known: {', '.join(GPUS)}")
