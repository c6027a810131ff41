"""Runs a function on several real ranks (gloo), from a fork server that has torch and deepspeed
loaded.

A two-rank case costs about 3 s instead of 7 s through torchrun. The function must be importable,
takes the World first, and returns something picklable; several cases share one process group by
looping inside it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# The fork server inherits this environment when it starts: at the first call.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "deepspeed", "tests.ranks", "train.pretrain", "train.finetune"]
)


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time; the message carries its traceback."""


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0
) -> list[Any]:
    """function(world, *args) on `size` ranks; results in rank order. Leaves no process behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, pipes = [], []
    for rank in range(size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(sender, rank, size, port, function, args))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    deadline = time.monotonic() + timeout
    try:
        return [_answer(rank, pipe, deadline) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
            process.join()


def _answer(rank: int, pipe: Connection, deadline: float) -> Any:
    if not pipe.poll(max(deadline - time.monotonic(), 0)):
        raise RankFailure(f"rank {rank} did not answer in time")
    try:
        ok, value = pipe.recv()
    except EOFError:
        raise RankFailure(f"rank {rank} died without a word") from None
    if not ok:
        raise RankFailure(f"rank {rank} raised:\n{value}")
    return value


def _rank(
    pipe: Connection,
    rank: int,
    size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    from train.world import join_world

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        with join_world() as world:
            value = function(world, *args)
        pipe.send((True, value))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
