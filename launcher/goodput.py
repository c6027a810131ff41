"""What checkpoints and failures cost a run: sizes, seconds, the best interval, what time is lost.

The interval and the productive share of the time are those of train/interval.py, which a run with
checkpoint.every=auto computes again from what it has measured. Here they follow from rates that are
assumed: COPY_SHARE of PCIe to host memory, `write_bytes` to disk per node, and a mean time between
failures of one node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.figures import Figure, counted, duration, sized, timed
from launcher.gpus import Gpu
from model.flops import num_parameters
from train.config import RunConfig
from train.interval import LONGEST_SECONDS, PRIOR_HOURS, RESTART_SECONDS, Costs, choose, goodput

COPY_SHARE = 0.75
"""Of PCIe's bandwidth, by the copy to pinned memory: 13.2 GB in 0.276 s on one H200
(docs/evidence/gpu_speed.json).
"""
WRITE_BYTES = 1e9
"""Bytes/s per node to disk: 0.9e9 on the disk of that machine."""
POWER_SHARE = 1.0
"""Of the TDP, drawn on the average; the model cards of Llama 2 and 3 count so, too."""


MOST_INTERVALS = 20
"""Times that an interval may be longer than the time between failures: beyond, one in e^20 ends."""


class GoodputError(ValueError):
    """A run that would lose all its steps."""

    exit_code: ClassVar[int] = 1


@dataclass(frozen=True)
class Cluster:
    """Where a run is to take place."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    node_hours: float
    """Mean hours between failures of one node."""
    write_bytes: float
    """Bytes/s to disk per node."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def between_failures(self) -> float:
        """Seconds: any node's failure is the run's."""
        return self.node_hours * 3600 / self.nodes


def default_node_hours(gpus_per_node: int) -> float:
    """One failure in PRIOR_HOURS of a GPU. Llama 3 had 419 in 54 days of 16,384 GPUs, one in
    50,700 (arXiv 2407.21783, section 3.3.4).
    """
    return PRIOR_HOURS / gpus_per_node


def save_costs(config: RunConfig, cluster: Cluster) -> Costs:
    """What a save and a failure are taken to cost."""
    size = checkpoint_bytes(config)
    copy = size / cluster.ranks / (COPY_SHARE * cluster.gpu.host_bytes)
    write = size / cluster.nodes / cluster.write_bytes
    return Costs(
        stall=copy if config.checkpoint.background else copy + write,
        lag=copy + write,
        restart=RESTART_SECONDS,
        between_failures=cluster.between_failures,
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """fp32 weights and both moments."""
    return 12 * num_parameters(config.model)


def checkpoint_figures(
    config: RunConfig, cluster: Cluster, *, step_seconds: float
) -> Iterator[Figure]:
    """Size, seconds, interval and goodput; then days, GPU-hours and energy with failures."""
    size, costs = checkpoint_bytes(config), save_costs(config, cluster)
    _check(config, costs, step_seconds)
    # A run is saved at its end in any case.
    steps = min(choose(costs, step_seconds).steps, config.steps)
    best = goodput(steps * step_seconds, costs)
    yield sized("checkpoint_bytes", size, "(4 weights + 8 moments) B x parameters, in fp32")
    rate = f"{cluster.nodes:,} nodes x {cluster.write_bytes / 1e9:g} GB/s (--write-rate)"
    copy = f"{COPY_SHARE:g} x {cluster.gpu.host_bytes / 1e9:g} GB/s of PCIe"
    rest = f" + bytes / ({rate})"
    if config.checkpoint.background:
        rest = ", at most: it is made beside the passes of the next step"
    yield timed("save_stall_seconds", costs.stall, f"bytes / ranks / ({copy}){rest}")
    yield timed("save_seconds", costs.lag, f"that copy + bytes / ({rate})")
    yield _disk(config, size, step_seconds)
    yield timed(
        "between_failures",
        costs.between_failures,
        f"{cluster.node_hours:,.0f} h of one node (--node-mtbf) / {cluster.nodes:,} nodes",
    )
    yield counted(
        "checkpoint_interval",
        steps,
        f"steps; exp(-(t + C) / M) = 1 - t / M (Daly 2006; sqrt(2 C M) to first order) with C = "
        f"{costs.stall:.3g} s, M = {costs.between_failures:,.0f} s, t not below {costs.lag:.3g} s, "
        f"nor above {duration(LONGEST_SECONDS)} or the run",
    )
    yield Figure(
        "goodput",
        best,
        f"{best:.2%}",
        f"t exp(-R / M) / (M (exp((t + C) / M) - 1)) with R = {costs.restart:g} s, "
        f"t = {steps:,} steps",
    )
    share, configured = best, _steps_between(config)
    if configured is not None:
        share = goodput(configured * step_seconds, costs)
        yield Figure(
            "goodput_as_configured",
            share,
            f"{share:.2%}",
            f"the same with checkpoint.every={config.checkpoint.every:,}, t = {configured:,} steps",
        )
    yield from _whole_run(config, cluster, step_seconds / share)


def _check(config: RunConfig, costs: Costs, step_seconds: float) -> None:
    """GoodputError when hardly any step, or its checkpoint, would end before the next failure."""
    failure = f"a failure is expected every {duration(costs.between_failures)}"
    if costs.lag > MOST_INTERVALS * costs.between_failures:
        raise GoodputError(
            f"a checkpoint takes {duration(costs.lag)} to disk, and {failure}: no step would be "
            "kept; take fewer nodes, or say that they write faster (--write-rate) or fail less "
            "often (--node-mtbf)"
        )
    if step_seconds > MOST_INTERVALS * costs.between_failures:
        raise GoodputError(
            f"a step takes {duration(step_seconds)}, and {failure}: no step would be kept; take "
            "more GPUs, a smaller batch_tokens, or say that nodes fail less often (--node-mtbf)"
        )
    interval = (_steps_between(config) or 0) * step_seconds
    if interval > MOST_INTERVALS * costs.between_failures:
        raise GoodputError(
            f"checkpoint.every={config.checkpoint.every:,} saves every {duration(interval)}, and "
            f"{failure}: the run would not end; write checkpoint.every=auto"
        )


def _steps_between(config: RunConfig) -> int | None:
    """Steps between saves as configured, the last one among them; None where a run chooses them."""
    every = config.checkpoint.every
    return min(every or config.steps, config.steps) if isinstance(every, int) else None


def _disk(config: RunConfig, size: int, step_seconds: float) -> Figure:
    kept = config.checkpoint.keep + 1
    words = f"checkpoint.keep={config.checkpoint.keep} + 1 being written"
    if config.checkpoint.keep_every_steps:
        kept += config.steps // config.checkpoint.keep_every_steps
        words += f" + one every {config.checkpoint.keep_every_steps:,} steps"
    if config.checkpoint.keep_every_hours:
        hours = config.steps * step_seconds / 3600
        kept += int(hours / config.checkpoint.keep_every_hours)
        words += f" + one every {config.checkpoint.keep_every_hours:g} hours"
    return sized("disk_bytes", kept * size, f"({words}) = {kept:,} x bytes of a checkpoint")


def _whole_run(config: RunConfig, cluster: Cluster, step_seconds: float) -> Iterator[Figure]:
    seconds = config.steps * step_seconds
    hours = cluster.ranks * seconds / 3600
    energy = hours * cluster.gpu.tdp_watts * POWER_SHARE / 1000
    yield timed("wall_days", seconds, "time of the run / goodput", scale=86_400)
    yield Figure(
        "gpu_hours", hours, f"{hours:,.0f}", f"{cluster.ranks:,} GPUs x hours, failures included"
    )
    yield Figure(
        "energy_kwh",
        energy,
        f"{energy:,.0f} kWh",
        f"GPU-hours x {cluster.gpu.tdp_watts:g} W of TDP (data sheet) x {POWER_SHARE:g} assumed, "
        "as the model cards of Llama 2 and 3 count; GPUs alone, without hosts, network and cooling",
    )
