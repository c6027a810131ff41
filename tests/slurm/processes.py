"""Processes below another, as the kernel lists them."""

from __future__ import annotations

from pathlib import Path


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(n) for task in tasks for n in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def below(pid: int) -> list[int]:
    """All descendants."""
    found = []
    for child in _children(pid):
        found += [child, *below(child)]
    return found


def command_of(pid: int) -> list[str]:
    """Its arguments; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []
