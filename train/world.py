"""Who am I among the ranks, and everything that the ranks say to each other.

The only module that imports torch.distributed and, in train/, reads the environment. `World` is
passed as an argument; nothing else knows its rank. Small facts travel over a gloo group even on
GPUs, so that they never wait for a kernel.
"""

from __future__ import annotations

import datetime
import functools
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from train.affinity import stay_near
from train.attempts import HEARSAY
from train.deadline import Deadline
from train.device import keep_freed_memory
from train.exclusion import host_name
from train.progress import at, starting
from train.rendezvous import Meeting, meet

log = logging.getLogger(__name__)

Group = dist.ProcessGroup
STALL_SECONDS = 600.0
REPEATING = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
}
"""cuBLAS without workspaces that change between calls, NCCL without choosing by size and load."""
REPORT_SECONDS = 60.0
"""A collective fails so long after the watch has noticed (train/watch.py): it knows who is behind.
Applies to every group, DeepSpeed's own included.
"""


@dataclass(frozen=True)
class World:
    """This process among `size` data-parallel ranks."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None
    """gloo group for host-side facts."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what only one may write."""
        return self.rank == 0

    @property
    def host(self) -> str:
        """Name of the machine that this rank is on."""
        return host_name(os.environ)

    def barrier(self) -> None:
        """Collective. Return when every rank has arrived."""
        dist.barrier(group=self.control)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Collective. Sum of a small host tensor over all ranks; int64 wraps modulo 2^64."""
        total = values.detach().to("cpu", copy=True)
        dist.all_reduce(total, group=self.control)
        return total

    def add_up(self, values: torch.Tensor, group: Group | None = None) -> None:
        """Collective. Sum over all ranks, or those of a group, in place, where the tensor is; large
        ones, too.
        """
        dist.all_reduce(values, group=group)

    @contextmanager
    def groups(self, parts: Sequence[Sequence[int]]) -> Iterator[Group | None]:
        """Collective. The group of this rank among these, which share no rank; None where it is in
        none. All ranks name the same ones.
        """
        made = [dist.new_group(list(ranks)) for ranks in parts]
        own = [group for group, ranks in zip(made, parts, strict=True) if self.rank in ranks]
        yield own[0] if own else None
        if own:
            dist.destroy_process_group(own[0])

    def broadcast(self, value: Any) -> Any:
        """Collective. Rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Collective. Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Collective. Run a block that can fail on one rank alone; then every rank raises.

        Errors that people cause (OSError, ValueError) become a RankError; anything else is a bug
        and ends the rank with its traceback.
        """
        error: OSError | ValueError | None = None
        try:
            yield
        except (OSError, ValueError) as failure:
            error = failure
        told = self.gather(error and (type(error).__name__, str(error), exit_code_of(error)))
        for rank, failed in enumerate(told):
            if failed is not None:
                kind, message, code = failed
                if code is None:
                    message = f"{what} failed on rank {rank}: {kind}: {message}"
                raise RankError(message, code or 1) from error


def cause_of(error: BaseException) -> str:
    """An error in words. Of a connection that broke gloo tells the file and line of its own source,
    on a rank that only heard of it.
    """
    text = f"{type(error).__name__}: {error}"
    if not re.search(r"gloo/\S+\] .*Connection (closed|reset) by peer", text):
        return text
    peer = re.search(r"\] .*?\[(\S+?)\]", text)
    return (
        f"{HEARSAY}, its connection from {peer[1] if peer else '?'} broke; what ended "
        "that rank stands in its own log, or in that of its host"
    )


class RankError(ValueError):
    """A rank failed, and every rank knows it and has stopped at the same place."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error that is meant for people; None for any other."""
    code: int | None = getattr(error, "exit_code", None)
    return code


@contextmanager
def join_world(
    *, stall_seconds: float = STALL_SECONDS, repeats: bool = False, timeout_seconds: float = 0
) -> Iterator[World]:
    """Collective. Enter the process group that the environment describes (torchrun or srun), or be
    a world of one. `repeats` keeps GPU libraries to ways that give the same bits every time;
    `timeout_seconds` is how long ranks wait for each other where no watch knows who is behind.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds or stall_seconds + REPORT_SECONDS)
    rank, size, local_rank = _place()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if repeats:
        os.environ.update(REPEATING)
    if cuda:
        torch.cuda.set_device(device)
        stay_near(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
    # DeepSpeed refuses to start without it, even in a world of one.
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    _quiet()
    _give_every_group_a_timeout(timeout)
    at("rendezvous")
    store = _store(rank, size, timeout)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        starting("open")
        yield World(rank, size, local_rank, device, control)
        # Leaving while others still connect or reduce makes their collectives fail.
        dist.barrier(group=control)
    except BaseException:
        # Hanging up would make the others fail too, of our silence; the process ends anyway.
        if size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def slurm_job() -> str | None:
    """The id of the Slurm job that this process belongs to."""
    return os.environ.get("SLURM_JOB_ID")


def slurm_deadline() -> Deadline | None:
    """The end of the Slurm job that this process belongs to."""
    job, end = slurm_job(), os.environ.get("SLURM_JOB_END_TIME", "")
    if job is None:
        return None
    left = int(end) - time.time() if end.isdecimal() else None
    return Deadline(job, seconds_left=left)


def _place() -> tuple[int, int, int]:
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        # DeepSpeed and torch's env:// rendezvous read the torchrun names.
        rank, size, local = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"], env["SLURM_LOCALID"]
        env.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=local)
        return int(rank), int(size), int(local)
    return 0, 1, 0


def _store(rank: int, size: int, timeout: datetime.timedelta) -> c10d.Store:
    """Collective. What all ranks talk through until they have connections; all of them are there.
    RendezvousError names those that are not.
    """
    if size == 1:
        return c10d.HashStore()
    host = host_name(os.environ)
    meeting = Meeting.of(os.environ, rank=rank, size=size, host=host, timeout=timeout)

    def connect() -> c10d.Store:
        # As torch's env:// does it, but for who is waited for.
        return c10d.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            size,
            is_master=meeting.holds_store,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )

    store, prefix = meet(meeting, connect)
    return c10d.PrefixStore(f"{prefix}/default_pg", store)


def _quiet() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch 2.13 renames two collectives that DeepSpeed 0.19 still calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _give_every_group_a_timeout(timeout: datetime.timedelta) -> None:
    # DeepSpeed makes its groups without one, so they would get torch's default of 30 minutes.
    if not hasattr(dist.new_group, "__wrapped__"):
        original = dist.new_group

        @functools.wraps(original)
        def new_group(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **{"timeout": timeout, **kwargs})

        dist.new_group = new_group
