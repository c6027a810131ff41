"""A rank that stands still ends the run, with the stacks of all ranks in one report.

    RUN/attempts/000003.stall-00001.json   what a rank tells: where it is, since when, its threads
    RUN/attempts/000003.stall.json         the report of all of them, with the verdict

A thread of every rank looks at its own progress (train/progress.py). When that stops for
`stall_seconds`, it writes its file; so does every rank that sees another's. Ranks that wait for a
collective stand still, too: the one that keeps them waiting is the one that tells nothing at all,
else one that is in no collective, else the one that is behind. The lowest rank that tells writes
the report, and puts the hosts of ranks that tell nothing on the run's list (train/exclusion.py).
No torch here.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.durable import StorageError, write_durably
from train.attempts import end_attempt
from train.exclusion import exclude, minority
from train.faults import AT_START
from train.ownership import FOLDER
from train.progress import PLACES, Place, here

EXIT_STALLED = 4
START_SECONDS = 60.0
"""What a part of the start may take, however short `stall_seconds` is: libraries are loaded there,
and kernels compiled.
"""
GATHER_SECONDS = 2.0
"""How long the report waits for ranks that have not told."""
END_SECONDS = 10.0
"""How long ranks that have told wait to be ended by the launcher."""

log = logging.getLogger(__name__)

tell: Callable[[str], None] | None = None
"""How the launcher hears why the run ends; set where there is one."""


class Watch:
    """Watches this rank from a thread, until `close`."""

    def __init__(
        self,
        run: Path,
        *,
        attempt: int,
        rank: int,
        hosts: Sequence[str],
        stall_seconds: float,
        reading: Callable[[int], str],
    ) -> None:
        self._prefix = run / FOLDER / f"{attempt:06d}.stall"
        self._run = run
        self._attempt = attempt
        self._rank = rank
        self._hosts = hosts
        self._stall_seconds = stall_seconds
        self._reading = reading
        self._begun = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No longer watch."""
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        period = min(1.0, self._stall_seconds / 10)
        while not self._closed.wait(period):
            place = here()
            # Whatever came before was nobody's to watch.
            seconds = min(place.seconds, time.monotonic() - self._begun)
            least = START_SECONDS if place.phase in AT_START else 0.0
            if seconds > max(self._stall_seconds, least) or any(self._told()):
                self._end()

    def _told(self) -> list[Path]:
        # Storage that fails must not end the watch.
        with suppress(OSError):
            return sorted(self._prefix.parent.glob(f"{self._prefix.name}-*.json"))
        return []

    def _end(self) -> None:
        """Tell, have one rank report, and leave. Does not return."""
        name, own = f"-{self._rank:05d}.json", json.dumps(self._own())
        self._write(name, own)
        deadline = time.monotonic() + GATHER_SECONDS
        while len(self._told()) < len(self._hosts) and time.monotonic() < deadline:
            time.sleep(0.1)
        # A network file system lists a folder anew when something was written to it, and who has
        # told must not be taken for silent.
        self._write(name, own)
        found = []
        for path in self._told():
            with suppress(OSError):
                found.append(json.loads(path.read_bytes()))
        if found and found[0]["rank"] == self._rank:
            message = self._report(found)
            if tell is not None:
                tell(message)
            else:
                log.error("%s", message)
                with suppress(OSError, StorageError):
                    end_attempt(
                        self._run, self._attempt, outcome="failed", step=None, reason=message
                    )
                os._exit(EXIT_STALLED)
        time.sleep(END_SECONDS)
        os._exit(EXIT_STALLED)

    def _report(self, found: Sequence[dict[str, Any]]) -> str:
        """Write the report, and put hosts on the run's list; what to say."""
        verdict = verdict_of(found, self._hosts)
        silent = [self._hosts[rank] for rank in silent_ranks(found, self._hosts)]
        out = minority(silent, self._hosts)
        content = {"verdict": verdict, "exclude": out, "ranks": found}
        report = self._write(".json", json.dumps(content, indent=1) + "\n")
        with suppress(OSError, StorageError):
            exclude(self._run, out)
        return f"{verdict}; stacks of all ranks: {report}"

    def _write(self, ending: str, content: str) -> Path:
        path = self._prefix.with_name(self._prefix.name + ending)
        with suppress(OSError, StorageError):
            write_durably(path, content.encode())
        return path

    def _own(self) -> dict[str, Any]:
        place = here()
        return {
            "rank": self._rank,
            "host": self._hosts[self._rank],
            "pid": os.getpid(),
            "phase": place.phase,
            "step": place.step,
            "seconds": round(place.seconds, 1),
            "reading": self._reads(place),
            "waits": _waits(),
            "stacks": stacks(),
        }

    def _reads(self, place: Place) -> str:
        if place.phase != "data":
            return ""
        try:
            return self._reading(place.step)
        except Exception as error:
            # A report without it is better than none.
            return f"unknown ({type(error).__name__}: {error})"


def silent_ranks(found: Sequence[dict[str, Any]], hosts: Sequence[str]) -> list[int]:
    """Ranks that have told nothing."""
    return sorted(set(range(len(hosts))) - {told["rank"] for told in found})


def verdict_of(found: Sequence[dict[str, Any]], hosts: Sequence[str]) -> str:
    """Who keeps the others waiting, from what the ranks on these hosts have told."""
    silent = silent_ranks(found, hosts)
    if silent:
        last = max(found, key=_order)
        where = ", ".join(dict.fromkeys(hosts[rank] for rank in silent))
        return (
            f"rank {', '.join(map(str, silent))} on {where} no longer answers: its process is "
            f"stopped, its "
            f"machine is gone, or a call holds the interpreter; rank {last['rank']} waits at "
            f"{last['phase']} of step {last['step']} for {last['seconds']} s; look at that "
            "machine, and the same command goes on from the last checkpoint"
        )
    behind = min(found, key=_order)
    where = f", {behind['reading']}" if behind["reading"] else ""
    return (
        f"rank {behind['rank']} on {behind['host']} (process {behind['pid']}) stands still at "
        f"{behind['phase']} of step {behind['step']} for {behind['seconds']} s{where}; the same "
        "command goes on from the last checkpoint"
    )


def stacks() -> str:
    """The Python stacks of all threads of this process, innermost calls first. Made without a file,
    not even the sources: storage that does not answer may be why this rank stands still.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    told = []
    for ident, frame in sys._current_frames().items():
        calls = [
            f'  File "{called.f_code.co_filename}", line {line} in {called.f_code.co_name}'
            for called, line in traceback.walk_stack(frame)
        ]
        told.append("\n".join([f"Thread {names.get(ident, ident)}:", *calls]))
    return "\n\n".join(told) + "\n"


def _waits() -> bool:
    """Whether the main thread is in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = traceback.extract_stack(frame)[-8:]
    return any("torch/distributed/" in called.filename for called in innermost)


def _order(told: dict[str, Any]) -> tuple[bool, int, int, float]:
    """Those who wait come last; of two at the same place, the one that came later is behind."""
    return told["waits"], told["step"], PLACES.index(told["phase"]), told["seconds"]
