"""What a replay goes by, from rows that are written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.config import RunConfig
from train.decode import load_config
from train.recorded import Recorded, layout_differs, recorded
from train.rows import ReplayUsageError

MACHINE = {"device": "x86_64", "threads": 1}


def started(*overrides: str, **row: Any) -> dict[str, Any]:
    """How an attempt of batches of 4 samples on two ranks was started."""
    config = load_config(RunConfig, "batch_tokens = 4096\nseq_len = 1024", overrides)
    made = {"world_size": 2, "versions": {"torch": "2"}, "machine": MACHINE}
    return {"event": "start", "config": config.model_dump(mode="json"), **made, **row}


def run_of(run: Path, *starts: dict[str, Any]) -> Path:
    """A run without checkpoints whose attempts have each trained one step."""
    numbered = [{"attempt": n, **start} for n, start in enumerate(starts, start=1)]
    rows = [{"step": n, "attempt": n, "data_hash": ""} for n in range(1, len(starts) + 1)]
    for name, lines in (("attempts", numbered), ("metrics", rows)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / f"{name}.jsonl").write_text(text)
    return run


def told(plan: Recorded, now: dict[str, Any] | None = None, *, wanders: bool = False) -> str:
    return layout_differs(plan, now or started(), wanders=wanders)


def test_data_that_has_moved_is_looked_for_where_the_last_attempt_found_it(tmp_path: Path) -> None:
    run_of(tmp_path, started("data=/old", "data.stage=true"), started("data=/new"))
    data = recorded(tmp_path, 1).config["data"]
    assert (data["path"], data["stage"]) == ("/new", False)
    sources = 'data.sources=[{name="a", path="/old/a", weight=1}]'
    moved = 'data.sources=[{name="b", path="/b", weight=1}, {name="a", path="/a", weight=9}]'
    run_of(tmp_path, started(sources), started(moved))
    data = recorded(tmp_path, 1).config["data"]
    assert data["sources"] == [{"name": "a", "path": "/a", "weight": 1}]


def test_every_attempt_on_the_way_counts_with_all_that_bits_depend_on(tmp_path: Path) -> None:
    free = started("guard.skip_steps=[1]", "data.num_workers=2", "checkpoint.keep=9", "data=/new")
    assert told(recorded(run_of(tmp_path, free, started()), 2)) == ""
    for other, difference in (
        (started(world_size=1), "world_size: 1 -> 2; micro_batch: 4 -> 2"),
        (started("micro_batch=1"), "micro_batch: 1 -> 2; accumulation: 2 -> 1"),
        (started("zero.stage=2"), "zero.stage: 2 -> 1"),
        (started("train.deterministic=true"), "train.deterministic: True -> False"),
        (started(versions={"torch": "1"}), "torch: '1' -> '2'"),
        (started(machine={**MACHINE, "threads": 3}), "threads: 3 -> 1"),
    ):
        assert told(recorded(run_of(tmp_path, other, started()), 2)) == difference
    plan = recorded(run_of(tmp_path, started()), 1)
    assert "train.deterministic" in told(plan, wanders=True)
    assert told(plan, started(machine={**MACHINE, "threads": 2})) == "threads: 1 -> 2"


def test_steps_of_another_batch_on_the_way_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, started("batch_tokens=8192"), started())
    with pytest.raises(ReplayUsageError) as refused:
        recorded(run, 2)
    assert str(refused.value) == (
        f"step 2 of {run} was computed with batch_tokens=4096, seq_len=1024, and step 1, on the "
        "way to it from the initial weights, with batch_tokens=8192, seq_len=1024; one replay "
        "cannot compute both. Replay a step before the change, or one that has a checkpoint "
        f"between the two: `headrace checkpoint ls {run}` lists them"
    )
    assert recorded(run, 1).start == 0
