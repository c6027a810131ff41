"""One attempt of a run: from its directory to an outcome. Pretraining and fine-tuning differ only
in their `Work`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from train import run as run_directory
from train.checkpoint import Checkpoint, CheckpointError, committed
from train.config import ConfigError, JobConfig
from train.engine import DTYPES, DeepSpeedEngine
from train.loop import Job, Task, train
from train.metrics import Metrics, ProgressLine, View, matmul_flops_per_second, wandb_views
from train.run import Outcome
from train.state import load_newest
from train.stop import StopRequest
from train.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What an attempt trains, with every value resolved."""

    config: JobConfig
    task: Task
    module: Callable[[], torch.nn.Module]
    """Makes the module with its initial weights."""
    steps: int
    micro_batch: int
    accumulation: int
    tokenizer: Path
    """File or folder; kept with the run."""
    flops_per_token: float = 0.0
    identity: dict[str, Any] = field(default_factory=dict)
    """Carried by every checkpoint and compared at resume, such as the tokenizer's hash."""


def run_attempt(world: World, run: Path, work: Work, *, stop_at: int | None = None) -> Outcome:
    """Collective. Start or resume the run and train it to its end, to `stop_at`, or to a requested
    stop.
    """
    with _only_main(world, "opening the run"):
        if world.is_main:
            run_directory.open_run(run, work.config)
            run_directory.copy_tokenizer(work.tokenizer, run)
    done = world.broadcast(next(iter(committed(run)), 0) if world.is_main else None)
    if stop_at is not None and done >= stop_at and stop_at < work.steps:
        log.info("%s stands at step %d, which is not before --stop-at %d", run, done, stop_at)
        return _end_at_once(world, run, work, "stopped", done)
    if done >= work.steps:
        log.info("%s is complete: %d of %d steps", run, done, work.steps)
        return _end_at_once(world, run, work, "complete", done)
    stop = StopRequest()
    stop.listen()
    return _train(world, run, work, stop, stop_at)


def _train(world: World, run: Path, work: Work, stop: StopRequest, stop_at: int | None) -> Outcome:
    engine = DeepSpeedEngine(
        work.module(),
        work.config,
        world,
        micro_batch=work.micro_batch,
        accumulation=work.accumulation,
    )
    saved = load_newest(engine, world, run)
    if saved is not None:
        _check_identity(saved, work)
    first_step = 1 if saved is None else saved.step + 1
    resumed_from = None if saved is None else saved.step
    attempt = 0
    if world.is_main:
        attempt = run_directory.begin_attempt(
            run, world_size=world.size, resumed_from=resumed_from, config=work.config
        )
    attempt = world.broadcast(attempt)
    log.info(
        "attempt %d starts %s",
        attempt,
        f"from step {resumed_from}" if resumed_from else "from nothing",
    )
    metrics = _open_metrics(world, run, work, first_step)
    job = Job(
        task=work.task,
        engine=engine,
        world=world,
        config=work.config,
        run=run,
        metrics=metrics,
        steps=work.steps,
        accumulation=work.accumulation,
        attempt=attempt,
        first_step=first_step,
        tokens=0 if saved is None else saved.state["tokens"],
        flops_per_token=work.flops_per_token,
        peak_flops=_peak_flops(world, work),
        stop_at=stop_at,
        stop=stop,
        resumed_from=resumed_from,
        describe=lambda: work.identity,
    )
    try:
        outcome, step = train(job)
    except BaseException as error:
        if world.is_main:
            run_directory.end_attempt(
                run, attempt, outcome="failed", step=None, reason=f"{type(error).__name__}: {error}"
            )
        raise
    finally:
        metrics.close()
    reason = stop.reason or ("--stop-at" if outcome == "stopped" else "")
    if world.is_main:
        run_directory.end_attempt(run, attempt, outcome=outcome, step=step, reason=reason)
    return outcome


def _open_metrics(world: World, run: Path, work: Work, first_step: int) -> Metrics:
    views: list[View] = []
    if world.is_main:
        line = ProgressLine(steps=work.steps, first_step=first_step, unit=work.task.unit)
        settings = work.config.model_dump(mode="json")
        views = [line, *wandb_views(run, work.config.log, settings)]
    return Metrics(run, enabled=world.is_main, views=views)


def _end_at_once(world: World, run: Path, work: Work, outcome: Outcome, step: int) -> Outcome:
    if world.is_main:
        attempt = run_directory.begin_attempt(
            run, world_size=world.size, resumed_from=step, config=work.config
        )
        run_directory.end_attempt(run, attempt, outcome=outcome, step=step, reason="nothing to do")
    return outcome


def _check_identity(saved: Checkpoint, work: Work) -> None:
    work.task.check_data_state(saved.state["data"])
    for key, value in work.identity.items():
        if saved.state.get(key) != value:
            raise CheckpointError(
                f"{saved.folder} was written with {key}={saved.state.get(key)!r}, this run has "
                f"{value!r}; "
                "train with the data it was started with, or start a new run"
            )


def _peak_flops(world: World, work: Work) -> float:
    if not work.flops_per_token:
        return 0.0
    rate = matmul_flops_per_second(world.device, DTYPES[work.config.precision])
    return float(world.sum(torch.tensor(rate, dtype=torch.float64)))


@contextmanager
def _only_main(world: World, what: str) -> Iterator[None]:
    """Collective. A refusal on rank 0 becomes the same refusal on every rank, without a hang."""
    error: Exception | None = None
    try:
        yield
    except (OSError, ValueError) as failure:
        error = failure
    message = world.broadcast(str(error) if error is not None else None)
    if error is not None:
        raise error
    if message is not None:
        raise ConfigError(message)
