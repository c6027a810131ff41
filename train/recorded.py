"""What a run has recorded of the steps that a replay computes again: their rows, which of them were
left out and why, and what their bits depend on. No torch.

Everything comes from the attempts that have computed the steps, as the rows tell, and not from
RUN/config.json: an attempt may change what it is free to. Only where the data lies is told by the
last one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.attempts import attempts, changes
from train.checkpoint import committed
from train.config import RunConfig
from train.decode import decode
from train.events import SKIP, read_events
from train.guard import Decision, Guard, Verdict
from train.rows import ReplayUsageError, Row, read_metrics, row_of, start_of

COMPARED = ("loss", "grad_norm", "data_hash", "skipped")
PLACES = ("cache_dir", "cache_bytes", "stage")
"""Keys of [data] that say where it is kept on the way, besides its paths."""
MOVE_NO_BIT = (
    *("checkpoint.", "data.", "eval.", "guard.", "log.", "stall_seconds"),
    *("batch_tokens", "seq_len", "model.max_seq_len", "micro_batch"),
)
"""Keys (or prefixes) that differ between attempts and count for no bit of a replay: which samples a
step has, and whether it was taken, is recorded; what micro_batch comes to is compared instead.
"""


@dataclass(frozen=True)
class Recorded:
    """The steps on the way to one, from the checkpoint before it."""

    step: int
    start: int
    """The step whose checkpoint it begins with; 0 is the initial weights."""
    config: dict[str, Any]
    """Of the attempt that has computed the step, with the places where the data is now."""
    machine: dict[str, Any]
    """Of that attempt."""
    starts: tuple[dict[str, Any], ...]
    """How each attempt on the way was started."""
    rows: dict[int, Row]
    """Of the steps on the way; those that the guard has judged and left out with their numbers."""


def recorded(run: Path, step: int) -> Recorded:
    """ReplayUsageError when the step has no row, or cannot be computed by one engine with those
    before it.
    """
    own = start_of(run, row_of(run, step))
    if "task" in own["config"]:
        raise ReplayUsageError(
            f"{run} is a fine-tuning run; only steps of `headrace pretrain` can be replayed"
        )
    start = max((saved for saved in committed(run) if saved < step), default=0)
    # By its reason, too: a step that the guard has left out may be listed after a rollback.
    judged = {(e["step"], e["attempt"], e["reason"]): e for e in read_events(run, SKIP)}
    rows: dict[int, Row] = {}
    starts: dict[int, dict[str, Any]] = {}
    for row in read_metrics(run):
        if "data_hash" in row and start < row["step"] <= step:
            event = judged.get((row["step"], row["attempt"], row.get("reason")), {})
            numbers: Row = {key: event[key] for key in ("loss", "grad_norm") if key in event}
            rows[row["step"]] = {**row, **numbers}
            starts[row["attempt"]] = start_of(run, row)
            _check_alike(run, start, step, row["step"], starts[row["attempt"]], own)
    last = [one for one in attempts(run) if one["event"] == "start"][-1]
    return Recorded(
        step=step,
        start=start,
        config=_where_it_is(own["config"], last["config"]["data"]),
        machine=own.get("machine", {}),
        starts=tuple(starts.values()),
        rows=rows,
    )


def differing(row: Row, found: Row) -> list[str]:
    """What the recorded row of a step, empty where there is none, and another disagree on, with
    both values.
    """
    if not row:
        return []
    return [
        f"{key} {row.get(key)!r} recorded, {found.get(key)!r} now"
        for key in COMPARED
        if row.get(key) != found.get(key)
    ]


def layout_differs(plan: Recorded, now: Mapping[str, Any], *, wanders: bool) -> str:
    """Why a replay cannot have the recorded bits: what differs between the attempts on the way and
    `now`, which has their `world_size`, `config`, `versions` and `machine`. `wanders`: a GPU whose
    kernels need not repeat themselves.
    """
    found = []
    for start in plan.starts:
        told = changes(start, now)
        found += [change for change in told if not change.startswith(MOVE_NO_BIT)]
        then = _passes(start)
        found += [f"{k}: {then[k]} -> {v}" for k, v in _passes(now).items() if then[k] != v]
    if wanders:
        found.append("GPU kernels add up in another order every time without train.deterministic")
    return "; ".join(dict.fromkeys(found))


class AsRecorded(Guard):
    """Leaves out the steps that the run has left out, whatever its guard was told since; those that
    it has judged are computed all the same, to compare what it saw.
    """

    def __init__(self, plan: Recorded) -> None:
        super().__init__(decode(RunConfig, plan.config).guard)
        self._rows = plan.rows
        self.numbers: dict[str, float | None] = {}
        """Loss and gradient norm of the last step, null for what is no number; empty when it was
        not computed.
        """

    def lists(self, step: int) -> str:
        """The recorded reason of a step that was left out without a look at it."""
        self.numbers = {}
        row = self._rows.get(step, {})
        return row["reason"] if row.get("skipped") and "loss" not in row else ""

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """None: it is known how the step was judged."""
        return Verdict(False, False, "")

    def settle(
        self, step: int, *, loss: float, grad_norm: float, is_bad: bool, is_high: bool
    ) -> Decision:
        """What has become of the step."""
        told = {"loss": loss, "grad_norm": grad_norm}
        self.numbers = {key: one if math.isfinite(one) else None for key, one in told.items()}
        return "skip" if self._rows.get(step, {}).get("skipped") else "step"


def _check_alike(
    run: Path, start: int, step: int, number: int, other: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    then, now = (
        ", ".join(f"{key}={one['config'][key]}" for key in ("batch_tokens", "seq_len"))
        for one in (other, own)
    )
    if then != now:
        raise ReplayUsageError(
            f"step {step} of {run} was computed with {now}, and step {number}, on the way to it "
            f"from {f'the checkpoint of step {start}' if start else 'the initial weights'}, with "
            f"{then}; one replay cannot compute both. Replay a step before the change, or one that "
            f"has a checkpoint between the two: `headrace checkpoint ls {run}` lists them"
        )


def _where_it_is(config: dict[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an attempt, with the data where the last attempt has found it."""
    data = {**config["data"], **{key: last[key] for key in PLACES if key in last}}
    if data["path"] and last["path"]:
        data["path"] = last["path"]
    paths = {source["name"]: source["path"] for source in last.get("sources", ())}
    data["sources"] = [
        {**source, "path": paths.get(source["name"], source["path"])}
        for source in data.get("sources", ())
    ]
    return {**config, "data": data}


def _passes(start: Mapping[str, Any]) -> dict[str, int]:
    """Sequences per rank and forward pass, and forward passes per step, of an attempt."""
    config = decode(RunConfig, start["config"], name="attempts.jsonl")
    layout = config.layout(config.batch_samples, num_ranks=start["world_size"])
    return dict(zip(("micro_batch", "accumulation"), layout, strict=True))
