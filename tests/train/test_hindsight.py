"""What the guard would have done, from rows and events that are written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from train.config import ConfigError, RunConfig
from train.events import GIVE_UP, SKIP, record
from train.hindsight import hindsight
from train.run import last_config
from train.settings import GuardConfig


def write_rows(run: Path, losses: list[float | None], **first: Any) -> None:
    """A row of every step; None for one that was skipped. `first` stands in the first one."""
    run.mkdir()
    rows = [
        {
            "step": n,
            **({"skipped": True} if loss is None else {"loss": loss, "grad_norm": 1.0}),
            "samples": [8 * n, 8 * n + 8],
            "data_hash": "",
            "attempt": 1,
        }
        for n, loss in enumerate(losses, start=1)
    ]
    rows[0] |= first
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def told(run: Path, **keys: Any) -> list[tuple[int, str]]:
    return [(one.step, one.decision) for one in hindsight(run, GuardConfig(**keys)).findings]


SPIKED = [2 + math.sin(n) / 9 for n in range(8)] + [9.0, 9.0, 2.0, 9.0]


def test_hindsight_tells_what_the_guard_would_have_done(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_rows(run, SPIKED, checkpoint_step=1)
    skipping = hindsight(run, GuardConfig(window=8, outlier="skip"))
    assert [(f.step, f.decision, f.samples) for f in skipping.findings] == [
        (9, "skip", (72, 80)),
        (10, "skip", (80, 88)),
        (12, "skip", (96, 104)),
    ]
    back = hindsight(run, GuardConfig(window=8, rollback=1, patience=2))
    (finding,) = back.findings
    assert (finding.step, finding.decision) == (10, "roll back")
    assert finding.reason.startswith("steps 9 to 10: loss 9 is above 2.")
    assert hindsight(run, GuardConfig(window=8)).findings == ()
    assert skipping.num_missing == hindsight(run, GuardConfig()).num_missing == 0
    short = hindsight(run, GuardConfig(window=20, outlier="skip"))
    assert (short.findings, short.num_missing) == ((), 8)
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl; train it with"):
        hindsight(tmp_path, GuardConfig())


def test_a_rollback_without_a_checkpoint_before_the_spike_would_have_ended_the_run(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    write_rows(run, SPIKED, checkpoint_step=9)
    (finding,) = hindsight(run, GuardConfig(window=8, rollback=1, patience=2)).findings
    assert (finding.step, finding.decision) == (10, "give up")
    assert finding.reason.endswith("; no checkpoint from before step 9 to go back to")


def test_skipped_steps_are_judged_by_the_numbers_that_their_events_have(tmp_path: Path) -> None:
    """A run with NaN from step 5 on, which gave up at step 7: it has no row of that."""
    run = tmp_path / "run"
    write_rows(run, [2.0, 2.0, 2.0, 2.0, None, None], resumed_from=3)
    for step, kind in ((5, SKIP), (6, SKIP), (7, GIVE_UP)):
        record(run, kind, step=step, loss=math.nan, grad_norm=math.inf, samples=[8, 16])
    assert told(run, max_skips=2) == [(5, "skip"), (6, "skip"), (7, "give up")]
    assert told(run, max_skips=3) == [(5, "skip"), (6, "skip"), (7, "skip")]
    assert told(run, max_skips=0, patience=1, rollback=1)[0] == (5, "roll back")
    assert told(run, patience=3, rollback=1) == [(5, "skip"), (6, "skip"), (7, "roll back")]
    found = hindsight(run, GuardConfig())
    assert (found.num_steps, found.num_skipped) == (7, 3)


def test_a_run_that_went_back_is_judged_by_the_numbers_from_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_rows(run, [*SPIKED[:9], None], checkpoint_step=6)
    record(run, SKIP, step=10, loss=9.0, grad_norm=1.0, samples=[80, 88])
    with (run / "metrics.jsonl").open("a") as file:
        for step in (9, 10):
            row = {"step": step, "skipped": True, "samples": [8 * step, 8], "data_hash": ""}
            file.write(json.dumps(row) + "\n")
    assert told(run, window=8, rollback=1, patience=2) == [(10, "roll back")]


def test_a_skipped_step_that_nobody_has_computed_is_not_judged(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_rows(run, [2.0, None, 2.0])
    assert told(run, skip_steps=(3,)) == [(3, "skip")]


def test_the_config_is_that_of_the_last_attempt(tmp_path: Path) -> None:
    first = RunConfig(steps=9)
    last = first.model_copy(update={"guard": GuardConfig(sigmas=3)})
    table = {"kind": "pretrain", "config": first.model_dump(mode="json")}
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert last_config(tmp_path) == first
    rows = [
        {"event": "start", "attempt": 2, "config": last.model_dump(mode="json")},
        {"event": "end", "attempt": 2, "outcome": "failed"},
    ]
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_config(tmp_path) == last
