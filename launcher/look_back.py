"""Printing what commands that look back at a run have found."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.hindsight import Hindsight
    from train.replay import Replay


def show_hindsight(found: Hindsight, *, as_json: bool) -> None:
    """Print the steps that the guard would not have taken."""
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    for finding in found.findings:
        first, last = finding.samples
        print(
            f"step {finding.step}: would {finding.decision}, samples {first} to {last - 1}: "
            f"{finding.reason}"
        )
    left_out = f", {found.num_skipped} of which the run left out" if found.num_skipped else ""
    print(
        f"{found.num_steps} steps{left_out}: the guard would have objected to {len(found.findings)}"
    )
    if found.num_missing:
        print(
            f"{found.num_missing} good steps more have to be known before anything is out of the "
            "ordinary; a smaller guard.window takes fewer"
        )


def show_replay(found: Replay, run: Path, *, as_json: bool) -> None:
    """Print what a replay has compared; ReplayDiffers, on every rank, when it is not equal."""
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    elif not found.differences:
        begin = f"from the checkpoint of step {found.start}" if found.start else "from nothing"
        state = " and the state in its checkpoint" if found.checkpoint_compared else ""
        print(
            f"{run} step {found.step}, recomputed {begin} on {found.num_ranks} ranks: loss, "
            f"gradient norm and data_hash{state} are equal, bit for bit"
        )


def difference_of(found: Replay, run: Path) -> str:
    """What an unequal replay means; empty for an equal one."""
    if not found.differences:
        return ""
    shown = "\n  ".join(found.differences[:8])
    more = f"\n  and {len(found.differences) - 8} more" if len(found.differences) > 8 else ""
    if found.layout_differs:
        advice = (
            "bits can only be equal on the same layout, machine and releases "
            f"({found.layout_differs}); data_hash must be equal on any"
        )
    elif found.is_harmless:
        advice = (
            "the run has left that step out, so that no weight has seen it and no checkpoint has "
            "to go; what it met then is not in the data: look at the rank's machine, and replay "
            "it once more"
        )
    else:
        advice = (
            "layout, machine and releases are the recorded ones, so that this is silent "
            "corruption, then or now: replay it once more, on another machine of the kind; if it "
            "was then, remove the checkpoints from that step on, and the same training command "
            "goes on from before"
        )
    return f"{run}: the replay is not what was recorded\n  {shown}{more}\n{advice}"
