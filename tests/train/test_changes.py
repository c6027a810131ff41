"""Every key of a config is classed: free to change at a resume, changed by a phase, or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import train.code
from train.attempts import attempts, begin_attempt, changes, end_attempt, versions
from train.config import ConfigError, RunConfig
from train.decode import flat_keys, load_config
from train.run import open_run

FREE = {
    "zero", "checkpoint", "log", "guard", "micro_batch", "stall_seconds", "data.num_workers",
    "data.path", "data.max_epochs", "data.cache_dir", "data.cache_bytes", "data.stage",
    "data.on_damage", "train.deterministic",
}  # fmt: skip
FIXED = {
    "seed", "precision", "optim", "schedule", "eval", "deepspeed", "steps", "seq_len",
    "batch_tokens", "model", "data.sources", "data.boundaries", "data.packing",
    "train.reproducible",
}  # fmt: skip
"""Refused, though a phase may bring some (tests/train/test_phases.py)."""
OTHER = {"precision": "fp32", "zero.stage": 2, "data.boundaries": "labels", "log.wandb": "offline"}
OTHER |= {"data.on_damage": "quarantine", "data.packing": "best_fit"}
OTHER |= {
    "guard.outlier": "skip",
    "guard.skip_steps": [7],
    "deepspeed": {"prescale_gradients": True},
}
OTHER |= {"seq_len": 512, "batch_tokens": 131_072, "model.hidden_size": 1536, "model.num_heads": 24}
OTHER |= {"model.max_seq_len": 4096}


BASE = RunConfig(steps=100)
# There is one dialect, sources want folders, a rollback wants checkpoints, and bits that do not
# depend on the ranks want a micro_batch (tests/train/test_exact.py).
UNTRIED = {"model.dialect", "data.sources", "guard.rollback", "train.reproducible"}


def classed(key: str) -> str:
    for known, name in ((FREE, "free"), (FIXED, "fixed")):
        if known & {key, key.split(".")[0]}:
            return name
    raise AssertionError(f"{key} has no class; say here whether a resume may change it, and why")


def keys() -> list[str]:
    return [key for key, _ in flat_keys(RunConfig().model_dump(mode="json"))]


def changed_by(key: str) -> RunConfig | None:
    """BASE with another value for a key; None where none can be made up beside the others."""
    table = BASE.model_dump(mode="json")
    *path, last = key.split(".")
    inner = table
    for name in path:
        inner = inner[name]
    old = inner[last]
    if isinstance(old, bool):
        new: object = not old
    elif isinstance(old, (int, float)):
        new = old * 2 + 1
    elif isinstance(old, str):
        new = old + "x"
    else:
        new = old
    inner[last] = OTHER.get(key, new)
    try:
        changed = RunConfig.model_validate(table)
    except ValueError:
        return None
    return None if changed == BASE else changed


def test_few_keys_are_classed_without_being_tried() -> None:
    assert {key for key in keys() if changed_by(key) is None} == UNTRIED


@pytest.mark.parametrize("key", keys())
def test_every_key_may_change_or_may_not(tmp_path: Path, key: str) -> None:
    kind, changed = classed(key), changed_by(key)
    if changed is None:
        assert key in UNTRIED
        return
    open_run(tmp_path / "run", BASE, {})
    if kind == "free":
        open_run(tmp_path / "run", changed, {})
        return
    with pytest.raises(ConfigError, match=f"{key}: .* in the run, .* now"):
        open_run(tmp_path / "run", changed, {})


def test_an_edit_of_the_code_is_another_version_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "train" / "step.py"
    module.parent.mkdir()
    monkeypatch.setattr(train.code, "ROOT", tmp_path)
    found = []
    for content in ("lr = 1", "lr = 2", "lr = 1"):
        module.write_text(content)
        found.append(versions()["headrace's code"])
    assert found[0] == found[2] != found[1]


def test_what_changed_between_attempts_is_recorded(tmp_path: Path) -> None:
    first = load_config(RunConfig, "steps = 9", [])
    second = load_config(RunConfig, "steps = 9", ["zero.stage=3", "checkpoint.every=5"])

    def begin(number: int, made: RunConfig, size: int) -> list[str]:
        found = begin_attempt(
            tmp_path,
            number,
            world_size=size,
            resumed_from=None,
            config=made,
            machine={"device": "cpu", "threads": number // 3},
        )
        end_attempt(tmp_path, number, outcome="failed", step=None)
        return found

    assert begin(1, first, 2) == []
    assert begin(2, first, 2) == []
    expected = ["world_size: 2 -> 4", "zero.stage: 1 -> 3", "checkpoint.every: 0 -> 5"]
    expected.append("threads: 0 -> 1")
    assert sorted(begin(3, second, 4)) == sorted(expected)
    rows = [row for row in attempts(tmp_path) if row["event"] == "start"]
    assert sorted(rows[-1]["changed"]) == sorted(expected)
    assert re.fullmatch("[0-9a-f]{16}", rows[-1]["versions"]["headrace's code"])
    newer = {**rows[-1], "versions": rows[-1]["versions"] | {"torch": "9.9"}}
    assert changes(rows[-1], newer) == [f"torch: {rows[-1]['versions']['torch']!r} -> '9.9'"]
