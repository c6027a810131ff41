"""The run directory: one resolved config, and a line per attempt.

    RUN/config.json   what every rank of every attempt reads
    RUN/attempts.jsonl   one row when an attempt starts, one when it ends, with its outcome

The same command resumes a run; keys that change no number are free to differ, any other difference
is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import data.tokenizer
from data.tokenizer import tokenizer_file
from train.config import ConfigError, FinetuneConfig, JobConfig, RunConfig, decode, flat_keys
from train.metrics import line_start
from train.slices import fsync

Outcome = Literal["complete", "stopped", "failed"]

FREE = ("zero.", "checkpoint.", "log.", "micro_batch", "data.num_workers", "data.path")
"""Keys (or prefixes) that a resumed run may change: none of them changes which samples are seen or
what a step means.
The dataset may move: its content is compared by fingerprint instead."""

MAY_BE_FIRST = {"logs", "config.tmp"}
"""What a run directory may hold before its config: a batch job's logs, a start that was killed."""


def open_run(run: Path, config: JobConfig, identity: Mapping[str, Any]) -> None:
    """Create the run directory, or check that it belongs to this config and data. One rank only.

    Raises ConfigError naming each key that differs, with its old and new value.
    """
    path = run / "config.json"
    content = {
        "kind": _kind(config),
        "config": config.model_dump(mode="json"),
        "identity": dict(identity),
    }
    if path.exists():
        _compare(run, _read(path), content)
        return
    if run.exists() and {entry.name for entry in run.iterdir()} - MAY_BE_FIRST:
        raise ConfigError(
            f"{run} is not empty and no run of ours (it has no config.json); choose another --run"
        )
    run.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    fsync(temporary)
    temporary.rename(path)
    fsync(run)


def read_config(run: Path) -> RunConfig | FinetuneConfig:
    """The resolved config of a run."""
    path = run / "config.json"
    if not path.exists():
        raise ConfigError(
            f"{run} is no run directory: it has no config.json; train one with `headrace pretrain "
            f"... --run {run}`"
        )
    table = _read(path)
    if table["kind"] == "pretrain":
        return decode(RunConfig, table["config"], name=str(path))
    return decode(FinetuneConfig, table["config"], name=str(path))


def copy_tokenizer(source: Path, run: Path) -> None:
    """Keep the tokenizer with the run, so that export needs nothing else. One rank only."""
    file = tokenizer_file(source)
    if not (run / file.name).exists():
        # With the names of its special tokens, which a tokenizer.json does not hold.
        data.tokenizer.copy_tokenizer(file, run)


def attempts(run: Path) -> list[dict[str, Any]]:
    """Rows of attempts.jsonl."""
    path = run / "attempts.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        # A crash of the machine can tear the last line; the rows before it still count.
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def begin_attempt(
    run: Path, *, world_size: int, resumed_from: int | None, config: JobConfig
) -> int:
    """Record that an attempt starts; returns its number, counted from 1. One rank only."""
    number = 1 + max((row["attempt"] for row in attempts(run)), default=0)
    _append(
        run,
        {
            "attempt": number,
            "event": "start",
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "world_size": world_size,
            "resumed_from": resumed_from,
            "config": config.model_dump(mode="json"),
        },
    )
    return number


def end_attempt(
    run: Path, number: int, *, outcome: Outcome, step: int | None, reason: str = ""
) -> None:
    """Record how an attempt ended; the launcher turns the outcome into its exit code. One rank
    only.
    """
    _append(
        run,
        {
            "attempt": number,
            "event": "end",
            "time": time.time(),
            "outcome": outcome,
            "step": step,
            "reason": reason,
        },
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
        return {"kind": table["kind"], "config": table["config"], **table}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged: {error}; put back a copy (each attempt's config is in "
            f"{path.parent / 'attempts.jsonl'}), or start a new run with another --run"
        ) from None


def _append(run: Path, row: dict[str, Any]) -> None:
    with (run / "attempts.jsonl").open("a+b") as file:
        file.write(line_start(file) + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _kind(config: JobConfig) -> str:
    return "pretrain" if isinstance(config, RunConfig) else "finetune"


def _compare(run: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if old["kind"] != new["kind"]:
        raise ConfigError(
            f"{run} is a {old['kind']} run, this is {new['kind']}; choose another --run"
        )
    before = dict(flat_keys({**old["config"], **old.get("identity", {})}))
    after = dict(flat_keys({**new["config"], **new["identity"]}))
    changed = [
        f"  {key}: {before.get(key)!r} in the run, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(FREE)
    ]
    if changed:
        raise ConfigError(
            f"{run} was started with another config:\n"
            + "\n".join(changed)
            + "\nrepeat the command with the run's values, "
            "or choose another --run"
        )
