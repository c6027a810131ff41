"""An allocator that keeps what a step frees does not fault it in again."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from train.device import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
def step():
    tensors = [torch.ones(2**21) for _ in range(8)]  # 8 MiB each
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    found = {}
    for mode in ("kept", "given back"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
        )
        kept, faults = done.stdout.split()
        if mode == "kept" and kept == "False":
            pytest.skip("this libc has no such settings")
        found[mode] = int(faults)
    # 10 steps of 64 MiB in pages of 4 KiB are 163,840 faults, when memory is given back each time.
    assert found["kept"] < 1000
    assert found["given back"] > 10 * found["kept"]
