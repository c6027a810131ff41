"""RUN/phases.jsonl: with what the run began, and what was changed on purpose, from which step on.

Rows are only appended. Each holds a phase (data/phases.py) and the keys of the config that a phase
decides, so that anyone who has the run knows the samples of every step. A change that is made at a
step before the last row's takes its place: none of its steps was kept. No torch here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.config import DataError
from data.durable import RowFile
from data.lengths import carried_over
from data.mixture import check_shares
from data.phases import Phases, RunPhase, first_phase, standing
from data.sources import Datasets, check_continues
from train.config import ConfigError, RunConfig

FILE = "phases.jsonl"

CHANGEABLE = {
    "batch_tokens": ("batch_tokens",),
    "data.sources": ("data.sources", "data_fingerprint"),
    "seq_len": ("seq_len", "model.max_seq_len"),
}
"""What `--allow-change` takes, and the keys (or prefixes) that it lets a resumed run change."""

DECIDED = {
    "config": ("batch_tokens", "data", "seq_len", "model.max_seq_len"),
    "identity": ("data_fingerprint",),
}
"""What a row keeps of config and identity, a table below a table by its dotted key; rows from
before lengths could change lack the last two of config.
"""


@dataclass(frozen=True)
class History:
    """What a run directory says of its past; the same on every rank."""

    phases: tuple[RunPhase, ...] = ()
    steps: int = 0
    """Steps of the newest checkpoint."""


def read_phases(run: Path) -> tuple[RunPhase, ...]:
    """The phases of a run that count; none for a run that has not begun."""
    return tuple(standing([phase for phase, _ in _rows(run)]))


def now(run: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """The content of RUN/config.json with what the last phase has changed in it."""
    rows = _rows(run)
    merged = dict(table)
    for name, changes in (rows[-1][1] if rows else {}).items():
        merged[name] = dict(table.get(name, {}))
        for key, value in changes.items():
            outer, dot, inner = key.partition(".")
            below = merged[name].get(outer, {})
            merged[name][outer] = {**below, inner: value} if dot else value
    return merged


def data_tables(run: Path) -> list[dict[str, Any]]:
    """The [data] table of every row ever written, oldest first."""
    return [content["config"]["data"] for _, content in _rows(run)]


def append_phase(run: Path, phase: RunPhase, content: Mapping[str, Any]) -> None:
    """Record that the run goes on with `phase`, unless it does so already. One rank only."""
    wanted = {
        name: {
            key: _value(content[name], key) for key in keys if key.split(".")[0] in content[name]
        }
        for name, keys in DECIDED.items()
    }
    rows = _rows(run)
    if rows and rows[-1][0] == phase and _holds(wanted, rows[-1][1]):
        return
    with contextlib.closing(RowFile(run / FILE)) as file:
        file.append({**phase.model_dump(), **wanted})
        file.sync()


def phases_of(
    config: RunConfig, datasets: Datasets, history: History, allow_change: Sequence[str] = ()
) -> Phases:
    """The phases of a run that goes on with `config`: the same ones, or one more that begins where
    the run stands. Whether the change is allowed is not asked here, but a new seq_len that nobody
    has asked for, which `open_run` refuses, begins none.

    DataUsageError where a new seq_len cannot begin, or a weight is too small for a new phase.
    """
    slots, fingerprints = datasets.slots(), datasets.fingerprints()
    seq_len = config.seq_len
    weights = {source.name: source.weight for source in config.data.sources}
    if not history.phases or history.steps == 0:
        check_shares(weights)
        return Phases([first_phase(config.batch_samples, slots, fingerprints, seq_len=seq_len)])
    phases = Phases(history.phases)
    last = phases.rows[-1]
    if (last.slots, last.batch_samples, last.seq_len) == (slots, config.batch_samples, seq_len):
        return phases
    if last.seq_len != seq_len and "seq_len" not in allow_change:
        return phases
    check_continues(phases.fingerprints, datasets.sources)
    check_shares(weights)
    new = RunPhase(
        first_step=history.steps + 1,
        first_sample=phases.samples(history.steps)[1],
        batch_samples=config.batch_samples,
        slots=slots,
        fingerprints=fingerprints,
        seq_len=seq_len,
        bases=carried_over(
            phases,
            {source.name: source for source in datasets.sources},
            seed=config.seed,
            seq_len=seq_len,
            step=history.steps,
            last_step=config.steps,
        ),
    )
    return Phases(standing([*phases.rows, new]))


def check_asked(allow_change: Sequence[str]) -> None:
    """ConfigError when a key cannot change in the middle of a run."""
    for key in allow_change:
        if key not in CHANGEABLE:
            *others, last = CHANGEABLE
            raise ConfigError(
                f"--allow-change {key}: {key} cannot change in the middle of a run: only "
                f"{', '.join(others)} and {last} can; leave the option out, or choose another --run"
            )


def allowing(key: str) -> str | None:
    """What `--allow-change` takes for a key that differs; None when it must not differ."""
    for name, keys in CHANGEABLE.items():
        if any(key == known or key.startswith(f"{known}.") for known in keys):
            return name
    return None


def _value(table: Mapping[str, Any], key: str) -> Any:
    outer, dot, inner = key.partition(".")
    return table[outer][inner] if dot else table[outer]


def _holds(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a row says what is wanted, as far as it says anything."""
    return all(found[name][key] == wanted[name].get(key) for name in found for key in found[name])


def _rows(run: Path) -> list[tuple[RunPhase, dict[str, Any]]]:
    path = run / FILE
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            # Torn by a crash: the change was not made. Only something foreign nests deeply.
            continue
        try:
            content = {name: row.pop(name) for name in DECIDED}
            phase = RunPhase.model_validate(row)
            if not phase.seq_len:
                phase = phase.model_copy(update={"seq_len": _first_seq_len(run)})
            rows.append((phase, content))
        except (KeyError, AttributeError, TypeError, ValidationError) as error:
            raise DataError(
                f"{path}:{number} is damaged ({type(error).__name__}): which samples the steps "
                "have cannot be told; put back a copy of the file"
            ) from None
    return rows


def _first_seq_len(run: Path) -> int:
    """What the run began with: rows from before it could change do not repeat it. 0 where its
    config.json is damaged, which whoever opens the run tells.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return int(json.loads((run / "config.json").read_text())["config"]["seq_len"])
    return 0
