"""Runs small enough to mirror, and what happens to their copies."""

from __future__ import annotations

from pathlib import Path

from data.store import Store
from tests.train.checkpoints import write
from train import checkpoint
from train.mirror import Mirror


def small_run(run: Path) -> Path:
    """Checkpoints of steps 10 and 20, of three ranks."""
    for step in (10, 20):
        write(run, step, num_ranks=3)
    (run / "config.json").write_text("{}")
    return run


def back(mirror: Mirror, run: Path, step: int) -> None:
    """What a restoring rank does."""
    saved = mirror.open(step)
    checkpoint.begin(run, step)
    mirror.copy_back(saved, [entry["name"] for entry in saved.manifest["files"]])
    mirror.commit_back(saved)


def flip(store: Store, name: str) -> None:
    """One bit in the middle of a file."""
    raw = bytearray(b"".join(store.read(name)))
    raw[len(raw) // 2] ^= 1
    store.write(name, [bytes(raw)])
