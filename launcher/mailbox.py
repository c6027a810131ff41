"""What the ranks of a launch tell their launcher: files in a private folder that both know.

    rank-00001.pid        the rank has started; signals for it go to this process
    done-00001            it has ended as planned
    failed-00001.json     it has failed, and why; it waits to be ended together with the others
    last-words            torchrun: how the first rank ended that did not tell

A file is whole when it is there. The folder lives as long as torchrun; HEADRACE_LAUNCH names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "HEADRACE_LAUNCH"
LAST_WORDS = "last-words"


@dataclass(frozen=True)
class Failure:
    """Why a rank failed."""

    rank: int
    message: str
    exit_code: int | None = None
    """None for an error that nobody expected."""
    traceback: str = ""


def folder_of(environ: Mapping[str, str]) -> Path | None:
    """The folder of the launch that this process belongs to; None without one."""
    name = environ.get(VARIABLE, "")
    return Path(name) if name else None


def register(folder: Path, rank: int) -> None:
    """Tell that this process is rank `rank`."""
    write(folder / f"rank-{rank:05d}.pid", str(os.getpid()))


def tell_done(folder: Path, rank: int) -> None:
    """Tell that this rank ends as planned."""
    write(folder / f"done-{rank:05d}", "")


def tell_failure(folder: Path, failure: Failure) -> None:
    """Tell why this rank failed."""
    write(folder / f"failed-{failure.rank:05d}.json", json.dumps(asdict(failure)))


def processes(folder: Path) -> dict[int, int]:
    """Rank -> process id, of every rank that has started."""
    return {_rank(path): int(path.read_text()) for path in sorted(folder.glob("rank-*.pid"))}


def first_failure(folder: Path) -> Failure | None:
    """The failure that was told first."""
    told = sorted(folder.glob("failed-*.json"), key=lambda path: path.stat().st_mtime_ns)
    return Failure(**json.loads(told[0].read_text(encoding="utf-8"))) if told else None


def silent_ranks(folder: Path) -> list[int]:
    """Ranks whose process is gone, although they have told neither a failure nor a planned end."""
    # Looked at before what was told: a rank tells first and goes then.
    gone = [rank for rank, pid in processes(folder).items() if not _is_running(pid)]
    told = {_rank(path) for kind in ("done", "failed") for path in folder.glob(f"{kind}-*")}
    return [rank for rank in gone if rank not in told]


def last_words(folder: Path) -> str:
    """What torchrun said of the first rank that failed without a word; empty if nothing."""
    path = folder / LAST_WORDS
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def write(path: Path, text: str) -> None:
    """Have the file appear with all of its text."""
    # A leading dot keeps it from the patterns above.
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def _rank(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
