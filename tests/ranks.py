"""Runs a function on several real ranks (gloo), from a fork server that has torch and deepspeed
loaded.

A short run on two ranks takes 1 s of CPU instead of 18 s through torchrun. The function must be
importable, takes the World first, and returns something picklable; several cases share one process
group by looping inside it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FAIL_SECONDS = 5.0

# The fork server inherits this environment when it starts: at the first call.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

_context = multiprocessing.get_context("forkserver")
PRELOADED = [
    "tests.preloaded",
    "tests.ranks",
    "train.pretrain",
    "train.finetune",
]


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time; the message carries its traceback."""


def start_server() -> None:
    """Start the fork server, unless one runs. A process has one only: if loader processes were the
    first to need it, every rank would have to import all the rest.
    """
    _context.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def share_server() -> None:
    """In a process of the fork server: its loader processes come from there, too. It would start a
    server of its own for them, which imports torch for 2 s. Not for ranks that are killed while
    they start processes: the server ends of a request that is cut.
    """
    # It has the address; whether that server still runs only the parent could ask.
    forkserver._forkserver.ensure_running = lambda: None


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0
) -> list[Any]:
    """function(world, *args) on `size` ranks; results in rank order. Leaves no process behind."""
    start_server()
    port = _free_port()
    processes, pipes = [], []
    for rank in range(size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(sender, rank, size, port, function, args))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        answers = _answers(pipes, timeout)
        for process in processes:
            process.join(10)
        return answers
    finally:
        for process in processes:
            process.kill()
            process.join()


def _free_port() -> int:
    """None of those that the system hands to whoever connects: one of them might be taken by the
    time that rank 0 listens.
    """
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = random.SystemRandom().randrange(10_000, 32_000)
            probe.bind(("127.0.0.1", port))
            return port


def _answers(pipes: list[Connection], timeout: float) -> list[Any]:
    """What the ranks return. When one has failed the others have FAIL_SECONDS to fail of it."""
    deadline = time.monotonic() + timeout
    values: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(values) + len(failures) < len(pipes):
        waiting = {p: r for r, p in enumerate(pipes) if r not in values and r not in failures}
        ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for pipe in ready:
            rank = waiting[pipe]
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, None
            if ok:
                values[rank] = value
                continue
            failures[rank] = f"raised:\n{value}" if value else "died without a word"
            deadline = min(deadline, time.monotonic() + FAIL_SECONDS)
    if failures:
        # In the order in which they came: the first is why the others fail.
        raise RankFailure("\n".join(f"rank {rank} {told}" for rank, told in failures.items()))
    for rank in range(len(pipes)):
        if rank not in values:
            raise RankFailure(f"rank {rank} did not answer in time")
    return [values[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection,
    rank: int,
    size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import train.ceiling
    from train.world import join_world

    share_server()
    # Else a third of a short run.
    train.ceiling.CEILING_SECONDS = 0.01
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
