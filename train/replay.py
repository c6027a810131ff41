"""A recorded step, computed again: from the checkpoint before it, the order of the data and the
attempt's own config, on as many ranks and threads. Nothing is written.

Loss, gradient norm and data_hash of every step on the way are compared with metrics.jsonl bit by
bit, and the state after the last one with its checkpoint, where there is one. Steps that the run
has left out are left out. On the same layout, hardware and releases the bits are equal (CPU always;
GPUs with train.deterministic); so a difference is silent corruption, then or now: whichever replay
differs from another tells. What is not the same is named instead (train/recorded.py).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from train.attempts import versions
from train.build import build_engine, settle
from train.checkpoint import CheckpointError, committed, completed_steps, open_checkpoint
from train.config import RunConfig
from train.decode import decode
from train.device import machine
from train.engine import Engine
from train.guard import Guard
from train.job import Job
from train.metrics import Metrics
from train.pace import Pace
from train.phases import History, read_phases
from train.pretrain import pretraining
from train.recorded import AsRecorded, Recorded, differing, layout_differs, recorded
from train.rows import Row, row_of, start_of
from train.saver import Saver
from train.settings import TrainConfig
from train.state import load_checkpoint
from train.step import take_step
from train.timing import Timing
from train.work import Work
from train.world import World, join_world

log = logging.getLogger(__name__)


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
    """The first step that differs, among those that were taken and those that were left out, then
    what differs in the checkpoint.
    """
    is_harmless: bool
    """Whether only steps differ that the run has left out."""


def replay(run: Path, step: int) -> Replay:
    """Collective. Recompute `step` of a pretraining run in the world that the environment
    describes.
    """
    config = start_of(run, row_of(run, step))["config"]
    # As the attempt was told, which config.json need not say.
    with join_world(repeats=TrainConfig.model_validate(config.get("train", {})).repeats) as world:
        return replay_on(world, run, step)


def replay_on(world: World, run: Path, step: int) -> Replay:
    """Collective. `replay` in a world that stands."""
    made: Recorded | None = None
    with world.together("looking for the step"):
        made = recorded(run, step) if world.is_main else None
    plan: Recorded = world.broadcast(made)
    with world.together("opening the data"):
        config = decode(RunConfig, plan.config, name=str(run / "attempts.jsonl"))
        history = History(read_phases(run), completed_steps(run))
        work = pretraining(config, num_ranks=world.size, history=history)
    guard, metrics = AsRecorded(plan), _Rows(run)
    job = _job(world, run, work, plan, guard, metrics)
    batches = work.task.micro_batches(plan.start + 1, step, rank=world.rank, num_ranks=world.size)
    first: dict[bool, str] = {}
    for number in range(plan.start + 1, step + 1):
        take_step(job, number, batches)
        row = plan.rows.get(number, {})
        found = differing(row, metrics.rows[-1] | guard.numbers)
        if found:
            first.setdefault("skipped" in row, f"step {number}: {', '.join(found)}")
    differences = list(first.values())
    has_checkpoint = world.broadcast(step in committed(run))
    if has_checkpoint:
        with world.together("comparing with the checkpoint"):
            names = _differing_state(job.engine, run, step)
        for rank, wrong in enumerate(world.gather(names)):
            differences += [f"checkpoint of step {step}: {name} on rank {rank}" for name in wrong]
    now = {
        "world_size": world.size,
        "config": plan.config,
        "versions": versions(),
        "machine": machine(world.device),
    }
    wanders = world.device.type == "cuda" and not config.train.repeats
    return Replay(
        step=step,
        start=plan.start,
        num_ranks=world.size,
        layout_differs=world.broadcast(layout_differs(plan, now, wanders=wanders)),
        checkpoint_compared=has_checkpoint,
        differences=tuple(differences),
        is_harmless=differences == [first.get(True)],
    )


class _Rows(Metrics):
    """Keeps the rows of a replay, and writes none."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, enabled=False, views=[])
        self.rows: list[Row] = []

    def write(self, row: Row) -> None:
        self.rows.append(row)


def _job(
    world: World, run: Path, work: Work, plan: Recorded, guard: Guard, metrics: Metrics
) -> Job:
    """Collective. As the attempt was after the step of the checkpoint."""
    settle(work.config.train, world.device)
    if world.device.type == "cpu" and "threads" in plan.machine:
        # How a sum is cut depends on them, and they on how many ranks share a machine.
        torch.set_num_threads(plan.machine["threads"])
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
        metrics=metrics,
        saver=Saver(
            engine, world, run, config=work.config.checkpoint.model_copy(update={"mirror": ""})
        ),
        pace=Pace(0, world, run, first_step=plan.start + 1),
        timing=Timing(world.device),
        guard=guard,
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
