"""The command `headrace preflight`.

What it needs is imported inside it, as in launcher/cli.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher import options

Seconds = Annotated[
    float,
    typer.Option("--seconds", min=1, help="How long ranks wait for one that does not answer."),
]
Read = Annotated[
    bool,
    typer.Option(
        "--read",
        help="Measure nothing: judge what the ranks of a preflight that did not end have left.",
    ),
]


def preflight(
    recipe: options.RecipeName,
    overrides: options.Overrides = None,
    run: options.RunFolder = None,
    nproc: options.NumProcesses = 1,
    seconds: Seconds = 60,
    read: Read = False,
    as_json: options.AsJson = False,
) -> None:
    """Say whether nodes, libraries, disks, network and data are fit for a run; train nothing.

    Started like `headrace pretrain`, on every rank of the job to come.
    """
    from launcher import spawn
    from launcher.preflight import preflight, read_preflight
    from launcher.recipes import find_recipe
    from train.config import RunConfig, require_data
    from train.decode import load_config

    found = find_recipe(recipe, "pretrain")
    config = load_config(RunConfig, found.text, overrides or (), name=found.name)
    require_data(config)
    folder = run or Path("runs") / found.name
    if read:
        read_preflight(folder, as_json=as_json)
        return

    def look() -> str:
        return preflight(config, folder, seconds=seconds, as_json=as_json)

    if code := spawn.run_job(look, run=folder, num_processes=nproc):
        raise typer.Exit(code)
