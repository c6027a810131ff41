"""metrics.jsonl is the truth; views can fail without touching it."""

import json
from pathlib import Path

import pytest

from train.metrics import Metrics, Row, read_metrics, wandb_views
from train.settings import LogConfig


class Broken:
    """A view whose service is down."""

    shown = 0

    def show(self, row: Row) -> None:
        self.shown += 1
        raise ConnectionError("no route")

    def close(self) -> None:
        raise ConnectionError("no route")


def test_a_broken_view_is_dropped_and_no_row_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    view = Broken()
    metrics = Metrics(tmp_path, enabled=True, views=[view])
    for step in (1, 2):
        metrics.write({"step": step, "loss": 0.1 + step})
    metrics.close()
    assert view.shown == 1
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.1, 2.1]
    assert "Broken is switched off for this attempt: no route" in caplog.text


def test_numbers_round_trip_and_the_last_row_of_a_step_wins(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, enabled=True, views=[])
    for value in (0.1 + 0.2, 1e-300, 5.0):
        metrics.write({"step": 1, "loss": value})
    metrics.write({"step": 1, "val_loss": 3.0})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == 0.1 + 0.2
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 5.0}, {"step": 1, "val_loss": 3.0}]


def test_wandb_offline_keeps_the_run_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    assert wandb_views(tmp_path, LogConfig(), {}) == []
    views = wandb_views(tmp_path, LogConfig(wandb="offline"), {"seed": 1})
    metrics = Metrics(tmp_path, enabled=True, views=views)
    metrics.write({"step": 1, "loss": 2.0})
    metrics.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
