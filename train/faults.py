"""Faults on purpose, for tests: HEADRACE_FAULT=phase:step:rank:kind lets one happen, once.

    import      before a rank imports torch      reduce      before the ranks sum their losses
    rendezvous  before it meets the others       optimizer   before the weights are updated
    build       before the engine is made        snapshot    before a checkpoint's state is copied
    load        before a checkpoint is read      write       before a rank's file is written
    data        before a batch is asked for      commit      before the manifest is written
    forward     before the model is called       prune       before old checkpoints are removed
    backward    before gradients are computed    evaluate    before a batch is validated on
    export      before an export is published

Steps count as in the loop, from 1; `import` to `load`, and `export`, happen at step 0, and so does
the first `evaluate`. What can never happen is refused, and what did not is told at the end. Where
nothing is asked for, a point costs a call and a comparison with None. No torch here.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from dataclasses import dataclass
from typing import ClassVar

VARIABLE = "HEADRACE_FAULT"
AT_START = ("import", "rendezvous", "build", "load")
IN_A_STEP = ("data", "forward", "backward", "reduce", "optimizer")
IN_A_SAVE = ("snapshot", "write", "commit", "prune")
PHASES = (*AT_START, *IN_A_STEP, *IN_A_SAVE, "evaluate", "export")
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
}
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}
KINDS = (*SIGNALS, *ERRORS, "exit", "raise", "nan", "bitflip", "slow", "hang")
ONLY_AT = {"nan": ("forward",), "bitflip": ("backward", "optimizer", "snapshot")}
"""Kinds that change a number, and where one passes by."""
SLOW_SECONDS = 2.0

log = logging.getLogger(__name__)


class FaultError(ValueError):
    """HEADRACE_FAULT asks for something that there is not."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Fault:
    """One fault of one rank."""

    phase: str
    step: int
    rank: int
    kind: str


def parse(text: str) -> Fault:
    """FaultError unless `text` is phase:step:rank:kind, and such a thing can happen there."""
    parts = text.split(":")
    if len(parts) != 4 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        raise FaultError(
            f"{VARIABLE}={text!r} is not phase:step:rank:kind, such as forward:5:1:kill"
        )
    fault = Fault(parts[0], int(parts[1]), int(parts[2]), parts[3])
    for what, found, known in (("phase", fault.phase, PHASES), ("kind", fault.kind, KINDS)):
        if found not in known:
            raise FaultError(
                f"{VARIABLE}={text!r}: no {what} {found!r}; there are {', '.join(known)}"
            )
    places = ONLY_AT.get(fault.kind, PHASES)
    if fault.phase not in places:
        raise FaultError(
            f"{VARIABLE}={text!r}: {fault.kind} changes a number, and none passes by at "
            f"{fault.phase}; it can happen at {', '.join(places)}"
        )
    if fault.step > 0 and fault.phase in (*AT_START, "export"):
        raise FaultError(f"{VARIABLE}={text!r}: {fault.phase} happens at step 0 alone")
    if fault.step == 0 and fault.phase in (*IN_A_STEP, *IN_A_SAVE):
        raise FaultError(f"{VARIABLE}={text!r}: the first {fault.phase} happens at step 1")
    if fault.rank > 0 and fault.phase == "export":
        raise FaultError(f"{VARIABLE}={text!r}: one process exports, and that is rank 0")
    return fault


def check_rank(text: str | None, num_ranks: int) -> None:
    """FaultError when the fault of `text` is to happen to none of so many ranks."""
    if text and (rank := parse(text).rank) >= num_ranks:
        ranks = "rank 0 alone" if num_ranks == 1 else f"ranks 0 to {num_ranks - 1}"
        raise FaultError(f"{VARIABLE}={text!r}: there is no rank {rank} here, but {ranks}")


_armed: Fault | None = None


def arm(text: str | None, rank: int) -> None:
    """Let the fault of `text` happen when this rank comes to it; None or empty: nothing happens."""
    global _armed
    fault = parse(text) if text else None
    _armed = fault if fault is not None and fault.rank == rank else None


def point(phase: str, step: int = 0) -> None:
    """A place where a fault may happen. OSError or RuntimeError, where that is the fault."""
    if _armed is not None and _is_here(phase, step) and _armed.kind not in ONLY_AT:
        _happen(_disarm())


def hits(phase: str, step: int, kind: str) -> bool:
    """Whether a number that passes by here is to be changed, as a kind of ONLY_AT says."""
    if _armed is None or not _is_here(phase, step) or _armed.kind != kind:
        return False
    _disarm()
    return True


def tell_missed() -> None:
    """At the end of a run: warn when this rank has not come to where its fault is to happen."""
    if _armed is not None:
        what = f"{_armed.kind} at {_armed.phase}, step {_armed.step}"
        log.warning(
            "%s: %s did not happen, as rank %d never came there", VARIABLE, what, _armed.rank
        )


def _is_here(phase: str, step: int) -> bool:
    return _armed is not None and (_armed.phase, _armed.step) == (phase, step)


def _disarm() -> Fault:
    global _armed
    fault, _armed = _armed, None
    assert fault is not None
    log.warning("%s: %s at %s, step %d", VARIABLE, fault.kind, fault.phase, fault.step)
    return fault


def _happen(fault: Fault) -> None:
    if fault.kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.kind])
    elif fault.kind in ERRORS:
        code = ERRORS[fault.kind]
        raise OSError(code, os.strerror(code), f"{VARIABLE} {fault.phase}")
    elif fault.kind == "exit":
        os._exit(0)
    elif fault.kind == "raise":
        raise RuntimeError(f"{VARIABLE} {fault.phase}")
    elif fault.kind == "slow":
        time.sleep(SLOW_SECONDS)
    elif fault.kind == "hang":
        while True:
            time.sleep(3600)
