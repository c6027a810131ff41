"""What each rank of a preflight leaves in RUN/logs/preflight, for whoever must name one that is
missing or silent.

    00001-HOST.json    what rank 1 has found out so far, and at which phase it is; its time is the
                       rank's last beat, by the clock of the file server
    came-HOST          slurm/pretrain.sbatch: the node runs Python, before there is any rank
    verdict.json       what has come out; there is none before
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data.durable import writing
from launcher import mailbox
from launcher.fitness import PHASES, Facts, Verdict

BEAT_SECONDS = 1.0


def folder_of(run: Path) -> Path:
    """Where the files are."""
    return run / "logs" / "preflight"


class Presence:
    """One rank's file, and its beat until the process ends."""

    def __init__(self, run: Path, facts: Facts) -> None:
        folder = folder_of(run)
        self.facts = facts
        self._path = folder / file_name(facts)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Of an earlier preflight, perhaps on another host.
            for old in folder.glob(f"{facts.rank:05d}-*.json"):
                old.unlink(missing_ok=True)
        self.tell()
        self.began = self._path.stat().st_mtime
        threading.Thread(target=self._beat, name="presence", daemon=True).start()

    def enter(self, phase: str) -> None:
        """Be at a phase."""
        self.tell(phase=phase)

    def tell(self, **found: Any) -> None:
        """Add what was found out."""
        self.facts = replace(self.facts, **found)
        with writing(self._path):
            mailbox.write(self._path, json.dumps(asdict(self.facts)))

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            with suppress(OSError):
                os.utime(self._path)


def file_name(facts: Facts) -> str:
    """Of a rank's file. ValueError where the rank is no number."""
    return f"{facts.rank:05d}-{facts.host}.json"


def left_by_ranks(run: Path, *, since: float = 0.0) -> list[Facts]:
    """What ranks have told in files, without those whose last beat was before `since`."""
    found = {}
    for path in sorted(folder_of(run).glob("[0-9]*-*.json")):
        with suppress(OSError, ValueError, TypeError), path.open(encoding="utf-8") as file:
            # Of the open file: a network file system looks a time up anew only when it opens.
            beat = os.fstat(file.fileno()).st_mtime
            facts = Facts(**json.loads(file.read()))
            # The name says it, too; what contradicts it, or is at no phase of ours, is no rank's.
            if path.name == file_name(facts) and facts.phase in PHASES:
                found[path] = beat, facts
    recent = [(beat, facts) for beat, facts in found.values() if beat >= since]
    newest = max((beat for beat, _ in recent), default=0.0)
    return [replace(facts, silent_seconds=newest - beat) for beat, facts in recent]


def hosts_that_came(run: Path) -> list[str]:
    """Hosts that have run Python for the batch script."""
    return sorted(path.name.removeprefix("came-") for path in folder_of(run).glob("came-*"))


def keep_verdict(run: Path, verdict: Verdict, facts: Iterable[Facts]) -> None:
    """Leave what has come out beside what it came from."""
    path = folder_of(run) / "verdict.json"
    with writing(path):
        # Where no rank has come, none has made it.
        path.parent.mkdir(parents=True, exist_ok=True)
        mailbox.write(path, json.dumps(as_json(verdict, facts), indent=1) + "\n")


def as_json(verdict: Verdict, facts: Iterable[Facts]) -> dict[str, Any]:
    """The verdict as programs read it."""
    return {
        "fit": verdict.is_fit,
        "exclude": list(verdict.exclude),
        "findings": [asdict(finding) for finding in verdict.findings],
        "ranks": [asdict(one) for one in facts],
    }
