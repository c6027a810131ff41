"""`headrace prepare`: all stages here, or the share of one stage that a job array asks for."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import DataUsageError
from launcher import options, spawn, usage

if TYPE_CHECKING:
    from data.config import PrepareConfig

_OF_A_TASK = ("--stage", "--task")


def prepare(
    inputs: options.Inputs,
    output: options.Output,
    more_inputs: options.MoreInputs = None,
    vocab_size: options.VocabSize = None,
    tokenizer: options.TokenizerFile = None,
    tokenizer_type: options.TokenizerType = None,
    user_symbols: options.UserSymbols = None,
    val_fraction: options.ValFraction = None,
    text_field: options.TextField = None,
    id_field: options.IdField = None,
    exclude: options.Exclude = None,
    on_bad_text: options.OnBadText = "strict",
    max_bad_lines: options.MaxBadLines = None,
    bos: options.Bos = False,
    normalize: options.Normalize = False,
    filter: options.Filter = False,
    filter_datatrove: options.FilterDatatrove = None,
    language: options.Languages = None,
    language_min: options.LanguageMin = None,
    mask_pii: options.MaskPii = False,
    dedup: options.Dedup = "off",
    decontaminate: options.Decontaminate = None,
    shuffle: options.Shuffle = False,
    workers: options.Workers = 0,
    stage: options.Stage = None,
    task: options.TaskOf = None,
    as_json: options.AsJson = False,
) -> None:
    """Turn text into a tokenizer and token shards."""
    from data.config import PrepareConfig

    given = {
        "vocab_size": vocab_size,
        "tokenizer_type": tokenizer_type,
        "user_symbols": user_symbols,
        "val_fraction": val_fraction,
        "text_field": text_field,
        "id_field": id_field,
        "exclude": exclude,
        "on_bad_text": on_bad_text,
        "max_bad_lines": max_bad_lines,
        "bos": bos,
        "shuffle": shuffle,
        "clean": {
            "normalize": normalize,
            "filter": filter,
            "filter_datatrove": usage.names("--filter-datatrove", filter_datatrove),
            "language": usage.names("--language", language),
            **({} if language_min is None else {"language_min": language_min}),
            "mask_pii": mask_pii,
            "dedup": dedup,
        },
    }
    config = usage.parse(
        PrepareConfig, {key: value for key, value in given.items() if value is not None}
    )
    _prepare(
        [*inputs, *(more_inputs or ())],
        output,
        config,
        workers=workers or spawn.num_cores(),
        tokenizer=tokenizer,
        decontaminate=decontaminate or (),
        stage=stage,
        task=task,
        as_json=as_json,
    )


def _prepare(
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
    from data.prepare import finished, prepare, prepare_task
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
        return
    show_task(done, as_json=as_json)
    if done.is_complete and not as_json:
        show_preparation(finished(output), as_json=False)


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
