"""A checkpoint knows of what model it is, and no other model is filled with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.durable import read_sealed, write_sealed
from tests.ranks import run_ranks
from tests.train.checkpoints import inventory, write
from tests.train.toy import VOCAB, WIDTH, Toy, make_engine, run_steps, save
from train.checkpoint import CheckpointError, open_checkpoint
from train.config import JobConfig
from train.inventory import Parameter, check_same
from train.plain import PlainEngine
from train.state import load_checkpoint
from train.world import RankError, World

TRAINED = Parameter(shape=[6, 5], dtype="fp32", trainable=True, group=0)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"shape": [5, 6]}, r"'a' has shape \[6, 5\] there, \[5, 6\] here"),
        ({"dtype": "bf16"}, "'a' has dtype fp32 there, bf16 here"),
        ({"group": 1}, "'a' has group 0 there, 1 here"),
        (
            {"trainable": False, "group": None},
            "'a' has trainable True there, False here; group 0 there, None here",
        ),
    ],
)
def test_the_first_difference_is_named(changed: dict[str, object], told: str) -> None:
    there = {"a": TRAINED, "b": TRAINED}
    check_same(there, dict(there), "it")
    here = {**there, "a": TRAINED.model_copy(update=changed)}
    with pytest.raises(CheckpointError, match=f"^RUN is of another model: {told}$"):
        check_same(there, here, "RUN")


def test_a_parameter_too_many_or_too_few_is_named() -> None:
    both, one = inventory(), {"a": inventory()["a"]}
    with pytest.raises(CheckpointError, match=r"'b' is there, and the model .* not have it"):
        check_same(both, one, "it")
    with pytest.raises(CheckpointError, match=r"'b' is not there, and the model .* has it"):
        check_same(one, both, "it")


def test_a_manifest_of_the_first_version_says_who_reads_it(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "checkpoints/step-000000001/manifest.json"
    content = read_sealed(path)
    write_sealed(path, {**content, "version": 1})
    with pytest.raises(CheckpointError, match="version 1 has no inventory of the model, and"):
        open_checkpoint(tmp_path)
    for changed in ({"dtype": "int8"}, {"trainable": 1}, {"more": 1}):
        first = {**content["parameters"]["a"], **changed}
        write_sealed(path, {**content, "parameters": {**content["parameters"], "a": first}})
        with pytest.raises(CheckpointError, match=r"no headrace writes: parameters\.a\."):
            open_checkpoint(tmp_path)


def frozen(world: World, config: JobConfig) -> PlainEngine:
    """An engine whose norm is not trained."""
    module = Toy()
    module.norm.requires_grad_(False)
    return PlainEngine(module, config, world)


def save_and_load(world: World, folder: Path) -> list[str]:
    """Take a checkpoint of every kind of engine, and load the first into engines that differ."""
    kinds = {
        "plain": ({"zero": {"stage": 0}, "precision": "fp32"}, True),
        "one": ({"zero": {"stage": 1}, "precision": "fp32"}, False),
        "three": ({"zero": {"stage": 3}, "precision": "fp32"}, False),
        "low": ({"zero": {"stage": 3}, "precision": "bf16"}, False),
        "low plain": ({"precision": "bf16"}, True),
    }
    configs = {name: JobConfig.model_validate(table) for name, (table, _) in kinds.items()}
    engines = {
        name: make_engine(config, world, size=2, micro_batch=2, plain=kinds[name][1])[0]
        for name, config in configs.items()
    }
    for name, engine in engines.items():
        run_steps(engine, world, range(1, 2), size=2, micro_batch=2, accumulation=1)
        save(engine, world, folder / name, 1)
        load_checkpoint(engine, world, open_checkpoint(folder / name))
    told = []
    for other in (engines["low"], frozen(world, configs["plain"])):
        with pytest.raises(RankError) as refused:
            load_checkpoint(other, world, open_checkpoint(folder / "one"))
        told.append(str(refused.value))
    part = frozen(world, configs["plain"])
    save(part, world, folder / "part", 1)
    with torch.no_grad():
        part.module.wide.bias.fill_(7.0)
    load_checkpoint(part, world, open_checkpoint(folder / "part"))
    assert float(part.module.wide.bias.detach().abs().max()) < 7.0
    return told


def test_every_engine_takes_stock_alike(tmp_path: Path) -> None:
    low, part = run_ranks(1, save_and_load, tmp_path)[0]
    assert "is of another model: 'embedding.weight' has dtype fp32 there, bf16 here" in low
    assert "'norm.bias' has trainable True there, False here; group 1 there, None here" in part
    found = {
        name: open_checkpoint(tmp_path / name).inventory
        for name in ("plain", "one", "three", "low", "low plain")
    }
    assert found["plain"] == found["one"] == found["three"]
    assert found["low"] == found["low plain"]
    matrix = Parameter(shape=[VOCAB, WIDTH], dtype="fp32", trainable=True, group=0)
    assert found["one"]["embedding.weight"] == matrix
    assert {name for name, one in found["one"].items() if one.group == 1} == {
        name for name, parameter in Toy().named_parameters() if parameter.dim() < 2
    }
    saved = open_checkpoint(tmp_path / "part")
    assert set(saved.inventory) - set(saved.parameters) == {"norm.weight", "norm.bias"}
    saved.verify()
