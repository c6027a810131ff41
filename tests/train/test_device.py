"""What a machine is told by; and an allocator that keeps what a step frees does not fault it in
again.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from train.attempts import changes
from train.device import machine
from train.promise import promise
from train.settings import TrainConfig

PROGRAM = """
import resource, sys, torch
from train.device import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
def step():
    tensors = [torch.ones(3 * 2**22) for _ in range(2)]  # 48 MiB: glibc maps over 32 anew
for _ in range(20):  # until the heap has places for both
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
    # 10 steps of 96 MiB are 245,760 faults of 4 KiB, or 480 of 2 MiB, when all is given back.
    assert found["kept"] < 40
    assert found["given back"] > 400


def test_a_machine_is_told_by_what_its_kernels_follow() -> None:
    told = machine(torch.device("cpu"))
    assert told["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert told["threads"] == torch.get_num_threads()
    assert set(told) == {"device", "processor", "instructions", "threads"}
    before, after = ({"world_size": 1, "config": {}, "machine": m} for m in (told, {**told}))
    after["machine"]["instructions"] = "DEFAULT"
    (changed,) = changes(before, after)
    assert f"because of {changed}" in promise(TrainConfig(), [changed], device="cpu")
