"""A recorded step computed again: equal to the last bit, or what differs first is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from launcher.look_back import difference_of
from tests.ranks import run_ranks
from tests.train.test_hindsight import write_rows
from tests.train.test_pretrain import config, train_run
from train import faults
from train.checkpoint import discard_step
from train.config import RunConfig
from train.recorded import differing
from train.replay import Replay, replay, replay_on
from train.rows import ReplayUsageError, ranks_of, read_metrics
from train.world import REPEATING, RankError, World

SMALL = ("eval.samples=1", "steps=7")


def train_all(world: World, made: RunConfig, folder: Path) -> None:
    """A clean run, and one in which a bit of the weights of rank 1 flips in step 5."""
    train_run(world, made, folder / "clean")
    faults.arm("optimizer:5:1:bitflip", world.rank)
    train_run(world, made, folder / "flipped")


def replays(
    world: World, asked: list[tuple[Path, int]], threads: int = 1, fault: str | None = None
) -> list[Replay]:
    """`fault` happens in each of them, which start in processes of so many threads."""
    found = []
    for run, step in asked:
        torch.set_num_threads(threads)
        faults.arm(fault, world.rank)
        found.append(replay_on(world, run, step))
    return found


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(2, train_all, config(dataset, *SMALL), folder)
    return folder


def files(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_a_clean_run_is_equal_and_stays_as_it_is(runs: Path) -> None:
    run = runs / "clean"
    before = files(run)
    assert ranks_of(run, 5) == 2
    # As many threads as the run had: one per rank.
    for found in run_ranks(2, replays, [(run, 2), (run, 5), (run, 6), (run, 7)], 3):
        assert [(r.step, r.start, r.checkpoint_compared) for r in found] == [
            (2, 0, False),
            (5, 3, False),
            (6, 3, True),
            (7, 6, True),
        ]
        assert all(r.differences == () and r.layout_differs == "" for r in found)
    assert files(run) == before


def test_a_flipped_bit_is_found_with_its_step_and_where_it_is(runs: Path) -> None:
    run = runs / "flipped"
    found = run_ranks(2, replays, [(run, 4), (run, 5), (run, 6), (run, 7)])[0]
    # The flip of step 5 is first seen in the loss of step 6, and stands in its checkpoint.
    assert [bool(r.differences) for r in found] == [False, False, True, False]
    assert found[2].differences[0].startswith("step 6: loss ")
    wrong = "\n".join(found[2].differences[1:])
    assert "checkpoint of step 6: " in wrong
    assert "on rank 1" in wrong
    told = difference_of(found[2], run)
    assert "the replay is not what was recorded\n  step 6: loss " in told
    assert "silent corruption, then or now" in told and not found[2].is_harmless


def test_another_layout_is_named_before_bits_are_blamed(runs: Path) -> None:
    run = runs / "clean"
    ((found,),) = run_ranks(1, replays, [(run, 5)])
    assert found.layout_differs == "world_size: 2 -> 1; micro_batch: 6 -> 12"
    assert not any("data_hash" in difference for difference in found.differences)


def test_other_data_is_seen_at_any_layout() -> None:
    row = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "data_hash": "00ab"}
    assert differing(row, dict(row)) == []
    assert differing(row, row | {"data_hash": "00ac"}) == ["data_hash '00ab' recorded, '00ac' now"]


def test_a_step_without_a_row_is_refused(runs: Path) -> None:
    with pytest.raises(ReplayUsageError, match=r"has no row of step 8, .* its last step is 7"):
        ranks_of(runs / "clean", 8)


def test_a_fine_tuning_run_is_refused_after_libraries_are_set_as_its_attempt_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in REPEATING:
        monkeypatch.setenv(name, "")
    run = tmp_path / "run"
    write_rows(run, [2.0])
    config = {"task": "classify", "train": {"deterministic": True}}
    row = {"event": "start", "attempt": 1, "world_size": 1, "config": config}
    (run / "attempts.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RankError, match="is a fine-tuning run; only steps of `headrace pretrain`"):
        replay(run, 1)
    assert {name: os.environ[name] for name in REPEATING} == REPEATING


def train_through_trouble(world: World, dataset: Path, run: Path) -> None:
    """Step 5 is NaN and skipped. The guard is told otherwise then, of a step that is trained, too,
    and goes back when step 8 is NaN.
    """
    made = (*SMALL[:1], "steps=9", "guard.max_skips=1")
    faults.arm("forward:5:1:nan", world.rank)
    train_run(world, config(dataset, *made), run, 6)
    later = ("guard.max_skips=0", "guard.rollback=1", "guard.window=4", "guard.skip_steps=[4]")
    faults.arm("forward:8:1:nan", world.rank)
    train_run(world, config(dataset, *made, *later), run)


def test_skipped_and_rolled_back_steps_are_replayed_as_they_were(
    dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_ranks(2, train_through_trouble, dataset, run)
    reasons = {row["step"]: row["reason"] for row in read_metrics(run) if row.get("skipped")}
    assert reasons == {5: "loss nan, gradient norm inf", 8: "listed by a rollback"}
    discard_step(run, 3)
    faulty = run_ranks(2, replays, [(run, 9), (run, 6), (run, 5)], 1, "forward:5:1:nan")[0]
    assert [(r.step, r.start, r.differences) for r in faulty] == [
        (9, 6, ()),
        (6, 0, ()),
        (5, 0, ()),
    ]
    # The fault was the machine's: the step is another now, and what followed is the same.
    discard_step(run, 6)
    (found,) = run_ranks(2, replays, [(run, 9)])[0]
    assert (found.start, found.layout_differs) == (0, "")
    (difference,) = found.differences
    assert difference.startswith("step 5: loss None recorded, ")
    assert found.is_harmless
    assert "no weight has seen it and no checkpoint has to go" in difference_of(found, run)
