"""What one process asks of the machine that it runs on: a device, and an allocator that keeps."""

from __future__ import annotations

import ctypes
import platform
import sys
from contextlib import suppress
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT_BYTES = 2**30


def best_device() -> tuple[torch.device, torch.dtype | None]:
    """A GPU with weights as they are stored, or the CPU with fp32 weights.

    A dtype of None means: as stored.
    """
    if torch.cuda.is_available():
        return torch.device("cuda"), None
    return torch.device("cpu"), torch.float32


def machine(device: torch.device) -> dict[str, str | int]:
    """What the bits of a kernel's result depend on besides its release."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {
        "device": platform.machine(),
        "processor": processor(),
        # Libraries choose their kernels by it, and it can be set (ATEN_CPU_CAPABILITY).
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The name of this machine's CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the next tensor; returns whether it agreed.

    It hands large blocks back to the kernel, which clears their pages again at every step: 20,000
    to 30,000 page faults and 5 to 10 % of the time of a training step on a CPU. The process stays
    at its peak size. Nothing but glibc has these settings.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, -1))


def flip_bit(values: torch.Tensor) -> None:
    """Flip one bit of the fp32 value in the middle, in place, as failing memory does."""
    values.view(-1).view(torch.int32)[values.numel() // 2] ^= 1 << 22
