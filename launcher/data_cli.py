"""The `headrace data` commands: look into a dataset, or index one that others wrote.

What a command needs is imported inside it, as in launcher/cli.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher import options

data_app = typer.Typer(help="Look into a dataset.", no_args_is_help=True)


def _local(value: str | Path) -> Path:
    """A dataset that is written to."""
    from data.places import is_url

    if is_url(str(value)):
        raise typer.BadParameter(
            f"{value} is no folder, and this writes into one; name the dataset that it was copied "
            "from, and copy what is new there"
        )
    return Path(value)


LocalDataset = Annotated[
    Path, typer.Argument(metavar="DATASET", help="Dataset directory.", parser=_local)
]


@data_app.command()
def verify(
    dataset: options.DatasetPlace, full: options.Full = False, as_json: options.AsJson = False
) -> None:
    """Check a dataset against its manifest."""
    from data.places import place_of
    from data.verify import verify
    from launcher.show import show_verification

    result = verify(place_of(dataset, commands=True), full=full)
    show_verification(result, as_json=as_json)
    _tell_unlisted(dataset)
    if not result.ok:
        raise typer.Exit(1)


@data_app.command()
def inspect(
    dataset: options.DatasetOrRun = None,
    overrides: options.Overrides = None,
    step: options.Step = None,
    sample: options.Sample = None,
    document: options.DocumentName = None,
    recipe: options.StepRecipe = "tiny-cpu",
    run: options.StepRun = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the samples of a step and recompute its data_hash; or of a sample, or find a document.

    Write one of --step, --sample and --document.
    """
    from launcher.inspect import find_document, inspect_sample, inspect_step, recorded_hash
    from launcher.show import show_lookup, show_sample, show_step

    if sum(value is not None for value in (step, sample, document)) != 1:
        raise typer.BadParameter("write one of --step N, --sample N and --document SHARD:NUMBER")
    given: Any = {"run": run, "recipe": recipe, "overrides": overrides or ()}
    if document is not None:
        show_lookup(find_document(dataset, document=document, **given), as_json=as_json)
    elif sample is not None:
        show_sample(inspect_sample(dataset, sample=sample, **given), as_json=as_json)
    else:
        found = inspect_step(dataset, step=step or 0, **given)
        recorded = None if run is None else recorded_hash(run, found.step)
        show_step(found, run=run, recorded=recorded, as_json=as_json)


@data_app.command()
def stats(
    dataset: options.DatasetPlace,
    run: options.StatsRun = None,
    seq_len: options.SeqLen = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what a dataset is made of: lengths, copies, sources, disk, and what reading costs."""
    from launcher.stats import show_stats, stats

    show_stats(stats(dataset, run=run, seq_len=seq_len), as_json=as_json)
    _tell_unlisted(dataset)


@data_app.command()
def pack(
    dataset: LocalDataset,
    seq_len: options.PackedLen,
    workers: options.Workers = 0,
    as_json: options.AsJson = False,
) -> None:
    """Plan which documents share a sample, for data.packing=best_fit with this seq_len."""
    from data.pack import pack_dataset
    from launcher import spawn
    from launcher.show import stage_progress
    from launcher.stats import show_packed

    with stage_progress() as progress:
        found = pack_dataset(
            dataset, seq_len=seq_len, workers=workers or spawn.num_cores(), progress=progress
        )
    show_packed(found, as_json=as_json)


@data_app.command()
def index(
    tars: options.Tars,
    tokenizer: options.TheirTokenizer,
    output: options.Output,
    dtype: options.RawType = None,
    val_fraction: options.ValShare = 0.0,
    source: options.SourceName = "main",
    as_json: options.AsJson = False,
) -> None:
    """Make WebDataset tars of integer arrays trainable, by copying them into token shards."""
    from data.foreign import index
    from launcher.stats import show_indexed

    found = index(
        tars,
        output,
        tokenizer=tokenizer,
        dtype=dtype,
        val_fraction=val_fraction,
        source=source,
    )
    show_indexed(found, as_json=as_json)


def _tell_unlisted(dataset: Any) -> None:
    """Nobody takes plans for checked that were not looked at."""
    from data.places import is_url

    if is_url(dataset):
        typer.echo(
            f"packing plans of {dataset} were not looked at: elsewhere they cannot be listed",
            err=True,
        )
