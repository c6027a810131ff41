"""How a plan looks on stdout: figures, layouts by number of nodes, assumptions and warnings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from launcher.layouts import Choice
    from launcher.plan import Plan

LABELS = {
    "num_parameters": "parameters",
    "micro_batch": "sequences per GPU and pass",
    "accumulation": "passes per step",
    "dummy_waste": "share of a step spent on dummies",
    "memory_weights": "memory: weights",
    "memory_gradients": "memory: gradients",
    "memory_optimizer": "memory: optimizer state",
    "memory_buckets": "memory: buckets for reduction",
    "memory_gathered": "memory: gathered weights",
    "memory_activations": "memory: activations",
    "memory_logits": "memory: logits",
    "memory_masks": "memory: attention masks",
    "memory_fragmentation": "memory: fragmentation",
    "memory_reserve": "memory: CUDA, NCCL",
    "memory_per_gpu": "memory needed per GPU",
    "gpu_memory": "memory of the GPU",
    "flops_per_token": "work per token",
    "flops_per_step": "work per step",
    "time_matmul": "time: matrix products",
    "time_attention": "time: attention",
    "time_pointwise": "time: pointwise operations",
    "time_recomputation": "time: activations again",
    "time_hooks": "time: DeepSpeed's hooks",
    "time_communication": "time: waiting for other GPUs",
    "time_optimizer": "time: optimizer",
    "step_seconds": "time of a step",
    "mfu": "MFU",
    "tokens_per_second": "speed",
    "days": "time of the whole run",
    "checkpoint_bytes": "size of a checkpoint",
    "save_stall_seconds": "training stands still per save",
    "save_seconds": "until a save is on disk",
    "disk_bytes": "disk for checkpoints",
    "between_failures": "time between failures",
    "checkpoint_interval": "best steps between checkpoints",
    "goodput": "productive share of the time",
    "goodput_as_configured": "the same as configured",
    "wall_days": "whole run, with failures",
    "gpu_hours": "GPU-hours",
    "energy_kwh": "energy of the GPUs",
}
"""Key of a figure -> what a person reads."""


def show_plan(plan: Plan, *, explain: bool, as_json: bool) -> None:
    """Print a plan on stdout, with every formula when `explain`."""
    if as_json:
        print(json.dumps(plan.as_dict(), indent=2))
        return
    console = Console()
    table = Table(title=plan.title, title_justify="left", box=None, pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    if explain:
        table.add_column("formula", overflow="fold")
    for figure in plan.figures:
        row = [_label(figure.key), figure.text]
        table.add_row(*row, *([escape(figure.formula)] if explain else []))
    console.print(table)
    if plan.sizes:
        console.print(_sizes(plan))
    for text in plan.assumptions:
        console.print(f"assumed: {text}", soft_wrap=True, highlight=False)
    for text in plan.warnings:
        console.print(f"warning: {text}", soft_wrap=True, highlight=False, style="yellow")
    if plan.overrides:
        console.print(f"fits: {' '.join(plan.overrides)}", soft_wrap=True, highlight=False)


def _label(key: str) -> str:
    if key.startswith("epochs_"):
        return f"epochs of source {escape(key.removeprefix('epochs_'))}"
    return LABELS.get(key, key.replace("_", " "))


def _sizes(plan: Plan) -> Table:
    """The fastest layout that fits, by number of nodes."""
    table = Table(
        title="\nfastest layout that fits", title_justify="left", box=None, pad_edge=False
    )
    for name in ("nodes", "micro_batch", "passes", "stage", "recompute", "GB", "s/step", "days",
                 "GPU-hours"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for nodes, choice in plan.sizes:
        table.add_row(f"{nodes:,}", *(_cells(choice, plan) if choice else ["nothing fits"]))
    return table


def _cells(choice: Choice, plan: Plan) -> list[str]:
    seconds = plan["days"] / plan["step_seconds"] * 86_400 * choice.step_seconds
    return [
        str(choice.micro_batch),
        str(choice.accumulation),
        str(choice.stage),
        "yes" if choice.activation_checkpointing else "no",
        f"{choice.memory_bytes / 1e9:,.1f}",
        f"{choice.step_seconds:,.3g}",
        f"{seconds / 86_400:,.3g}",
        f"{choice.ranks * seconds / 3600:,.0f}",
    ]
