"""Who is blamed when a run stands still."""

from __future__ import annotations

from typing import Any

import pytest

from train.progress import PLACES
from train.watch import verdict_of


def told(rank: int, phase: str, *, step: int = 7, waits: bool = False) -> dict[str, Any]:
    where = {"rank": rank, "host": f"n{rank}", "pid": 100 + rank}
    return {**where, "phase": phase, "step": step, "seconds": 9.0, "reading": "", "waits": waits}


def test_who_waits_in_a_collective_is_not_to_blame() -> None:
    said = verdict_of([told(0, "reduce", waits=True), told(1, "data")], 2)
    assert said.startswith("rank 1 on n1 (process 101) stands still at data of step 7 for 9.0 s")


def test_a_rank_that_tells_nothing_is_named() -> None:
    assert verdict_of([told(0, "reduce", waits=True)], 2).startswith("rank 1 no longer answers: ")


@pytest.mark.parametrize("phase", PLACES)
def test_every_place_has_a_verdict(phase: str) -> None:
    said = verdict_of([told(0, phase), told(1, phase, step=8)], 2)
    assert said.startswith(f"rank 0 on n0 (process 100) stands still at {phase} of step 7")
