"""The run directory: one resolved config, and a line per attempt (train/attempts.py).

    RUN/config.json   what every rank of every attempt reads
    RUN/attempts.jsonl   one row when an attempt starts, one when it ends, with its outcome
    RUN/attempts/     a file for each, by which one owns the run at a time (train/ownership.py)
    RUN/phases.jsonl  what was changed on purpose since, and from which step on (train/phases.py)

The same command resumes a run; keys that change no number are free to differ, any other difference
is refused, unless it is one that a phase can bring and it was asked for.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import data.tokenizer
from data.durable import is_leftover, write_durably, writing
from data.phases import RunPhase
from data.tokenizer import tokenizer_file
from train.attempts import FILE
from train.attempts import Outcome as Outcome
from train.attempts import attempts as attempts
from train.attempts import begin_attempt as begin_attempt
from train.attempts import end_attempt as end_attempt
from train.attempts import is_complete as is_complete
from train.config import ConfigError, FinetuneConfig, JobConfig, RunConfig
from train.decode import decode, flat_keys
from train.phases import allowing, append_phase, check_asked, now, read_phases

log = logging.getLogger(__name__)

FREE = (
    "zero.",
    "checkpoint.",
    "guard.",
    "log.",
    "stall_seconds",
    "train.deterministic",
    "micro_batch",
    "data.num_workers",
    "data.path",
    "data.max_epochs",
    "data.cache_dir",
    "data.cache_bytes",
    "data.stage",
    "data.on_damage",
)
"""Keys (or prefixes) that a resumed run may change: none of them changes which samples are seen or
what a step means.
The dataset may move: its content is compared by fingerprint instead. data.on_damage decides only
what becomes of a sample that would have stopped the run. guard.* does change which steps are taken:
it is what somebody changes after trouble, and every step that was not taken says so in
metrics.jsonl, so that the run remains explained."""

MAY_BE_FIRST = {"logs", "code", "attempts"}
"""What a run directory may hold before its config, but for drafts of that: a batch job's logs and
code, a start that was killed or refused.
"""


def check_run(
    run: Path,
    config: JobConfig,
    identity: Mapping[str, Any],
    *,
    allow_change: Sequence[str] = (),
) -> None:
    """Check that a run directory belongs to this config and data, but for what `allow_change`
    names, or that a run may begin there. Nothing is written.

    Raises ConfigError naming each key that differs, with its old and new value.
    """
    check_asked(allow_change)
    path = run / "config.json"
    if path.exists():
        # Without a recorded phase there is nothing that a new one could go on from.
        allowed = allow_change if read_phases(run) else ()
        _compare(run, now(run, _read(path)), _content(config, identity), allowed)
    elif run.exists() and any(map(_is_strange, run.iterdir())):
        raise ConfigError(
            f"{run} is not empty and no run of ours (it has no config.json); choose another --run"
        )


def open_run(
    run: Path,
    config: JobConfig,
    identity: Mapping[str, Any],
    *,
    allow_change: Sequence[str] = (),
) -> None:
    """Check a run directory, and create the run that is not there yet. Its owner only."""
    check_run(run, config, identity, allow_change=allow_change)
    path = run / "config.json"
    if not path.exists():
        with writing(run):
            run.mkdir(parents=True, exist_ok=True)
        # By its id a mirror tells this run from others of its name.
        content = _content(config, identity) | {"id": secrets.token_hex(8)}
        write_durably(path, (json.dumps(content, indent=2) + "\n").encode())


def record_phase(
    run: Path, config: JobConfig, identity: Mapping[str, Any], phase: RunPhase
) -> None:
    """Record the phase that an opened run goes on with, unless it stands there. One rank only."""
    append_phase(run, phase, _content(config, identity))


def read_config(run: Path) -> RunConfig | FinetuneConfig:
    """The resolved config of a run, as it is now."""
    path = run / "config.json"
    if not path.exists():
        raise ConfigError(
            f"{run} is no run directory: it has no config.json; train one with `headrace pretrain "
            f"... --run {run}`"
        )
    table = now(run, _read(path))
    if table["kind"] == "pretrain":
        return decode(RunConfig, table["config"], name=str(path))
    return decode(FinetuneConfig, table["config"], name=str(path))


def last_config(run: Path) -> RunConfig | FinetuneConfig:
    """The config of the last attempt, with the keys that it was free to change."""
    first = read_config(run)
    started = [row["config"] for row in attempts(run) if row["event"] == "start"]
    return decode(type(first), started[-1], name=str(run / FILE)) if started else first


def copy_tokenizer(source: Path, run: Path) -> None:
    """Keep the tokenizer with the run, so that export needs nothing else. One rank only."""
    file = tokenizer_file(source)
    if not (run / file.name).exists():
        # With the names of its special tokens, which a tokenizer.json does not hold.
        data.tokenizer.copy_tokenizer(file, run)
        if problem := data.tokenizer.export_problem(file):
            log.warning("%s", problem)


def _is_strange(entry: Path) -> bool:
    return entry.name not in MAY_BE_FIRST and not is_leftover(entry.name, of="config.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
        return {"kind": table["kind"], "config": table["config"], **table}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is damaged: {error}; put back a copy (each attempt's config is in "
            f"{path.parent / 'attempts.jsonl'}), or start a new run with another --run"
        ) from None


def _content(config: JobConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": _kind(config),
        "config": config.model_dump(mode="json"),
        "identity": dict(identity),
    }


def _kind(config: JobConfig) -> str:
    return "pretrain" if isinstance(config, RunConfig) else "finetune"


def _compare(
    run: Path, old: dict[str, Any], new: dict[str, Any], allow_change: Sequence[str]
) -> None:
    if old["kind"] != new["kind"]:
        raise ConfigError(
            f"{run} is a {old['kind']} run, this is {new['kind']}; choose another --run"
        )
    # Fine-tuning runs from before they had one.
    old = {**old, "identity": old.get("identity") or new["identity"]}
    before, after = _comparable(old), _comparable(new)
    # Other micro-batches are other sums, which this run has promised not to see.
    held = ("micro_batch",) if after.get("train.reproducible") == "across_world_sizes" else ()
    changed = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and (key in held or not key.startswith(FREE))
        and allowing(key) not in allow_change
    ]
    if not changed:
        return
    told = [f"  {key}: {before.get(key)!r} in the run, {after.get(key)!r} now" for key in changed]
    message = f"{run} was started with another config:\n" + "\n".join(told)
    message += "\nrepeat the command with the run's values, or choose another --run"
    asked = sorted({name for name in map(allowing, changed) if name is not None})
    if asked and read_phases(run):
        options = " ".join(f"--allow-change {name}" for name in asked)
        message += f"; to go on with the new {' and '.join(asked)} from here, add {options}"
    raise ConfigError(message)


def _comparable(content: dict[str, Any]) -> dict[str, Any]:
    """Every value by its dotted key; sources by name, and without their paths: data may move."""
    # Runs from before the key was there.
    config = {"train": {"reproducible": "same_layout"}, **content["config"]}
    if content["kind"] == "pretrain":
        # Runs from before the keys were there.
        defaults = {"boundaries": "ignore", "packing": "concat"}
        config["data"] = {**defaults, **config.get("data", {})}
    if config.get("data", {}).get("sources") is not None:
        table = dict(config["data"])
        listed = table.pop("sources")
        by_name = {source["name"]: {"weight": source["weight"]} for source in listed}
        config["data"] = {**table, **({"sources": by_name} if by_name else {})}
    return dict(flat_keys({**config, **content.get("identity", {})}))
