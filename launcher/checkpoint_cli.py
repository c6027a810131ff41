"""The `headrace checkpoint` commands: list, verify, compare and prune what a run has saved.

They answer without torch. What a command needs is imported inside it, as in launcher/cli.py.
"""

from __future__ import annotations

from typing import Annotated

import typer

from launcher import options

checkpoint_app = typer.Typer(help="Look at the checkpoints of a run.", no_args_is_help=True)

OneStep = Annotated[
    int | None, typer.Option("--step", min=0, help="Only this one, and what a resume would try.")
]
TwoSteps = Annotated[
    list[int] | None,
    typer.Option("--step", min=0, help="Twice: first and second checkpoint; newest by default."),
]
Keep = Annotated[int, typer.Option("--keep", min=1, help="Newest checkpoints that stay.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")]


@checkpoint_app.command("ls")
def ls(run: options.RunArgument, as_json: options.AsJson = False) -> None:
    """List checkpoints: step, time, size, who wrote it, and whether its files have their sizes."""
    from launcher.show_checkpoints import show_list
    from train.listing import list_checkpoints

    show_list(run, list_checkpoints(run), as_json=as_json)


@checkpoint_app.command()
def verify(run: options.RunArgument, step: OneStep = None, as_json: options.AsJson = False) -> None:
    """Read every byte, name damaged files and chunks, and say which one a resume takes."""
    from launcher.show_checkpoints import show_verification
    from train.listing import verify

    found = verify(run, step)
    show_verification(found, as_json=as_json)
    if found.damages:
        raise typer.Exit(1)


@checkpoint_app.command()
def diff(
    run: options.RunArgument,
    other: options.OtherRun = None,
    steps: TwoSteps = None,
    as_json: options.AsJson = False,
) -> None:
    """Say in what two checkpoints differ: of one run, --step A --step B, or the newest of two."""
    from launcher.show_checkpoints import show_comparison
    from train.checkpoint import open_checkpoint
    from train.compare import compare

    named = [*(steps or ())]
    if len(named) > 2 or (other is None and len(named) != 2):
        raise typer.BadParameter("write --step A --step B, or name two runs")
    first, second = (named or [None])[0], (named or [None])[-1]
    show_comparison(
        compare(open_checkpoint(run, first), open_checkpoint(other or run, second)),
        as_json=as_json,
    )


@checkpoint_app.command()
def prune(
    run: options.RunArgument, keep: Keep, dry_run: DryRun = False, as_json: options.AsJson = False
) -> None:
    """Remove old checkpoints; never the newest intact one, and none while the run is trained.

    What checkpoint.keep_every_steps and keep_every_hours of the run keep for good stays, too.
    """
    from launcher.show_checkpoints import show_pruned
    from train.pruning import prune_by_hand

    show_pruned(run, prune_by_hand(run, keep, dry_run=dry_run), as_json=as_json)
