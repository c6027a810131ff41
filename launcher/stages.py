"""The stages of a life cycle, each with what it is made from and the script that makes it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.inputs import find_files
from data.places import is_url
from data.selection import Selection
from launcher import keys
from launcher.jobs import Job, check_time, render
from launcher.keys import Origin
from launcher.lead import lead_of
from launcher.lifecycle import Evaluate, Export, Finetune, Prepare, Pretrain, StageTable
from launcher.recipes import Recipe, find_recipe
from launcher.site import Site, shell_lines
from launcher.snapshot import Snapshot, take
from launcher.template import SlurmUsageError, filename_pattern, fill
from launcher.usage import NotTaken, parsed
from train.attempts import attempts
from train.config import FinetuneConfig, RunConfig, require_data
from train.decode import flat_keys, load_config


@dataclass(frozen=True)
class Stage:
    """One stage, resolved."""

    name: str
    output: Path
    origin: Origin
    script: str
    code: Snapshot
    """What the script runs from."""

    @property
    def record(self) -> Path:
        """What the script copies when it is done."""
        return keys.record_of(self.output, self.origin)

    @property
    def script_path(self) -> Path:
        """Where the script is kept."""
        is_run = self.name in ("pretrain", "finetune")
        folder = self.output / "logs" if is_run else keys.folder_of(self.output)
        return folder / f"{self.name}.sbatch"


Earlier = Mapping[str, Stage]


def resolve(tables: Mapping[str, StageTable], site: Site) -> list[Stage]:
    """Every stage in its order. Errors of config, recipe and data as for the single commands."""
    makers: Mapping[str, Callable[[Any, Site, Earlier], Stage]] = {
        "prepare": _prepare,
        "pretrain": _pretrain,
        "export": _export,
        "finetune": _finetune,
        "evaluate": _evaluate,
    }
    made: dict[str, Stage] = {}
    for name, table in tables.items():
        if Path(table.output).is_file():
            raise SlurmUsageError(
                f"[{name}] output: {table.output} is a file, no folder; name another one"
            )
        own = site.but(partition=table.slurm.partition, account=table.slurm.account)
        made[name] = makers[name](table, own, made)
    return list(made.values())


def is_whole(stage: Stage) -> bool:
    """Whether the output has what is written last."""
    if stage.name == "pretrain":
        rows = attempts(stage.output)
        return bool(rows) and rows[-1].get("outcome") == "complete"
    last = {
        "prepare": "manifest.json",
        "export": "headrace.json",
        "finetune": "hf/headrace.json",
        "evaluate": "evaluation.json",
    }
    return (stage.output / last[stage.name]).is_file()


def _prepare(table: Prepare, site: Site, earlier: Earlier) -> Stage:
    output = Path(table.output).resolve()
    if not table.inputs:
        raise SlurmUsageError("[prepare] inputs: it is empty; name files or folders of text")
    words = [word for named in table.inputs for word in ("--input", named)]
    words += ["--output", str(output), *table.options]
    asked = _parsed("prepare", words)
    inputs: dict[str, str] = {}
    for named in table.inputs:
        inputs |= _corpus(named, asked["exclude"] or ())
    settings = {"inputs": list(table.inputs), "options": list(table.options)}
    origin = Origin("prepare", settings, inputs | keys.contents(table.options))
    lines = [f"TASKS={table.tasks}", f"set -- {shlex.join(words)}"]
    return _script(table, site, origin, lines)


def _parsed(command: str, words: Sequence[str]) -> dict[str, Any]:
    """The parameters of a command. SlurmUsageError for what it would refuse when the job runs."""
    try:
        return parsed(command, words)
    except NotTaken as error:
        raise SlurmUsageError(
            f"[{command}] options: {error}; see `headrace {command} --help`"
        ) from None


def _corpus(named: str, exclude: Sequence[str]) -> dict[str, str]:
    """Content of the files that an input names; what comes from elsewhere goes by its name."""
    if named == "-" or named.startswith("-."):
        raise SlurmUsageError(
            f"[prepare] inputs: {named} is standard input, which jobs do not have; name files"
        )
    if is_url(named):
        return {}
    listed = Path(named.removeprefix("@"))
    if named.startswith("@") and listed.is_file() and b"://" in listed.read_bytes():
        return {named: keys.content_hash(listed)}
    files = find_files([named], selection=Selection(exclude))
    return {str(file.path): keys.content_hash(file.path) for file in files}


def _pretrain(table: Pretrain, site: Site, earlier: Earlier) -> Stage:
    overrides = list(table.overrides)
    named = {override.partition("=")[0].strip() for override in overrides}
    if "prepare" in earlier and not named & {"data", "data.path", "data.sources"}:
        overrides.insert(0, f"data={earlier['prepare'].output}")
    found = find_recipe(table.recipe, "pretrain")
    config = load_config(RunConfig, found.text, overrides, name=found.name)
    require_data(config)
    places = [str(path) for path in config.data.paths if not is_url(path)]
    _require([f"{place}/manifest.json" for place in places], "[pretrain] data", earlier)
    origin = _origin("pretrain", _numbers(config), places, earlier)
    return _job(table, site, origin, found, overrides)


def _export(table: Export, site: Site, earlier: Earlier) -> Stage:
    output = Path(table.output).resolve()
    run = _source(table.run, "pretrain", "", earlier, "[export] run")
    origin = _origin("export", {"options": list(table.options)}, table.options, earlier)
    origin = _with_source(origin, run, earlier, ("config.json", "attempts.jsonl"))
    words = ["RUN=" + shlex.quote(str(run)), "OUT=" + shlex.quote(str(output))]
    _parsed("export", [str(run), str(output), *table.options])
    lines = [*words, f"set -- {shlex.join(table.options)}"]
    return _script(table, site, origin, lines)


def _finetune(table: Finetune, site: Site, earlier: Earlier) -> Stage:
    model = _source(table.model, "export", "", earlier, "[finetune] model")
    data = Path(table.data).resolve()
    _require([str(data)], "[finetune] data", earlier)
    overrides = [f"model={model}", f"data={data}", *table.overrides]
    found = find_recipe(table.recipe, "finetune")
    config = load_config(FinetuneConfig, found.text, overrides, name=found.name)
    settings = _numbers(config)
    settings.pop("model.path")
    files = [str(data), *([config.data.val] if config.data.val else [])]
    origin = _origin("finetune", settings, files, earlier)
    origin = _with_source(origin, model, earlier, ("",))
    return _job(table, site, origin, found, overrides)


def _evaluate(table: Evaluate, site: Site, earlier: Earlier) -> Stage:
    output = Path(table.output).resolve()
    by_default = ("finetune", "hf") if "finetune" in earlier else ("export", "")
    model = _source(table.model, *by_default, earlier, "[evaluate] model")
    data = Path(table.data).resolve()
    _require([str(data)], "[evaluate] data", earlier)
    settings = {"options": list(table.options)}
    origin = _origin("evaluate", settings, [str(data), *table.options], earlier)
    origin = _with_source(origin, model, earlier, ("",))
    words = [str(model), "--data", str(data), *table.options]
    _parsed("evaluate", words)
    lines = [f"OUT={shlex.quote(str(output))}", f"set -- {shlex.join(words)}"]
    return _script(table, site, origin, lines)


def _source(named: str, stage: str, inside: str, earlier: Earlier, key: str) -> Path:
    """What a stage reads: what it names, or what the stage before makes."""
    if named:
        _require([str(Path(named).resolve())], key, earlier)
        return Path(named).resolve()
    if stage in earlier:
        return earlier[stage].output / inside
    raise SlurmUsageError(f"{key} is not named, and there is no [{stage}] that makes it; add one")


def _require(paths: Iterable[str], key: str, earlier: Earlier) -> None:
    """SlurmUsageError for what is not there and no earlier stage makes."""
    for path in paths:
        if not Path(path).exists() and _maker(path, earlier) is None:
            raise SlurmUsageError(f"{key}: there is no {path}, and no stage of this file makes it")


def _maker(path: str, earlier: Earlier) -> Stage | None:
    """The stage whose output a path is, or lies in; of several the innermost."""
    real = Path(path).resolve()
    found = [stage for stage in earlier.values() if real.is_relative_to(stage.output)]
    return max(found, key=lambda stage: len(stage.output.parts), default=None)


def _origin(
    name: str, settings: Mapping[str, Any], words: Sequence[str], earlier: Earlier
) -> Origin:
    """With the content of the files among the words, and the keys of the stages that make them."""
    makers = {word: _maker(word.partition("=")[2] or word, earlier) for word in words}
    upstream = {maker.name: maker.origin.key for maker in makers.values() if maker}
    rest = [word for word, maker in makers.items() if maker is None]
    return Origin(name, settings, keys.contents(rest), upstream)


def _with_source(origin: Origin, path: Path, earlier: Earlier, files: Sequence[str]) -> Origin:
    """With what is read of an earlier stage, or of these files of a folder that is there."""
    words = [str(path / file) if file else str(path) for file in files]
    more = _origin(origin.stage, origin.settings, words, earlier)
    return Origin(
        origin.stage,
        origin.settings,
        {**origin.inputs, **more.inputs},
        {**origin.upstream, **more.upstream},
    )


def _numbers(config: RunConfig | FinetuneConfig) -> dict[str, Any]:
    """The keys that decide what is trained: without those that a resumed run may change."""
    from train.run import FREE

    table = dict(flat_keys(config.model_dump(mode="json")))
    return {key: value for key, value in table.items() if not key.startswith(FREE)}


def _job(
    table: Pretrain | Finetune, site: Site, origin: Origin, recipe: Recipe, overrides: Sequence[str]
) -> Stage:
    """A stage that trains."""
    asked, output = table.slurm, Path(table.output).resolve()
    code = take(output / "code", recipe.path.resolve() if recipe.is_file else None)
    job = Job(
        kind="pretrain" if origin.stage == "pretrain" else "finetune",
        recipe=table.recipe,
        overrides=tuple(overrides),
        run=output,
        num_nodes=asked.nodes,
        min_nodes=asked.min_nodes,
        gpus_per_node=8 if asked.gpus_per_node is None else asked.gpus_per_node,
        time=asked.time or "24:00:00",
        options=asked.options,
        site=site,
        lead=lead_of(output, asked.lead),
        code=code,
        copies_code=asked.stage_code,
        preflight=site.preflight if asked.preflight is None else asked.preflight,
        record=keys.record_of(output, origin),
    )
    return Stage(origin.stage, output, origin, render(job), code)


def _script(table: StageTable, site: Site, origin: Origin, lines: Sequence[str]) -> Stage:
    """A stage that does not train."""
    asked, output, name = table.slurm, Path(table.output).resolve(), origin.stage
    if asked.time:
        check_time(asked.time)
    directives: dict[str, str | None] = {"job-name": f"headrace-{name}", "chdir": str(Path.cwd())}
    if asked.gpus_per_node is not None:
        directives["gpus-per-node"] = str(asked.gpus_per_node) if asked.gpus_per_node else None
    if asked.cpus_per_task is not None:
        directives["cpus-per-task"] = str(asked.cpus_per_task)
    told = {"mem-per-cpu": asked.mem_per_cpu, "time": asked.time}
    directives |= {option: value for option, value in told.items() if value}
    directives |= site.directives
    folder = keys.folder_of(output)
    log = "%x-%A_%a.out" if name == "prepare" else "slurm-%j.out"
    directives["output"] = f"{filename_pattern(folder)}/{log}"
    code = take(folder / "code")
    has_container = site.container.runtime != "none"
    block = [
        f"PYTHON={shlex.quote(site.container.python if has_container else sys.executable)}",
        f"CODE={shlex.quote(str(code.folder))}",
        f"RECORD={shlex.quote(str(keys.record_of(output, origin)))}",
        *shell_lines(site, Path.cwd(), output.parent, gpus=bool(asked.gpus_per_node)),
        *lines,
    ]
    script = fill(f"{name}.sbatch", directives, block, options=asked.options)
    return Stage(name, output, origin, script, code)
