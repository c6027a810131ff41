"""Fine-tuning: any Hugging Face folder, examples from a file, and the shared loop.

`instruct` trains a language model on responses to prompts, `classify` a classifier on texts with
labels. transformers' own module runs inside the same engine; the result is a Hugging Face folder
again, RUN/hf. Its weights come from the last checkpoint: they are the fp32 ones at every ZeRO
stage, and a run that was killed while it wrote them writes them when it is started again.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data.durable import publish_folder
from train import hf
from train.attempt import run_attempt
from train.checkpoint import CheckpointError, committed, open_checkpoint
from train.choice import newest_intact, retraining
from train.config import ConfigError, FinetuneConfig
from train.decode import decode, flat_keys
from train.examples import Examples, read_files, tokenize
from train.examples_task import ExamplesTask
from train.restore import restore_newer
from train.run import Outcome
from train.slices import writing_tensors
from train.work import Work
from train.world import World, join_world

log = logging.getLogger(__name__)

RESULT = "hf"
"""Folder of a run that holds the trained model."""
PROVENANCE = "headrace.json"
"""Written last; lists the other files of the folder with their sizes."""


def finetune(config: FinetuneConfig, run: Path, *, stop_at: int | None = None) -> Outcome:
    """Collective. Train `run`, or continue it; when it is complete its model is in RUN/hf.

    ConfigError, DataError or ModelFolderError when config, examples or model cannot be used.
    """
    with join_world(stall_seconds=config.stall_seconds, repeats=config.train.repeats) as world:
        return finetune_on(world, config, run, stop_at=stop_at)


def finetune_on(
    world: World, config: FinetuneConfig, run: Path, *, stop_at: int | None = None
) -> Outcome:
    """Collective. `finetune` on ranks that have met already."""
    config, examples = prepare_examples(config)
    restore_newer(world, run, config.checkpoint.mirror)
    work = finetuning(config, examples, num_ranks=world.size)
    outcome = run_attempt(world, run, work, stop_at=stop_at)
    if outcome == "complete":
        _write_result(world, run, config, examples)
    return outcome


def prepare_examples(config: FinetuneConfig) -> tuple[FinetuneConfig, Examples]:
    """The resolved config and its tokenized examples."""
    if not config.model.path:
        raise ConfigError("no model is named; write model=DIR, a Hugging Face folder")
    context = hf.context_length(config.model.path)
    train, val = read_files(config)
    num_parameters = hf.num_parameters(config.model.path)
    config = resolve(
        config, num_examples=len(train), context=context, num_parameters=num_parameters
    )
    return config, tokenize(config, train, val)


def learning_rate_for(num_parameters: int) -> float:
    """A peak learning rate for fine-tuning all of a model, by its size.

    A power law through two points: 1.5e-3 at 1 M parameters, measured on models pretrained here,
    and 1.2e-5 at 7 B, which is customary. Two digits are kept.
    """
    return float(f"{1.5e-3 * (1e6 / max(num_parameters, 1)) ** 0.55:.1e}")


def resolve(
    config: FinetuneConfig, *, num_examples: int, context: int | None, num_parameters: int
) -> FinetuneConfig:
    """The config with `steps` from `epochs` and `optim.lr` from the model's size where they are 0,
    and `seq_len` within the context.

    Every step has a whole batch; the last one may reach into one more epoch.
    """
    seq_len = config.seq_len
    if context is not None and context < seq_len:
        log.info("seq_len is %d, not %d: the model reads no more", context, seq_len)
        seq_len = context
    if seq_len < 2:
        raise ConfigError(
            f"seq_len={seq_len} leaves no room for an example; write seq_len=2 or more"
        )
    steps = config.steps or math.ceil(config.epochs * num_examples / config.batch_size)
    table = {**config.model_dump(mode="json"), "steps": steps, "seq_len": seq_len}
    if config.optim.lr == 0:
        table["optim"]["lr"] = learning_rate_for(num_parameters)
        log.info(
            "optim.lr is %g, for a model of %s parameters",
            table["optim"]["lr"],
            f"{num_parameters:,}",
        )
    return decode(FinetuneConfig, table, name="config")


def finetuning(config: FinetuneConfig, examples: Examples, *, num_ranks: int) -> Work:
    """The work of a fine-tuning run on `num_ranks` ranks."""
    micro_batch, accumulation = config.layout(config.batch_size, num_ranks=num_ranks)

    def module() -> torch.nn.Module:
        model = _load(config, examples, dtype=torch.float32)
        # A cache of keys and values only costs memory in training.
        model.config.use_cache = False
        return model  # type: ignore[no-any-return]

    return Work(
        config=config,
        task=ExamplesTask(
            config,
            examples.train,
            examples.val,
            labels=examples.labels,
            micro_batch=micro_batch,
            pad_id=examples.pad_id,
        ),
        module=module,
        steps=config.steps,
        micro_batch=micro_batch,
        accumulation=accumulation,
        identity=_described(Path(config.model.path)),
    )


def _described(folder: Path) -> dict[str, Any]:
    """What a model is, key by key of its config.json, and the bytes of its weights' files.

    Their content is not read for it: from the first checkpoint on a run has its own weights.
    """
    table = json.loads((folder / "config.json").read_text())
    weights = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
    return dict(flat_keys({"config.json": table, "bytes": weights}))


def _load(config: FinetuneConfig, examples: Examples, *, dtype: torch.dtype | None) -> Any:
    if config.task == "instruct":
        return hf.load_causal(config.model.path, dtype=dtype)
    return hf.load_classifier(config.model.path, examples.labels, seed=config.seed, dtype=dtype)


def _write_result(world: World, run: Path, config: FinetuneConfig, examples: Examples) -> None:
    """Collective. Publish RUN/hf, unless it is there; CheckpointError when it lacks a file."""
    with world.together(f"writing {run / RESULT}"):
        if world.is_main and (run / RESULT).exists():
            _check_whole(run / RESULT)
        elif world.is_main:
            _publish(run, config, examples)
    log.info("the model is in %s", run / RESULT)


def _check_whole(folder: Path) -> None:
    try:
        files = json.loads((folder / PROVENANCE).read_text())["files"]
    except (OSError, ValueError, KeyError):
        lost = [PROVENANCE]
    else:
        # Sizes of the weights alone: of the other files a person may edit one.
        lost = [
            name
            for name, size in files.items()
            if not (path := folder / name).is_file()
            or (path.suffix == ".safetensors" and path.stat().st_size != size)
        ]
    if lost:
        raise CheckpointError(
            f"{folder} is not whole, missing or cut is {', '.join(lost[:3])}; remove {folder} and "
            "give the same `headrace finetune` again: the last checkpoint writes it anew"
        )


def _publish(run: Path, config: FinetuneConfig, examples: Examples) -> None:
    model = _load(config, examples, dtype=None)
    step = _fill(model, run, config)
    temporary = run / f"{RESULT}.tmp"
    source = Path(config.model.path)
    overlay = _overlay(config)
    try:
        with writing_tensors(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            hf.save_folder(model, temporary, tokenizer_from=source, tokenizer_config=overlay)
            _write_provenance(temporary / PROVENANCE, step, config, examples)
        publish_folder(temporary, run / RESULT)
    finally:
        # A full disk gets its room back.
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(model: Any, run: Path, config: FinetuneConfig) -> int:
    """Give the model the weights of the last checkpoint; returns its step."""
    with _telling_remedy(run):
        saved = open_checkpoint(run)
    parameters = dict(model.named_parameters())
    if parameters.keys() != saved.parameters.keys():
        differing = sorted(parameters.keys() ^ saved.parameters.keys())
        raise CheckpointError(
            f"{saved.folder} does not hold the parameters of {config.model.path}: "
            f"{', '.join(differing[:3])}; is that folder still the model the run started from?"
        )
    with _telling_remedy(run), torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(saved.read(name)))
    return saved.step


@contextmanager
def _telling_remedy(run: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        if not (steps := committed(run)):
            raise
        remedy = retraining(run, steps[0], intact=newest_intact(run, but=steps[0]))
        raise CheckpointError(f"{error}\n{remedy}") from error


def _overlay(config: FinetuneConfig) -> dict[str, Any]:
    if config.task == "instruct":
        return {}
    # Whoever classifies with the folder cuts and pads texts as training did.
    fill = hf.load_tokenizer(config.model.path).fill_token
    return {"model_max_length": config.seq_len, "pad_token": fill}


def _write_provenance(path: Path, step: int, config: FinetuneConfig, examples: Examples) -> None:
    content = {
        "format": 1,
        "kind": "finetune",
        "step": step,
        "config": config.model_dump(mode="json"),
        "num_train_examples": len(examples.train),
        "num_val_examples": len(examples.val),
        "prompt_template": examples.template,
        "labels": examples.labels,
        "files": {file.name: file.stat().st_size for file in sorted(path.parent.iterdir())},
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
