"""The commands for runs on other machines: `headrace submit` and `headrace status`.

What a command needs is imported inside it, as in launcher/cli.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher import options
from launcher.recipes import find_recipe

if TYPE_CHECKING:
    from launcher.jobs import Job
    from launcher.site import Site

GpusOrNone = Annotated[int, typer.Option(min=0, help="GPUs in each machine; 0 for none.")]
MinNodes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Start with as few machines as this when others have failed.",
        show_default="--nodes",
    ),
]
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
        show_default="what a step and a save of RUN took, twice; 300 before the first",
    ),
]
CopyCode = Annotated[
    bool, typer.Option("--stage", help="Copy the code to every node's own disk first, by sbcast.")
]
Preflight = Annotated[
    bool | None,
    typer.Option(
        "--preflight/--no-preflight",
        help="Look at the nodes before each attempt, as `headrace preflight` does.",
        show_default="the site's, or not",
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


Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|LIFECYCLE.toml",
        help="A recipe, as of `headrace pretrain`, or a file of stages: slurm/lifecycle.toml.",
    ),
]
OF_A_RUN = (
    *("overrides", "run", "nodes", "min_nodes", "gpus_per_node", "time", "partition"),
    *("account", "lead", "stage", "preflight", "sbatch", "test_only"),
)
"""Parameters that a life cycle has in its file, for each stage."""


def submit(
    context: typer.Context,
    recipe: Recipe,
    overrides: options.Overrides = None,
    run: options.RunFolder = None,
    nodes: options.Nodes = 1,
    min_nodes: MinNodes = None,
    gpus_per_node: GpusOrNone = 8,
    time: TimeLimit = "24:00:00",
    partition: Partition = "",
    account: Account = "",
    container: Image = "",
    site: SiteFile = None,
    lead: Lead = None,
    stage: CopyCode = False,
    preflight: Preflight = None,
    sbatch: SbatchOptions = None,
    test_only: TestOnly = False,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Hand a pretraining run, or a whole life cycle as a chain of jobs, to Slurm.

    Every job is one readable batch script. Of a life cycle, stages whose settings and inputs are
    those that their output was made from are skipped.
    """
    from data.places import is_url
    from launcher import jobs
    from launcher.lead import lead_of
    from launcher.lifecycle import is_lifecycle
    from launcher.site import load_site
    from launcher.snapshot import take
    from train.config import RunConfig, require_data
    from train.decode import load_config

    if test_only and dry_run:
        raise typer.BadParameter("--test-only asks Slurm and --dry-run does not; leave one out")
    cluster = load_site(site).within(container)
    if is_lifecycle(recipe):
        _refuse_options_of_a_run(context, recipe)
        _submit_lifecycle(Path(recipe), cluster, dry_run=dry_run, as_json=as_json)
        return
    found = find_recipe(recipe, "pretrain")
    config = load_config(RunConfig, found.text, overrides or (), name=found.name)
    require_data(config)
    folder = (run or Path("runs") / found.name).resolve()
    job = jobs.Job(
        recipe=str(found.path.resolve()) if found.is_file else recipe,
        overrides=tuple(overrides or ()),
        run=folder,
        num_nodes=nodes,
        min_nodes=min_nodes,
        gpus_per_node=gpus_per_node,
        time=time,
        options=tuple(sbatch or ()),
        site=cluster.but(partition=partition, account=account),
        lead=lead_of(folder, lead),
        code=take(folder / "code", found.path.resolve() if found.is_file else None),
        copies_code=stage,
        preflight=cluster.preflight if preflight is None else preflight,
    )
    # What lies elsewhere is asked for by the job; this machine may not even reach it.
    local = [Path(path) for path in config.data.paths if not is_url(path)]
    _submit_run(job, local, test_only=test_only, dry_run=dry_run, as_json=as_json)


def _submit_run(
    job: Job, datasets: Sequence[Path], *, test_only: bool, dry_run: bool, as_json: bool
) -> None:
    from launcher import jobs, slurm

    if dry_run:
        print(jobs.render(job), end="")
        for path in jobs.no_datasets(datasets):
            print(f"note: there is no dataset at {path} yet: submit will refuse", file=sys.stderr)
    elif test_only:
        print(slurm.forecast(jobs.render(job)))
    else:
        number = jobs.submit(job, *datasets)
        print(json.dumps({"job": number, "run": str(job.run)}) if as_json else number)
        print(
            f"log: {job.run}/logs/slurm-{number}.out; how it is doing: headrace status {job.run}",
            file=sys.stderr,
        )


def _refuse_options_of_a_run(context: typer.Context, file: str) -> None:
    """A usage error for what a life cycle says by itself."""
    for name in OF_A_RUN:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            if name == "test_only":
                raise typer.BadParameter(f"{file} is a life cycle: Slurm forecasts single jobs")
            raise typer.BadParameter(
                f"{file} is a life cycle, in which each stage has its own "
                f"{'--' + name.replace('_', '-') if name != 'overrides' else 'key=value'}: "
                "write it there"
            )


def _submit_lifecycle(file: Path, site: Site, *, dry_run: bool, as_json: bool) -> None:
    from launcher.chain import planned, refuse_other_outputs, submit_chain
    from launcher.lifecycle import load_lifecycle
    from launcher.show_chain import show_chain
    from launcher.stages import resolve

    stages = resolve(load_lifecycle(file), site)
    if dry_run:
        refuse_other_outputs(stages)
    links = planned(stages) if dry_run else submit_chain(stages)
    show_chain(links, {stage.name: stage.script for stage in stages} if dry_run else {}, as_json)


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
