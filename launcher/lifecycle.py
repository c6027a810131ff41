"""A life cycle in one TOML file: which stages there are, what each is given, and where it runs.

    [prepare]   inputs, output, options            slurm/prepare.sbatch, an array per step of it
    [pretrain]  recipe, output, overrides          slurm/pretrain.sbatch
    [export]    output, options                    slurm/export.sbatch
    [finetune]  recipe, output, data, overrides    slurm/finetune.sbatch
    [evaluate]  data, output, options              slurm/evaluate.sbatch

Any of them may be left out; what the one before would have made is then named: `overrides =
["data=DATASET"]`, `run`, `model`. Each has a table `slurm`. slurm/lifecycle.toml is an example.
Paths start where the command is given, as everywhere.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, field_validator

from data.places import is_url
from launcher.template import SlurmUsageError
from train.decode import decode
from train.settings import Table


class Resources(Table):
    """What a stage asks Slurm for; None and "" leave it to the stage's script in slurm/."""

    nodes: PositiveInt = 1
    """Machines; more than one for pretrain alone."""
    min_nodes: PositiveInt | None = None
    """As few as pretrain starts with when others have failed; by default `nodes`."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs in each machine; 0 for none."""
    cpus_per_task: PositiveInt | None = None
    """Cores of a task of prepare, or of evaluate."""
    mem_per_cpu: str = ""
    """Memory of each such core, as Slurm writes it."""
    time: str = ""
    """Time limit, as Slurm writes it."""
    lead: PositiveInt | None = None
    """Seconds before the limit at which training is asked to save."""
    stage_code: bool = False
    """Copy the code of training to every node's own disk first, by sbcast."""
    preflight: bool | None = None
    """Look at the nodes before each attempt of pretrain; None: as the site says."""
    partition: str = ""
    """In place of the site's."""
    account: str = ""
    """In place of the site's."""
    options: tuple[str, ...] = ()
    """Further sbatch options, such as --nodelist=n[1-4]."""


class StageTable(Table):
    """What all stages have in common."""

    output: str
    """Folder that the stage writes; its scripts, logs and key go into OUTPUT.stage."""
    slurm: Resources = Resources()
    """What it asks Slurm for."""

    @field_validator("output")
    @classmethod
    def _is_new_folder(cls, value: str) -> str:
        if is_url(value):
            raise ValueError(f"{value} is no path; jobs write to a disk that all nodes share")
        # Its scripts and its key lie beside it, in NAME.stage.
        if Path(value).name in ("", ".."):
            raise ValueError(f"{value!r} names no new folder; write one such as work/NAME")
        return value


class Prepare(StageTable):
    """Text to token shards."""

    inputs: tuple[str, ...]
    """What `--input` takes."""
    options: tuple[str, ...] = ()
    """Further options of `headrace prepare`, one word each: "--vocab-size=32000"."""
    tasks: PositiveInt = 64
    """Tasks of an array."""


class Pretrain(StageTable):
    """Token shards to checkpoints."""

    recipe: str
    """A built-in name or a file."""
    overrides: tuple[str, ...] = ()
    """key=value of the recipe; data=DATASET where there is no [prepare]."""


class Export(StageTable):
    """Checkpoints to a Hugging Face folder."""

    run: str = ""
    """Run directory, where there is no [pretrain]."""
    options: tuple[str, ...] = ()
    """Further options of `headrace export`: "--dtype=bf16"."""


class Finetune(StageTable):
    """A Hugging Face folder and examples to OUTPUT/hf."""

    recipe: str
    """A built-in name or a file."""
    data: str
    """Examples: .jsonl or .csv."""
    model: str = ""
    """Hugging Face folder, where there is no [export]."""
    overrides: tuple[str, ...] = ()
    """key=value of the recipe."""


class Evaluate(StageTable):
    """A Hugging Face folder to OUTPUT/evaluation.json."""

    data: str
    """Dataset or file."""
    model: str = ""
    """Hugging Face folder; by default what [finetune] or, without it, [export] makes."""
    options: tuple[str, ...] = ()
    """Further options of `headrace evaluate`: "--split=val"."""


STAGES: Mapping[str, type[StageTable]] = {
    "prepare": Prepare,
    "pretrain": Pretrain,
    "export": Export,
    "finetune": Finetune,
    "evaluate": Evaluate,
}
"""In their order."""


ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "min_nodes": ("pretrain",),
    "lead": ("pretrain", "finetune"),
    "stage_code": ("pretrain", "finetune"),
    "preflight": ("pretrain",),
    "cpus_per_task": ("prepare", "evaluate"),
    "mem_per_cpu": ("prepare", "evaluate"),
}
"""Key of `slurm` -> the stages whose script knows it; the others take whole nodes."""


def is_lifecycle(path: str) -> bool:
    """Whether a file holds stages, and not the keys of a recipe."""
    if not path.endswith(".toml") or not Path(path).is_file():
        return False
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False
    return any(isinstance(table.get(name), dict) for name in STAGES)


def load_lifecycle(path: Path) -> dict[str, StageTable]:
    """The stages of a file in their order; ConfigError or SlurmUsageError for what is none."""
    table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    for name in table:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, n=1)
            raise SlurmUsageError(
                f"{path}: unknown stage {name!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(STAGES)}")
            )
    for name, told in table.items():
        if not isinstance(told, dict):
            raise SlurmUsageError(f"{path}: {name} = {told!r} is no table; write [{name}], once")
    stages = {
        name: decode(kind, table[name], name=f"{path} [{name}]")
        for name, kind in STAGES.items()
        if name in table
    }
    for name, stage in stages.items():
        if name != "pretrain" and stage.slurm.nodes > 1:
            raise SlurmUsageError(
                f"{path} [{name}]: slurm.nodes = {stage.slurm.nodes}, but only pretrain runs on "
                "several nodes" + ("; tasks = N spreads prepare" if name == "prepare" else "")
            )
        for key, users in ONLY_FOR.items():
            if key in stage.slurm.model_fields_set and name not in users:
                raise SlurmUsageError(
                    f"{path} [{name}]: slurm.{key} is for {' and '.join(users)} alone; leave it out"
                )
    # However they are written.
    outputs = [Path(stage.output).resolve() for stage in stages.values()]
    if twice := next(
        (s for s, o in zip(stages.values(), outputs, strict=True) if outputs.count(o) > 1), None
    ):
        raise SlurmUsageError(
            f"{path}: two stages write {twice.output}; give each an output of its own"
        )
    return stages
