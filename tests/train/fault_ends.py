"""What a run on two ranks that meets a fault ends with, for each phase and kind."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.ranks import FAIL_SECONDS
from train.faults import ERRORS, VARIABLE, Fault

STEP, RANKS, STEPS = 6, 2, 8
"""A step with a checkpoint and a validation, of so many; those before are of step BEFORE."""
BEFORE = 3
ON_PURPOSE = ("term", "usr1")
STANDS_STILL = ("stop", "hang")
STALL_SECONDS = 5
"""After which the watch ends the others."""
NOTICED_SECONDS = 5
"""In which all ranks have ended of a death, or a stall is reported."""


@dataclass(frozen=True)
class Ended:
    """What has become of a run that was to meet a fault."""

    struck: str
    """What the rank said before the fault happened to it; empty: none happened."""
    told: dict[int, str]
    """By rank: its outcome, or why it has none. Missing: it had to be killed."""
    seconds: float
    """From the fault until all ranks had ended, or until the report of one that stands still."""
    verdict: str
    """Of that report."""
    committed: list[int]
    reached: int
    """Step of the last row."""


def check_end(fault: Fault, ended: Ended) -> None:
    """What each kind makes of a run, and what that leaves."""
    others = set(range(RANKS)) - {fault.rank}
    # Besides that nothing else tells a fault that strikes from one that does not.
    assert ended.struck == f"{VARIABLE}: {fault.kind} at {fault.phase}, step {fault.step}", ended
    if fault.kind in ("slow", "bitflip"):
        # No run stops of a flipped bit at once: the replicas' hashes and `replay` tell.
        assert set(ended.told.values()) == {"complete"}, ended
        assert (ended.committed, ended.reached) == ([STEPS, STEP, BEFORE], STEPS), ended
    elif fault.kind in ON_PURPOSE:
        assert set(ended.told.values()) == {"stopped"}, ended
        assert ended.reached in stopped_at(fault), ended
        assert ended.committed[:1] == ([ended.reached] if ended.reached else []), ended
    elif fault.kind in STANDS_STILL:
        assert ended.verdict.startswith(f"rank {fault.rank} on "), ended
        if fault.kind == "hang":
            # A writer is a thread; its rank waits for it.
            place = {"write": "disk"}.get(fault.phase, fault.phase)
            assert f" stands still at {place} of step " in ended.verdict, ended
        # Of a writer that hangs the loop hears at the next save.
        until_then = NOTICED_SECONDS if (fault.phase, fault.kind) == ("write", "hang") else 0
        assert ended.seconds <= STALL_SECONDS + NOTICED_SECONDS + until_then, ended
        assert ended.committed == left(fault), ended
    else:
        # Ranks that still make their groups wait for each other: the launcher would end them.
        waiting = others - set(ended.told) if fault.phase == "build" else set()
        check_death(fault, ended.told[fault.rank], [ended.told[r] for r in others - waiting])
        seconds = ended.seconds - (FAIL_SECONDS if waiting else 0)
        assert seconds <= NOTICED_SECONDS, ended
        assert ended.committed == left(fault), ended


def check_death(fault: Fault, own: str, others: list[str]) -> None:
    """Every rank fails, and it can be told of which one, and of what."""
    assert all(told.startswith("raised:") for told in others), others
    if fault.kind == "nan":
        # The sum that the ranks make of it has no culprit.
        assert all("NonFiniteLoss: step 6: loss nan" in told for told in (own, *others)), own
        return
    if fault.kind in ("kill", "exit"):
        assert own.strip() == "died without a word", own
    else:
        error = f"OSError: [Errno {ERRORS[fault.kind]}]" if fault.kind in ERRORS else "RuntimeError"
        assert re.search(rf"{re.escape(error)}.*{VARIABLE} {fault.phase}", own), own
    for told in others:
        named = re.findall(rf"failed on rank (\d+): .*{VARIABLE}", told)
        assert VARIABLE not in told or set(named) == {str(fault.rank)}, told


def left(fault: Fault) -> list[int]:
    """The checkpoints after a death: never is more than an interval lost."""
    if fault.phase == "build":
        return []
    # Rank 0 commits without the others.
    has_committed = fault.phase == "prune" or (fault.phase == "commit" and fault.rank != 0)
    return [STEP, BEFORE] if has_committed else [BEFORE]


def stopped_at(fault: Fault) -> range:
    """Steps at which a request ends the run: those of the start before the first one, those of a
    step at its end, those of a writer as soon as the loop gets to know.
    """
    if fault.phase in ("build", "load"):
        return range(0, 1) if fault.phase == "build" else range(BEFORE, BEFORE + 1)
    in_background = fault.phase in ("write", "commit", "prune")
    return range(STEP, STEPS + 1 if in_background else STEP + 1)
