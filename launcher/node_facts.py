"""What one process can find out about its node alone: libraries, limits, memory, disk, data, port.

No torch but for the question how many GPUs there are; nothing is measured that others disturb.
"""

from __future__ import annotations

import importlib
import resource
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.config import RunConfig


def imported() -> dict[str, Any]:
    """Import what training imports, and say how long it took and which versions it is."""
    start = time.monotonic()
    importlib.import_module("train.pretrain")
    seconds = time.monotonic() - start
    from train.attempts import versions
    from train.preflight import num_gpus

    return {
        "import_seconds": seconds,
        "versions": versions(),
        "num_gpus": num_gpus(),
    }


def node(run: Path, environ: Mapping[str, str], config: RunConfig) -> dict[str, Any]:
    """Limits and room of this node."""
    from train.room import free_at

    shm = Path("/dev/shm")
    rdma = Path("/sys/class/infiniband")
    promised = environ.get("SLURM_GPUS_ON_NODE", "")
    return {
        "promised_gpus": int(promised) if promised.isdecimal() else 0,
        "shm_bytes": free_at(shm).bytes if shm.is_dir() else None,
        "uses_shm": config.data.num_workers > 0 or promised not in ("", "0"),
        "nofile": _limit(resource.RLIMIT_NOFILE),
        "memlock": _limit(resource.RLIMIT_MEMLOCK),
        "core": _limit(resource.RLIMIT_CORE),
        "has_rdma": rdma.is_dir() and any(rdma.iterdir()),
        "port_problem": port_problem(environ),
        "disk_free": free_at(run).bytes,
        "keep": config.checkpoint.keep,
    }


def dataset(config: RunConfig, host: str) -> dict[str, Any]:
    """Whether this node reads the data."""
    from data.probe import probe
    from launcher.goodput import checkpoint_bytes
    from launcher.memory import changed

    try:
        found = probe(config.data, host)
    except (ValueError, OSError) as error:
        return {"dataset_problem": str(error)}
    size = config.model.vocab_size or found.vocab_size
    return {
        "fingerprint": found.fingerprint,
        "num_shards": found.num_shards,
        "checkpoint_bytes": checkpoint_bytes(changed(config, {"model.vocab_size": size})),
    }


def port_problem(environ: Mapping[str, str]) -> str:
    """Why the ranks cannot meet at MASTER_PORT of this machine; empty when they can, when they meet
    elsewhere, or when it is torchrun that already listens there.
    """
    port = environ.get("MASTER_PORT", "")
    first = environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"
    if not port.isdecimal() or not first or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return ""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            return f"port {port} (MASTER_PORT) cannot be used: {error.strerror}"
    return ""


def _limit(which: int) -> int:
    soft, _ = resource.getrlimit(which)
    return -1 if soft == resource.RLIM_INFINITY else soft
