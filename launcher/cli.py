"""The `headrace` command: parse argv, call one function, turn its end into an exit code.

Results go to stdout, logs and progress to stderr. Exit codes: 0 done, 1 failure, 2 usage or config
refused, 3 stopped on purpose and resumable. What a command needs is imported inside it, so that
help, plan and submit answer without torch.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from typer.core import TyperGroup

from launcher import spawn
from launcher.recipes import find_recipe


class _Contents(TyperGroup):
    """Lists commands in the order in which a person meets them; typer puts groups first."""

    def list_commands(self, ctx: Any) -> list[str]:
        first = ["quickstart", "prepare", "data"]
        return first + [name for name in super().list_commands(ctx) if name not in first]


app = typer.Typer(
    name="headrace",
    cls=_Contents,
    help="Raw text to token shards to a GPT trained with DeepSpeed ZeRO to a Hugging Face folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look into a dataset.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in name or a file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted keys, such as optim.lr=3e-4."),
]
RunFolder = Annotated[
    Path | None, typer.Option("--run", help="Run directory.", show_default="runs/RECIPE")
]
NumProcesses = Annotated[int, typer.Option("--nproc", min=1, help="Ranks on this machine.")]
StopAt = Annotated[
    int | None,
    typer.Option("--stop-at", min=1, help="Save and leave after this step; the schedule stays."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Config = TypeVar("Config", bound=BaseModel)


def main() -> None:
    """Run the command line of this process and leave with its exit code."""
    _configure_logging(spawn.rank_of(os.environ))
    try:
        app(prog_name="headrace")
    except ValueError as error:
        # Errors meant for people carry their exit code; anything else keeps its traceback.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)


@app.command()
def quickstart(
    workdir: Annotated[Path, typer.Option(help="Where everything is written.")] = Path(
        "quickstart"
    ),
) -> None:
    """The whole life cycle on this Python's own source code, in minutes on two cores."""
    from launcher.quickstart import quickstart

    _leave(quickstart(workdir))


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Option("--input", help="Text file, .jsonl file, directory or glob; repeatable."),
    ],
    output: Annotated[Path, typer.Option(help="Dataset directory to write.")],
    more_inputs: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH]...", help="Further inputs.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Train a tokenizer of this size.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Use this tokenizer.model or tokenizer.json instead.")
    ] = None,
    val_fraction: Annotated[float | None, typer.Option(help="Share held out.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Key of the text in a .jsonl.")] = None,
    max_bad_lines: Annotated[
        int | None, typer.Option(help="Broken .jsonl lines to tolerate.")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Put BOS in front of every document.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 uses every core.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Turn text into a tokenizer and token shards."""
    from data.config import PrepareConfig
    from data.prepare import prepare
    from launcher.show import show_preparation, stage_progress

    given = {
        "vocab_size": vocab_size,
        "val_fraction": val_fraction,
        "text_field": text_field,
        "max_bad_lines": max_bad_lines,
        "bos": bos,
    }
    config = _parse(
        PrepareConfig, {key: value for key, value in given.items() if value is not None}
    )
    with stage_progress() as progress:
        summary = prepare(
            [*inputs, *(more_inputs or ())],
            output,
            config,
            workers=workers or spawn.num_cores(),
            tokenizer=tokenizer,
            progress=progress,
        )
    show_preparation(summary, as_json=as_json)


@data_app.command()
def verify(
    dataset: Annotated[Path, typer.Argument(help="Dataset directory.")],
    full: Annotated[bool, typer.Option("--full", help="Read and hash every byte.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a dataset against its manifest."""
    from data.verify import verify
    from launcher.show import show_verification

    result = verify(dataset, full=full)
    show_verification(result, as_json=as_json)
    _leave(0 if result.ok else 1)


@data_app.command()
def inspect(
    dataset: Annotated[Path, typer.Argument(help="Dataset directory.")],
    step: Annotated[int, typer.Option(min=1, help="Optimizer step, counted from 1.")],
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option(help="Gives seed, seq_len, batch_tokens.")] = "tiny-cpu",
    run: Annotated[
        Path | None, typer.Option(help="A run gives them; its own data_hash is compared.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the samples of a training step and recompute its data_hash."""
    from launcher.inspect import inspect_step
    from launcher.show import show_inspection

    found = inspect_step(dataset, step=step, run=run, recipe=recipe, overrides=overrides or ())
    show_inspection(found, as_json=as_json)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs in each.")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200 or a100.")] = "h100",
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, help="Assumed share of the peak FLOP/s.")
    ] = 0.4,
    explain: Annotated[bool, typer.Option("--explain", help="Show every formula.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run needs and how long it takes, before any GPU is allocated."""
    from launcher.plan import make_plan, show_plan
    from train.config import RunConfig, load_config

    found = find_recipe(recipe, "pretrain")
    config = load_config(RunConfig, found.text, overrides or (), name=found.name)
    made = make_plan(config, nodes=nodes, gpus_per_node=gpus_per_node, gpu=gpu, mfu=mfu)
    show_plan(made, explain=explain, as_json=as_json)


@app.command()
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    run: RunFolder = None,
    nproc: NumProcesses = 1,
    stop_at: StopAt = None,
) -> None:
    """Train a GPT from nothing; the same command resumes it."""
    from train.config import RunConfig, load_config

    found = find_recipe(recipe, "pretrain")
    config = load_config(RunConfig, found.text, overrides or (), name=found.name)
    folder = run or Path("runs") / found.name

    def train() -> str:
        from train.pretrain import pretrain

        return pretrain(config, folder, stop_at=stop_at)

    _leave(spawn.run_job(train, run=folder, num_processes=nproc))


@app.command()
def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    run: RunFolder = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs in each; 0 for none.")] = 8,
    time: Annotated[str, typer.Option(help="Limit of one attempt.")] = "24:00:00",
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Further sbatch option, such as --partition=batch.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script.")] = False,
) -> None:
    """Hand a pretraining run to Slurm as one readable batch script."""
    from launcher import slurm
    from train.config import RunConfig, load_config

    found = find_recipe(recipe, "pretrain")
    load_config(RunConfig, found.text, overrides or (), name=found.name)
    job = slurm.Job(
        recipe=str(found.path.resolve()) if "/" in recipe else recipe,
        overrides=tuple(overrides or ()),
        run=(run or Path("runs") / found.name).resolve(),
        num_nodes=nodes,
        gpus_per_node=gpus_per_node,
        time=time,
        options=tuple(sbatch or ()),
    )
    print(slurm.render(job) if dry_run else slurm.submit(job), end="" if dry_run else "\n")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory of `headrace pretrain`.")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to write.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint; the newest by default.")] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder, and prove that it is the same model."""
    from train.export import export

    export(run, out, step=step)
    print(out)


@app.command()
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    run: RunFolder = None,
    nproc: NumProcesses = 1,
    stop_at: StopAt = None,
) -> None:
    """Continue from a Hugging Face folder: model=DIR data=FILE. The result is RUN/hf."""
    from train.config import FinetuneConfig, load_config

    found = find_recipe(recipe, "finetune")
    config = load_config(FinetuneConfig, found.text, overrides or (), name=found.name)
    folder = run or Path("runs") / found.name

    def train() -> str:
        from train.finetune import finetune

        return finetune(config, folder, stop_at=stop_at)

    _leave(spawn.run_job(train, run=folder, num_processes=nproc))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    data: Annotated[Path, typer.Option("--data", help="Dataset, text file, .jsonl or .csv.")],
    as_json: AsJson = False,
) -> None:
    """Measure a model: perplexity and bits per byte, or accuracy, precision, recall and F1."""
    raise NotImplementedError


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Makes the sample repeatable.")] = 0,
) -> None:
    """Continue a text; stdout is the continuation alone."""
    raise NotImplementedError


def _parse(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """`values` as a config; a bad one is a usage error."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise typer.BadParameter(f"{option} {first['input']}: {first['msg']}") from None


def _leave(code: int) -> None:
    if code:
        raise typer.Exit(code)


def _configure_logging(rank: int) -> None:
    prefix = f"[rank {rank}] " if rank else ""
    logging.basicConfig(stream=sys.stderr, format=f"{prefix}%(message)s", level=logging.WARNING)
    for package in ("launcher", "train", "model", "data"):
        logging.getLogger(package).setLevel(logging.WARNING if rank else logging.INFO)
