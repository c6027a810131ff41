"""Which samples a step had: `data.inspect` needs a seed and two sizes; here they come from a run or
a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from data.inspect import Inspection, inspect
from launcher.recipes import find_recipe
from train.config import RunConfig
from train.decode import load_config


class InspectError(ValueError):
    """A run that cannot be inspected, or whose data was not what the dataset says."""

    exit_code: ClassVar[int] = 1


class InspectUsageError(InspectError):
    """A request that contradicts itself."""

    exit_code: ClassVar[int] = 2


def inspect_step(
    dataset: Path, *, step: int, run: Path | None, recipe: str, overrides: Sequence[str]
) -> Inspection:
    """The samples of a training step of `run`, or of a run of `recipe` with `overrides`.

    With a run, InspectError when the hash that it recorded for the step is another one.
    """
    if run is not None and overrides:
        raise InspectUsageError(
            f"a run fixes its own config: {' '.join(overrides)} cannot change which samples {run} "
            "was trained on; leave out either --run or the overrides"
        )
    if run is None:
        found = find_recipe(recipe, "pretrain")
        config = load_config(RunConfig, found.text, overrides, name=found.name)
    else:
        config = config_of(run)
    if step > config.steps:
        where = f"{run}" if run is not None else f"a run of {recipe}"
        raise InspectUsageError(
            f"step {step} does not exist: the last step of {where} is {config.steps}"
            + ("" if run is not None else "; write steps=N to look at a longer one")
        )
    inspection = inspect(
        dataset,
        step=step,
        seed=config.seed,
        seq_len=config.seq_len,
        batch_samples=config.batch_samples,
    )
    recorded = None if run is None else _recorded_hash(run, step)
    if recorded is not None and recorded != inspection.data_hash:
        raise InspectError(
            f"step {step} of {run} was trained on samples with data_hash {recorded}, but {dataset} "
            f"gives {inspection.data_hash}: it is not the dataset of that run, or it was changed"
        )
    return inspection


def config_of(run: Path) -> RunConfig:
    """The config of a pretraining run."""
    from train.run import read_config

    config = read_config(run)
    if not isinstance(config, RunConfig):
        raise InspectError(f"{run} is a fine-tuning run; its examples are lines of a file")
    return config


def _recorded_hash(run: Path, step: int) -> str | None:
    """What the run's metrics say of a step; None when they do not say anything yet."""
    from train.metrics import read_metrics

    rows = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return next((row["data_hash"] for row in rows if row["step"] == step and "loss" in row), None)
