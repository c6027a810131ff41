"""`headrace plan`: what a run needs and how long it takes."""

from __future__ import annotations

from launcher import options
from launcher.recipes import find_recipe


def plan(
    recipe: options.RecipeName,
    overrides: options.Overrides = None,
    nodes: options.Nodes = 1,
    gpus_per_node: options.GpusPerNode = 8,
    gpu: options.GpuName = "h100",
    fit: options.Fit = False,
    mfu: options.Mfu = None,
    node_mtbf: options.NodeMtbf = None,
    write_rate: options.WriteRate = 1.0,
    explain: options.Explain = False,
    as_json: options.AsJson = False,
) -> None:
    """Say what a run needs and how long it takes, before any GPU is allocated."""
    from launcher.plan import make_plan
    from launcher.show_plan import show_plan
    from train.config import RunConfig
    from train.decode import load_config

    found = find_recipe(recipe, "pretrain")
    config = load_config(RunConfig, found.text, overrides or (), name=found.name)
    made = make_plan(
        config,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        mfu=mfu,
        fit=fit,
        node_hours=node_mtbf,
        write_bytes=write_rate * 1e9,
    )
    show_plan(made, explain=explain, as_json=as_json)
