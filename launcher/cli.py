"""The `headrace` command: parse argv, call one function, turn its end into an exit code.

Results go to stdout, logs and progress to stderr. Exit codes: 0 done, 1 failure, 2 usage or config
refused, 3 stopped on purpose and resumable. What a command needs is imported inside it, so that
help, plan and submit answer without torch.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from typer.core import TyperGroup

from data.durable import told
from launcher import options, spawn
from launcher.checkpoint_cli import checkpoint_app
from launcher.cluster_cli import status, submit
from launcher.data_cli import data_app
from launcher.plan_cli import plan
from launcher.preflight_cli import preflight
from launcher.prepare_cli import prepare
from launcher.recipes import Recipe, find_recipe
from launcher.tokenizer_cli import tokenizer_app
from train import faults

if TYPE_CHECKING:
    from train.config import FinetuneConfig, RunConfig

Job = TypeVar("Job", "RunConfig", "FinetuneConfig")


class _Contents(TyperGroup):
    """Lists commands in the order in which a person meets them; typer puts groups first."""

    def list_commands(self, ctx: Any) -> list[str]:
        first = ["quickstart", "prepare", "data", "tokenizer"]
        rest = [name for name in super().list_commands(ctx) if name not in first]
        rest.remove("checkpoint")
        rest.insert(rest.index("export"), "checkpoint")
        return first + rest


app = typer.Typer(
    name="headrace",
    cls=_Contents,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(checkpoint_app, name="checkpoint")


@app.callback()
def headrace(version: options.Version = False) -> None:
    """Raw text to token shards to a GPT trained with DeepSpeed ZeRO to a Hugging Face folder."""


def main() -> None:
    """Run the command line of this process and leave with its exit code."""
    _configure_logging(spawn.rank_of(os.environ))
    _escape_what_cannot_be_printed()
    try:
        faults.arm(os.environ.get(faults.VARIABLE), spawn.rank_of(os.environ))
        run_command()
    except (ValueError, OSError) as error:
        # Errors meant for people carry their exit code; anything else keeps its traceback.
        failure = told(error) if isinstance(error, OSError) else error
        code = getattr(failure, "exit_code", None)
        if code is None:
            raise
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(code)


def run_command(argv: Sequence[str] | None = None, *, standalone: bool = True) -> int:
    """Run one command line, this process's own by default; its exit code when not `standalone`."""
    code = app(argv, prog_name="headrace", standalone_mode=standalone)
    return code if isinstance(code, int) else 0


@app.command()
def quickstart(workdir: options.Workdir = Path("quickstart")) -> None:
    """The whole life cycle on this Python's own source code, in minutes on two cores."""
    from launcher.quickstart import quickstart

    _leave(quickstart(workdir))


app.command()(prepare)


@app.command()
def recipes(name: options.OneRecipe = None, as_json: options.AsJson = False) -> None:
    """List the recipes, or every key of one with its value, default and meaning."""
    from launcher.catalog import show_recipes

    show_recipes(name, as_json=as_json)


app.command()(plan)


app.command()(preflight)


@app.command()
def pretrain(
    recipe: options.RecipeName,
    overrides: options.Overrides = None,
    run: options.RunFolder = None,
    nproc: options.NumProcesses = 1,
    stop_at: options.StopAt = None,
    allow_change: options.AllowChange = None,
) -> None:
    """Train a GPT from nothing; the same command resumes it."""
    from train.config import RunConfig

    def train(config: RunConfig, folder: Path) -> str:
        from train.pretrain import pretrain

        return pretrain(config, folder, stop_at=stop_at, allow_change=allow_change or ())

    found = find_recipe(recipe, "pretrain")
    _train(RunConfig, train, found, overrides or (), run=run, nproc=nproc)


@app.command()
def replay(
    run: options.RunArgument, step: options.ReplayStep, as_json: options.AsJson = False
) -> None:
    """Compute a recorded step again, and say whether every bit is the same."""
    from launcher.look_back import difference_of, show_replay
    from train.rows import ranks_of

    def again() -> str:
        from train.replay import ReplayDiffers, replay

        found = replay(run, step)
        if spawn.rank_of(os.environ) == 0:
            show_replay(found, run, as_json=as_json)
        if difference := difference_of(found, run):
            raise ReplayDiffers(difference)
        return "complete"

    _leave(spawn.run_job(again, run=run, num_processes=ranks_of(run, step)))


@app.command()
def guard(
    run: options.RunArgument,
    overrides: options.Overrides = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what the guard would have done in a run, such as with guard.outlier=skip."""
    from launcher.look_back import show_hindsight
    from train.decode import overridden
    from train.hindsight import hindsight
    from train.run import last_config

    config = overridden(last_config(run), overrides or ())
    show_hindsight(hindsight(run, config.guard), as_json=as_json)


app.command()(submit)
app.command()(status)


@app.command()
def export(
    run: options.RunArgument,
    out: options.OutArgument,
    step: options.CheckpointStep = None,
    dtype: options.WeightType = "fp32",
    as_json: options.AsJson = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, and prove that it is the same model."""
    from launcher.show import show_export
    from train.export import export

    show_export(export(run, out, step=step, dtype=dtype), as_json=as_json)


@app.command()
def finetune(
    recipe: options.RecipeName,
    overrides: options.Overrides = None,
    run: options.RunFolder = None,
    nproc: options.NumProcesses = 1,
    stop_at: options.StopAt = None,
) -> None:
    """Continue from a Hugging Face folder: model=DIR data=FILE. The result is RUN/hf.

    FILE is .jsonl or .csv. classify reads its columns text and label (data.text_column=
    data.label_column=), instruct prompt and response (data.prompt_column= data.response_column=).
    data.val=FILE brings held-out examples; epochs= or steps= say how long.
    """
    from train.config import FinetuneConfig

    def train(config: FinetuneConfig, folder: Path) -> str:
        from train.finetune import finetune

        return finetune(config, folder, stop_at=stop_at)

    found = find_recipe(recipe, "finetune")
    _train(FinetuneConfig, train, found, overrides or (), run=run, nproc=nproc)


@app.command()
def evaluate(
    model: options.ModelFolder,
    data: options.EvaluationData,
    text_column: options.TextColumn = "text",
    label_column: options.LabelColumn = "label",
    split: options.Split = "all",
    as_json: options.AsJson = False,
) -> None:
    """Measure a model: perplexity and bits per byte, or accuracy, precision, recall and F1."""
    from launcher.show import show_evaluation
    from train.evaluate import evaluate

    result = evaluate(model, data, text_column=text_column, label_column=label_column, split=split)
    show_evaluation(result, as_json=as_json)


@app.command()
def generate(
    model: options.ModelFolder,
    prompt: options.Prompt,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = 0.8,
    seed: options.Seed = 0,
) -> None:
    """Continue a text; stdout is the continuation alone."""
    from train.generate import generate

    text = generate(model, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
    print(text, end="\n" if sys.stdout.isatty() else "")


def _train(
    kind: type[Job],
    train: Callable[[Job, Path], str],
    recipe: Recipe,
    overrides: Sequence[str],
    *,
    run: Path | None,
    nproc: int,
) -> None:
    """Resolve the config of a job and run it, here or on `nproc` ranks."""
    from train.decode import load_config

    config = load_config(kind, recipe.text, overrides, name=recipe.name)
    folder = run or Path("runs") / recipe.name

    def run_rank() -> str:
        outcome = train(config, folder)
        faults.tell_missed()
        return outcome

    _leave(spawn.run_job(run_rank, run=folder, num_processes=nproc))


def _leave(code: int) -> None:
    if code:
        raise typer.Exit(code)


def _escape_what_cannot_be_printed() -> None:
    # An ASCII locale, or a path that is not UTF-8, must not end a command that has its result.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _configure_logging(rank: int) -> None:
    prefix = f"[rank {rank}] " if rank else ""
    logging.basicConfig(stream=sys.stderr, format=f"{prefix}%(message)s", level=logging.WARNING)
    for package in ("launcher", "train", "model", "data"):
        logging.getLogger(package).setLevel(logging.WARNING if rank else logging.INFO)
