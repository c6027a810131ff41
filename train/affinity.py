"""Keep a rank on the cores of its GPU's NUMA node.

A core of the other socket reaches the GPU, and the memory that the rank has touched first, over the
link between the sockets: torch names 1 to 10 % of a step (torch/numa/binding.py). torchrun's own
--numa-binding needs the numactl program on every node and binds no rank that srun has started.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def stay_near(device: torch.device) -> frozenset[int]:
    """Bind this process to the cores near a GPU; returns those it may run on afterwards."""
    # torch's stubs do not know these, as its own binding notes.
    found: Any = torch.cuda.get_device_properties(device)
    address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    return bind(cores_near(address))


def cores_near(address: str, *, sysfs: Path = Path("/sys")) -> frozenset[int]:
    """Cores of the NUMA node of a PCI device, such as 0000:3b:00.0; none where Linux tells none."""
    try:
        told = (sysfs / "bus/pci/devices" / address / "local_cpulist").read_text()
    except OSError:
        return frozenset()
    ranges = [part.split("-") for part in told.strip().split(",") if part]
    return frozenset(core for ends in ranges for core in range(int(ends[0]), int(ends[-1]) + 1))


def bind(cores: frozenset[int]) -> frozenset[int]:
    """Bind every thread of this process to those of `cores` that it may run on, or, where there is
    none of them, leave it as Slurm or a person has bound it; returns the cores it may run on.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    chosen = allowed & cores or allowed
    if chosen != allowed:
        for thread in Path("/proc/self/task").iterdir():
            # One that has ended meanwhile needs none.
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), chosen)
    return chosen
