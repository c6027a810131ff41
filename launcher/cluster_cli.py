"""The commands for runs on other machines: `headrace submit` and `headrace status`.

What a command needs is imported inside it, as in launcher/cli.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher import options
from launcher.recipes import find_recipe

GpusOrNone = Annotated[int, typer.Option(min=0, help="GPUs in each machine; 0 for none.")]
TimeLimit = Annotated[str, typer.Option(help="Time limit of one attempt, as Slurm writes it.")]
Partition = Annotated[str, typer.Option(help="Partition.", show_default="the site's")]
Account = Annotated[str, typer.Option(help="Account.", show_default="the site's")]
Image = Annotated[
    str, typer.Option("--container", metavar="IMAGE", help="Image, in place of the site's.")
]
SiteFile = Annotated[
    Path | None,
    typer.Option(
        "--site",
        help="What this cluster wants of every job, as TOML.",
        show_default="~/.config/headrace/site.toml, if it is there",
        **options.PATH,
    ),
]
Lead = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Seconds before the limit at which the job is asked to save and stop.",
        show_default="300",
    ),
]
SbatchOptions = Annotated[
    list[str] | None,
    typer.Option("--sbatch", help="Further sbatch option, such as --sbatch=--nodelist=n[1-4]."),
]
TestOnly = Annotated[
    bool, typer.Option("--test-only", help="Ask Slurm when it could start, submit nothing.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the batch script, submit nothing.")]


def submit(
    recipe: options.RecipeName,
    overrides: options.Overrides = None,
    run: options.RunFolder = None,
    nodes: options.Nodes = 1,
    gpus_per_node: GpusOrNone = 8,
    time: TimeLimit = "24:00:00",
    partition: Partition = "",
    account: Account = "",
    container: Image = "",
    site: SiteFile = None,
    lead: Lead = None,
    sbatch: SbatchOptions = None,
    test_only: TestOnly = False,
    dry_run: DryRun = False,
) -> None:
    """Hand a pretraining run to Slurm as one readable batch script."""
    from data.places import is_url
    from launcher import jobs, slurm
    from launcher.site import load_site
    from train.config import RunConfig, require_data
    from train.decode import load_config

    if test_only and dry_run:
        raise typer.BadParameter("--test-only asks Slurm and --dry-run does not; leave one out")
    found = find_recipe(recipe, "pretrain")
    config = load_config(RunConfig, found.text, overrides or (), name=found.name)
    require_data(config)
    job = jobs.Job(
        recipe=str(found.path.resolve()) if found.is_file else recipe,
        overrides=tuple(overrides or ()),
        run=(run or Path("runs") / found.name).resolve(),
        num_nodes=nodes,
        gpus_per_node=gpus_per_node,
        time=time,
        options=tuple(sbatch or ()),
        site=load_site(site).but(partition=partition, account=account).within(container),
        lead_seconds=lead or jobs.LEAD_SECONDS,
    )
    if dry_run:
        print(jobs.render(job), end="")
    elif test_only:
        print(slurm.forecast(jobs.render(job)))
    else:
        # What lies elsewhere is asked for by the job; this machine may not even reach it.
        local = [Path(path) for path in config.data.paths if not is_url(path)]
        print(jobs.submit(job, *local))


def status(
    runs: options.Runs, watch: options.Watch = False, as_json: options.AsJson = False
) -> None:
    """Say how runs are doing: attempt, step, loss, speed, last checkpoint, job, events."""
    from launcher.show_status import show_status, watch_status

    if watch and as_json:
        raise typer.BadParameter("--watch is for people; ask for --json as often as you like")
    if watch:
        watch_status(runs)
    else:
        show_status(runs, as_json=as_json)
