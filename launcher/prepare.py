"""`headrace prepare`: all stages here, or the share of one stage that a job array asks for."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.config import DataUsageError, PrepareConfig

_OF_A_TASK = ("--stage", "--task")


def prepare(
    inputs: Sequence[str],
    output: Path,
    config: PrepareConfig,
    *,
    stage: str | None,
    task: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Prepare a dataset, or do a task of it, and print what came out."""
    from data import jobs
    from data.prepare import prepare, prepare_task
    from launcher.show import show_preparation, show_task, stage_progress

    if stage is None and task is not None:
        raise DataUsageError(f"--task {task} is a share of one stage; name it: --stage encode")
    share = jobs.Task.parse(task) if task is not None else jobs.WHOLE
    with stage_progress() as progress:
        if stage is None:
            summary = prepare(inputs, output, config, progress=progress, **settings)
        else:
            done = prepare_task(
                inputs,
                output,
                config,
                stage=stage,
                task=share,
                command=_command,
                progress=progress,
                **settings,
            )
    if stage is None:
        show_preparation(summary, as_json=as_json)
    else:
        show_task(done, as_json=as_json)


def _command(stage: str, task: str) -> str:
    """The command line of this process for another task."""
    kept: list[str] = []
    words = iter(sys.argv[1:])
    for word in words:
        if word in _OF_A_TASK:
            next(words, None)
        elif not word.startswith(tuple(f"{option}=" for option in _OF_A_TASK)):
            kept.append(word)
    return shlex.join(["headrace", *kept, "--stage", stage, "--task", task])
