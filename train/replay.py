"""A recorded step, computed again: from the checkpoint before it, the order of the data and the
attempt's own config, on as many ranks. Nothing is written.

Loss, gradient norm and data_hash of every step on the way are compared with metrics.jsonl bit by
bit, and the state after the last one with its checkpoint, where there is one. On the same layout
and hardware they are equal (CPU always; GPUs as far as their kernels are deterministic); so a
difference is silent corruption, then or now: whichever replay differs from another tells.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from train.build import build_engine, settle
from train.checkpoint import CheckpointError, committed, completed_steps, open_checkpoint
from train.config import RunConfig
from train.decode import decode
from train.engine import Engine
from train.guard import Guard
from train.job import Job
from train.metrics import Metrics
from train.pace import Pace
from train.phases import History, read_phases
from train.pretrain import pretraining
from train.rollback import rollbacks_of
from train.rows import ReplayUsageError, Row, read_metrics, row_of, start_of
from train.run import read_config
from train.saver import Saver
from train.state import load_checkpoint
from train.step import take_step
from train.timing import Timing
from train.work import Work
from train.world import World, join_world

log = logging.getLogger(__name__)

COMPARED = ("loss", "grad_norm", "data_hash", "skipped")


class ReplayDiffers(ValueError):
    """A replay whose numbers are not the recorded ones."""

    exit_code: ClassVar[int] = 1


@dataclass(frozen=True)
class Replay:
    """What a replay has found."""

    step: int
    start: int
    """The step whose checkpoint it began with; 0 is the initial weights."""
    num_ranks: int
    layout_differs: str
    """Why bits cannot be expected; empty on the same layout."""
    checkpoint_compared: bool
    differences: tuple[str, ...]
    """The first step that differs, then what differs in the checkpoint."""


@dataclass(frozen=True)
class _Plan:
    start: int
    config: dict[str, Any]
    layouts: list[dict[str, Any]]
    rows: dict[int, Row]
    rollbacks: list[list[int]]


def replay(run: Path, step: int) -> Replay:
    """Collective. Recompute `step` of a pretraining run in the world that the environment
    describes.
    """
    with join_world(repeats=read_config(run).train.repeats) as world:
        return replay_on(world, run, step)


def replay_on(world: World, run: Path, step: int) -> Replay:
    """Collective. `replay` in a world that stands."""
    made: _Plan | None = None
    with world.together("looking for the step"):
        made = _plan(run, step) if world.is_main else None
    plan: _Plan = world.broadcast(made)
    with world.together("opening the data"):
        config = decode(RunConfig, plan.config, name=str(run / "attempts.jsonl"))
        history = History(read_phases(run), completed_steps(run))
        work = pretraining(config, num_ranks=world.size, history=history)
    job = _job(world, run, work, plan)
    batches = work.task.micro_batches(plan.start + 1, step, rank=world.rank, num_ranks=world.size)
    differences: list[str] = []
    for number in range(plan.start + 1, step + 1):
        take_step(job, number, batches)
        found = differing(plan.rows.get(number), job.metrics.rows[-1])  # type: ignore[attr-defined]
        if found and not differences:
            differences = [f"step {number}: {', '.join(found)}"]
    has_checkpoint = world.broadcast(step in committed(run))
    if has_checkpoint:
        with world.together("comparing with the checkpoint"):
            names = _differing_state(job.engine, run, step)
        for rank, wrong in enumerate(world.gather(names)):
            differences += [f"checkpoint of step {step}: {name} on rank {rank}" for name in wrong]
    return Replay(
        step=step,
        start=plan.start,
        num_ranks=world.size,
        layout_differs=_layout_differs(plan.layouts, _layout(world.size, plan.config)),
        checkpoint_compared=has_checkpoint,
        differences=tuple(differences),
    )


def differing(recorded: Row | None, found: Row) -> list[str]:
    """What two rows of a step disagree on, with both values."""
    if recorded is None:
        return []
    return [
        f"{key} {recorded.get(key)!r} recorded, {found.get(key)!r} now"
        for key in COMPARED
        if recorded.get(key) != found.get(key)
    ]


class _Rows(Metrics):
    """Keeps the rows of a replay, and writes none."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, enabled=False, views=[])
        self.rows: list[Row] = []

    def write(self, row: Row) -> None:
        self.rows.append(row)


def _plan(run: Path, step: int) -> _Plan:
    row = row_of(run, step)
    config = start_of(run, row)["config"]
    if "task" in config:
        raise ReplayUsageError(
            f"{run} is a fine-tuning run; only steps of `headrace pretrain` can be replayed"
        )
    start = max((saved for saved in committed(run) if saved < step), default=0)
    rows = {r["step"]: r for r in read_metrics(run) if "data_hash" in r and start < r["step"]}
    on_the_way = [rows[number] for number in range(start + 1, step + 1) if number in rows]
    starts = {r["attempt"]: start_of(run, r) for r in on_the_way}
    return _Plan(
        start=start,
        config=config,
        layouts=[_layout(s["world_size"], s["config"]) for s in starts.values()],
        rows=rows,
        rollbacks=rollbacks_of(run),
    )


def _job(world: World, run: Path, work: Work, plan: _Plan) -> Job:
    """Collective. As the attempt was after the step of the checkpoint."""
    settle(work.config.train, world.device)
    engine = build_engine(
        work.module(),
        work.config,
        world,
        micro_batch=work.micro_batch,
        accumulation=work.accumulation,
    )
    engine.module.train()
    state: dict[str, Any] = {}
    if plan.start:
        with world.together("opening the checkpoint"):
            saved = open_checkpoint(run, plan.start)
        load_checkpoint(engine, world, saved)
        state = saved.state
    return Job(
        task=work.task,
        engine=engine,
        world=world,
        config=work.config,
        run=run,
        metrics=_Rows(run),
        saver=Saver(
            engine, world, run, config=work.config.checkpoint.model_copy(update={"mirror": ""})
        ),
        pace=Pace(0, world, run, first_step=plan.start + 1),
        timing=Timing(world.device),
        guard=Guard(work.config.guard, state.get("guard"), rollbacks=plan.rollbacks),
        steps=work.steps,
        accumulation=work.accumulation,
        attempt=0,
        first_step=plan.start + 1,
        tokens=state.get("tokens", 0),
        is_replay=True,
    )


def _differing_state(engine: Engine, run: Path, step: int) -> list[str]:
    """Parameters of which this rank's part is not what the checkpoint holds, each with its kind."""
    saved = open_checkpoint(run, step)
    reader = saved.reader
    wrong = []
    for flat in engine.flats():
        for key, tensor in flat.tensors().items():
            values = tensor.detach().float().cpu().numpy()
            for part in flat.owned:
                if not reader.has(part.name, key):
                    raise CheckpointError(f"{saved.folder} holds no {key} of {part.name}")
                here = values[part.offset : part.offset + part.length]
                there = reader.read(part.name, key, part.start, part.length)
                if not np.array_equal(here.view(np.uint32), there.view(np.uint32)):
                    wrong.append(f"{part.name} ({key})")
    return wrong


def _layout(num_ranks: int, config: dict[str, Any]) -> dict[str, Any]:
    zero = config["zero"]
    return {
        "ranks": num_ranks,
        "zero.stage": zero["stage"],
        "zero.persistence_threshold": zero["persistence_threshold"],
        "micro_batch": config["micro_batch"],
    }


def _layout_differs(then: list[dict[str, Any]], now: dict[str, Any]) -> str:
    found = [
        f"{key} was {layout[key]}, is {now[key]} now"
        for layout in then
        for key in now
        if layout[key] != now[key]
    ]
    return ", ".join(dict.fromkeys(found))
