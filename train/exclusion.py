"""RUN/logs/exclude: hosts that a run is not to start on again, one name a line. No torch here.

Preflight adds those that are not fit, the watch those whose ranks no longer answer, the looks for
silent corruption those that differ from the rest or from themselves (train/replicas.py, repeat.py);
slurm/pretrain.sbatch hands the list to Slurm. A host that was mended is taken out by hand.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from data.durable import write_durably, writing


def exclusion_file(run: Path) -> Path:
    """Where the list is."""
    return run / "logs" / "exclude"


def excluded(run: Path) -> list[str]:
    """The hosts on the list; what follows one on its line, and lines after a #, are for people."""
    words = (line.split("#")[0].split() for line in _lines(run))
    return [found[0] for found in words if found]


def _lines(run: Path) -> list[str]:
    path = exclusion_file(run)
    # Whatever somebody has pasted there is kept, byte by byte.
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()


def exclude(run: Path, hosts: Iterable[str]) -> None:
    """Put hosts on the list. One process only."""
    listed = excluded(run)
    new = [host for host in dict.fromkeys(hosts) if host not in listed]
    if not new:
        return
    path = exclusion_file(run)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in [*_lines(run), *new])
    write_durably(path, text.encode(errors="surrogateescape"))


def minority(bad: Iterable[str], hosts: Iterable[str]) -> list[str]:
    """The bad ones among these hosts; none when they are more than half, as where there is only
    one: then it is hardly the hosts.
    """
    everyone = set(hosts)
    found = sorted(set(bad) & everyone)
    return found if 2 * len(found) <= len(everyone) else []


def host_name(environ: Mapping[str, str]) -> str:
    """This machine as Slurm calls it, which need not be its own name, or by its own name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()
