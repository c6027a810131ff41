"""Who this process is, and how it ends when it is a rank.

RANK and WORLD_SIZE set -> a torchrun rank; SLURM_STEP_ID set and more than one task in the step ->
an srun rank; otherwise the launcher (a batch shell is never a rank).

A rank of our launcher leaves with 0 after a planned stop, because torchrun turns every other code
into 1. One that fails tells the launcher why (launcher/mailbox.py) and waits: the launcher ends all
ranks together, so that none of the others fails of the first one's silence, and says the reason.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path

from data.durable import told
from data.signals import STOP_SIGNALS
from launcher import mailbox, slurm
from train import rendezvous, watch
from train.progress import at
from train.rendezvous import RendezvousError

log = logging.getLogger(__name__)

WAIT_SECONDS = 60
"""How long a rank that failed waits for its end."""
HEARTBEAT_SECONDS = 20
"""Within which torchrun's rendezvous takes a host for dead that no longer answers, and a bit."""
PR_SET_PDEATHSIG = 1


class Role(StrEnum):
    """What this process is."""

    LAUNCHER = "launcher"
    TORCHRUN_RANK = "torchrun rank"
    SRUN_RANK = "srun rank"


def recognise(environ: Mapping[str, str]) -> Role:
    """Whether this process is a rank or the launcher, from its environment alone."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return Role.TORCHRUN_RANK
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Role.SRUN_RANK
    return Role.LAUNCHER


def rank_of(environ: Mapping[str, str]) -> int:
    """Global rank of this process; 0 for the launcher."""
    role = recognise(environ)
    if role is Role.LAUNCHER:
        return 0
    return int(environ["RANK" if role is Role.TORCHRUN_RANK else "SLURM_PROCID"])


def place_of(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """Global rank, number of ranks, and rank on this machine; (0, 1, 0) for the launcher."""
    role = recognise(environ)
    if role is Role.LAUNCHER:
        return 0, 1, 0
    if role is Role.TORCHRUN_RANK:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    else:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, size, local_rank = (int(environ.get(name, "0")) for name in names)
    return rank, size, local_rank


def run_rank(train: Callable[[], str]) -> int:
    """Train as the rank that this process is; returns its exit code."""
    role, rank = recognise(os.environ), rank_of(os.environ)
    if role is Role.SRUN_RANK:
        os.environ.update(slurm.rendezvous(os.environ))
    rendezvous.expected_hosts = partial(slurm.hosts_of, os.environ)
    folder = mailbox.folder_of(os.environ)
    if folder is None:
        _greet(role, rank)
        at("import")
        try:
            return 1 if train() == "failed" else 0
        except Exception as error:
            # What all ranks refuse alike is no death of a host.
            if getattr(error, "exit_code", None) is None or isinstance(error, RendezvousError):
                _outlast_rendezvous()
            raise
    if not folder.is_dir():
        # The launcher ended while this rank was still being started.
        return 1
    _follow_launcher(folder, rank)
    watch.tell = partial(_tell_stall, folder, rank)
    _greet(role, rank)
    try:
        at("import")
        code = 1 if train() == "failed" else 0
    except Exception as error:
        mailbox.tell_failure(folder, _failure(rank, error))
        time.sleep(WAIT_SECONDS)
        return 1
    mailbox.tell_done(folder, rank)
    return code


def follow_parent(number: signal.Signals) -> None:
    """Have the kernel send us `number` when our parent ends, however it ends; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def _tell_stall(folder: Path, rank: int, message: str) -> None:
    mailbox.tell_failure(folder, mailbox.Failure(rank, message, watch.EXIT_STALLED))


def _greet(role: Role, rank: int) -> None:
    if rank == 0:
        size = "WORLD_SIZE" if role is Role.TORCHRUN_RANK else "SLURM_STEP_NUM_TASKS"
        log.info("%s 0 of %s", role, os.environ[size])


def _follow_launcher(folder: Path, rank: int) -> None:
    # Until the loop listens, a stop request ends the rank: nothing is trained, so nothing is lost.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    # torchrun gives every rank a session of its own: nothing else ends it when torchrun is killed.
    follow_parent(signal.SIGKILL)
    mailbox.register(folder, rank)


def _outlast_rendezvous() -> None:
    """Where torchrun may start its ranks again, wait until it knows which hosts are gone.

    It asks a host that died to the next rendezvous as long as its heartbeat may only be late, 15 s,
    and fails when that host does not come.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) < restarts:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(HEARTBEAT_SECONDS)


def _failure(rank: int, error: Exception) -> mailbox.Failure:
    meant = told(error) if isinstance(error, OSError) else error
    code = getattr(meant, "exit_code", None)
    if code is not None:
        return mailbox.Failure(rank, str(meant), code)
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    return mailbox.Failure(rank, said, traceback="".join(traceback.format_exception(error)))
