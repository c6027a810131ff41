"""The loop ends by itself when a number is no number, and saves nothing of that step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import RankFailure, run_ranks
from tests.train.test_pretrain import config, losses, train_run
from train.checkpoint import committed
from train.run import attempts


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_no_number_ends_the_run_on_every_rank(
    dataset: Path, tmp_path: Path, world_size: int
) -> None:
    run = tmp_path / "run"
    # AdamW moves every weight by about lr: the second forward pass overflows.
    bad = config(dataset, "optim.lr=1e30", "checkpoint.every=1", "eval.samples=1")
    with pytest.raises(RankFailure) as caught:
        run_ranks(world_size, train_run, bad, run)
    text = str(caught.value)
    assert "NonFiniteLoss: step 2: loss" in text
    assert "nothing of this step is saved" in text
    assert f"headrace data inspect DATASET --step 2 --run {run}" in text
    assert committed(run) == [1]
    assert [row[0] for row in losses(run)] == [1]
    assert attempts(run)[-1]["outcome"] == "failed"
