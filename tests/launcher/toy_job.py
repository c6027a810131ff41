"""A job without torch, started like a real one: `python -m tests.launcher.toy_job WHAT RUN`."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

from launcher import spawn
from train.attempts import HEARSAY, attempts
from train.stop import StopRequest


class ToyRefusal(ValueError):
    """What a rank says to a person."""

    exit_code = 2


def main() -> None:
    """Be the launcher or one of two ranks, and leave as `headrace` does."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    what, run = sys.argv[1], Path(sys.argv[2])
    try:
        sys.exit(
            spawn.run_job(
                lambda: train(what, run), run=run, num_processes=2, program="tests.launcher.toy_job"
            )
        )
    except spawn.LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def train(what: str, run: Path) -> str:
    """Do WHAT: refuse, crash, die, hear of a death, complete, or wait to be stopped, and save, die
    or be deaf.
    """
    rank = int(os.environ["RANK"])
    (run / f"rank-{rank}").write_text(f"{os.getpid()} {os.getppid()}")
    while not (run / "rank-0").exists():
        time.sleep(0.01)
    if what == "refuse":
        raise ToyRefusal("steps=60 in the run, 61 now")
    if what == "refuse alone" and rank == 1:
        raise ToyRefusal("shard-000000.tar is damaged")
    if what == "crash" and rank == 1:
        raise RuntimeError("out of luck")
    if what == "die" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hear of a death":
        if rank == 1:
            while not any("reason" in row for row in attempts(run)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        begin(run, 1)
        heard = f"{HEARSAY}, its connection from 10.0.0.2 broke"
        add_row(run, {"attempt": 1, "event": "end", "outcome": "failed", "reason": heard})
        time.sleep(60)
    if what == "complete":
        if rank == 0:
            begin(run, 1)
        return end(run, rank, "complete")
    if what == "refused by another" and rank == 0:
        add_row(run, {"attempt": 1, "event": "start", "host": "node7", "pid": os.getpid()})
        raise ToyRefusal("the run is being trained by attempt 1")
    if rank == 0:
        begin(run, 1)
    stop = StopRequest()
    if what in ("wait", "wait and die"):
        stop.listen()
    (run / f"listening-{rank}").touch()
    for _ in range(600):
        if stop.reason is not None and what == "wait and die" and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if stop.reason is not None and what == "wait":
            return end(run, rank, "stopped")
        time.sleep(0.1)
    return "failed"


def end(run: Path, rank: int, outcome: str) -> str:
    """Record the outcome as a real run does."""
    if rank == 0:
        add_row(run, {"attempt": 1, "event": "end", "outcome": outcome})
    return outcome


def begin(run: Path, number: int) -> None:
    """Record that this rank begins an attempt."""
    row = {"attempt": number, "event": "start", "host": socket.gethostname(), "pid": os.getpid()}
    add_row(run, row)


def add_row(run: Path, row: dict[str, object]) -> None:
    """Append to attempts.jsonl."""
    with (run / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
