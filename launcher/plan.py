"""What a pretraining run needs, from its config alone: memory, time, energy, disk, lost time.

Every figure carries the formula that it came from. Memory is an estimate of the allocator's peak
(launcher/memory.py), the time of a step a roofline (launcher/step_time.py), the interval between
checkpoints that of train/interval.py (launcher/goodput.py). Nothing here has been measured on the
machine that it speaks of; README.md says how far the estimates were from what was measured.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from launcher.figures import Figure, counted, in_units, sized, timed
from launcher.goodput import WRITE_BYTES, Cluster, checkpoint_figures, default_node_hours
from launcher.gpus import GB, find_gpu
from launcher.layouts import Choice, best_layout, by_nodes, layout_of
from launcher.memory import advice, batch_figures, changed, memory_figures, memory_per_gpu
from launcher.step_time import Layout, formulas, step_time
from model.config import ModelConfig
from model.flops import flops_per_token, num_parameters
from train.config import RunConfig

ASSUMED_VOCAB_SIZE = 32_000
WASTE_LIMIT = 0.05
GOODPUT_MARGIN = 0.01
"""Of the time, that a configured interval may lose against the best one without a word."""


class PlanError(ValueError):
    """A plan that nobody can make: two wishes contradict each other, or nothing fits."""

    exit_code: ClassVar[int] = 2


class NothingFits(PlanError):
    """No layout fits these GPUs."""

    exit_code: ClassVar[int] = 1


@dataclass(frozen=True)
class Plan:
    """Figures in reading order, and what is wrong with the run that they describe."""

    title: str
    figures: tuple[Figure, ...]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    fits: bool
    """Whether the memory of a GPU is enough."""
    sizes: tuple[tuple[int, Choice | None], ...] = ()
    """Numbers of nodes with the fastest layout that fits each; none with an assumed MFU."""
    overrides: tuple[str, ...] = ()
    """What --fit has chosen, as a command line takes it."""

    def __getitem__(self, key: str) -> float:
        return next(figure.value for figure in self.figures if figure.key == key)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it; memory in bytes."""
        return {
            **{figure.key: figure.value for figure in self.figures},
            "sizes": [
                {"nodes": nodes, "fits": False} if choice is None else choice.as_dict()
                for nodes, choice in self.sizes
            ],
            "overrides": list(self.overrides),
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
            "fits": self.fits,
        }


def make_plan(
    config: RunConfig,
    *,
    nodes: int,
    gpus_per_node: int,
    gpu: str,
    mfu: float | None = None,
    fit: bool = False,
    node_hours: float | None = None,
    write_bytes: float = WRITE_BYTES,
) -> Plan:
    """The plan of `config` on nodes * gpus_per_node GPUs.

    `mfu` takes the place of the predicted time of a step. `fit` chooses the fastest layout that
    fits; NothingFits when there is none. `node_hours` is the mean time between failures of a node.
    """
    if fit and mfu is not None:
        raise PlanError(
            f"--fit chooses by the predicted time of a step, and --mfu {mfu:g} assumes one; leave "
            "one of them out"
        )
    chosen = find_gpu(gpu)
    if node_hours is None:
        node_hours = default_node_hours(gpus_per_node)
    cluster = Cluster(nodes, gpus_per_node, chosen, node_hours, write_bytes)
    config, assumptions = _with_vocabulary(config)
    overrides: tuple[str, ...] = ()
    if fit:
        config, overrides = _fitted(config, cluster)
    layout = layout_of(config, nodes=nodes, gpus_per_node=gpus_per_node)
    batch = list(batch_figures(config, cluster.ranks))
    memory = list(memory_figures(config, cluster.ranks, layout.micro_batch))
    total = sum(figure.value for figure in memory)
    time = list(_time(config, layout, cluster, mfu))
    step_seconds = next(figure.value for figure in time if figure.key == "step_seconds")
    figures = (
        counted("num_parameters", num_parameters(config.model), _parameter_formula(config.model)),
        *batch,
        *memory,
        sized("memory_per_gpu", total, "sum of the memory lines"),
        sized("gpu_memory", chosen.memory_bytes, chosen.source),
        *time,
        *checkpoint_figures(config, cluster, step_seconds=step_seconds),
        *_epochs(config),
    )
    sizes = by_nodes(config, nodes=nodes, gpus_per_node=gpus_per_node, gpu=chosen)
    made = Plan(
        title=f"{nodes} x {gpus_per_node} {gpu}, ZeRO stage {config.zero.stage}, "
        f"{config.precision}",
        figures=figures,
        assumptions=(*assumptions, *_assumed(cluster, mfu)),
        warnings=(),
        fits=total <= chosen.memory_bytes,
        sizes=() if mfu is not None else tuple(sizes),
        overrides=overrides,
    )
    return replace(made, warnings=tuple(_warnings(config, cluster, made)))


def _with_vocabulary(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run with model.vocab_size known, and what was assumed to know it."""
    if config.model.vocab_size:
        return config, []
    size = _vocab_size(config)
    assumed = []
    if size is None:
        size = ASSUMED_VOCAB_SIZE
        assumed.append(
            f"vocabulary of {size:,} ids (model.vocab_size=0: the dataset decides, data=DATASET "
            "names one)"
        )
    return changed(config, {"model.vocab_size": size}), assumed


def _fitted(config: RunConfig, cluster: Cluster) -> tuple[RunConfig, tuple[str, ...]]:
    best = best_layout(
        config, nodes=cluster.nodes, gpus_per_node=cluster.gpus_per_node, gpu=cluster.gpu
    )
    if best is None:
        raise NothingFits(
            f"no layout fits {cluster.nodes} x {cluster.gpus_per_node} GPUs of "
            f"{cluster.gpu.memory_bytes / GB:,.0f} GB; {_advice(config, cluster)}"
        )
    return changed(config, best.change()), tuple(best.overrides())


def _advice(config: RunConfig, cluster: Cluster) -> str:
    return advice(
        config,
        ranks=cluster.ranks,
        gpus_per_node=cluster.gpus_per_node,
        limit=cluster.gpu.memory_bytes,
    )


def _assumed(cluster: Cluster, mfu: float | None) -> Iterator[str]:
    if mfu is not None:
        yield f"{mfu:.0%} of the peak FLOP/s (--mfu)"
    else:
        yield (
            "time of a step from a roofline fitted to one H200 and one A100 run, traffic from data "
            "sheets and measured on no cluster; --mfu X takes the place of both"
        )
    yield (
        f"a node fails every {cluster.node_hours:,.0f} h (--node-mtbf), and writes "
        f"{cluster.write_bytes / 1e9:g} GB/s to disk (--write-rate)"
    )
    yield f"GPU figures: {cluster.gpu.source}"


def _parameter_formula(model: ModelConfig) -> str:
    return (
        f"{model.num_layers} layers of hidden {model.hidden_size}, feed-forward {model.ffn_size}, "
        f"and {1 if model.tie_embeddings else 2} embedding tables of {model.vocab_size:,} rows"
    )


def _time(
    config: RunConfig, layout: Layout, cluster: Cluster, mfu: float | None
) -> Iterator[Figure]:
    per_token = flops_per_token(config.model, config.seq_len)
    yield Figure(
        "flops_per_token",
        per_token,
        in_units(per_token, "FLOP"),
        "forward and backward: 6 x matrix values + 12 x layers x hidden x seq_len",
    )
    per_step = per_token * config.batch_tokens
    yield Figure(
        "flops_per_step",
        per_step,
        in_units(per_step, "FLOP"),
        f"flops per token x {config.batch_tokens:,} batch_tokens",
    )
    # Dummies are computed like real samples.
    computed = layout.accumulation * layout.ranks * layout.micro_batch * config.seq_len * per_token
    peak = cluster.gpu.peak(config.precision)
    if mfu is None:
        seconds = yield from _step_parts(config, layout, cluster)
    else:
        seconds = computed / (layout.ranks * peak * mfu)
        yield timed(
            "step_seconds", seconds, "FLOP of a step, dummies included / (GPUs x peak x mfu)"
        )
    reached = computed / (layout.ranks * peak * seconds)
    yield Figure(
        "mfu",
        reached,
        f"{reached:.1%}",
        f"FLOP of a step, dummies included / (time of a step x {layout.ranks:,} GPUs x "
        f"{peak / 1e12:,.1f} TFLOP/s)",
    )
    rate = config.batch_tokens / seconds
    yield Figure(
        "tokens_per_second", rate, f"{rate:,.0f} tokens/s", "batch_tokens / time of a step"
    )
    yield Figure("tokens_per_day", rate * 86400, in_units(rate * 86400, ""), "x 86,400 s")
    yield timed(
        "days",
        config.steps * seconds,
        f"{config.steps:,} steps x time of a step, without failures",
        scale=86_400,
    )


def _step_parts(
    config: RunConfig, layout: Layout, cluster: Cluster
) -> Generator[Figure, None, float]:
    """Yields where the seconds of a step go; returns their sum."""
    found = step_time(config.model, config.seq_len, layout=layout, gpu=cluster.gpu)
    told = dict(formulas(layout, cluster.gpu))
    for part in fields(found):
        yield timed(f"time_{part.name}", getattr(found, part.name), told[part.name])
    yield timed("step_seconds", found.total, "sum of the time lines")
    return found.total


def _epochs(config: RunConfig) -> Iterator[Figure]:
    """How often each source is read, when data is named; DataUsageError when that is none."""
    if not config.data.paths:
        return
    from data.epochs import check_epochs, uses
    from data.sources import data_of, open_datasets
    from data.stream import SampleStream

    datasets = open_datasets(
        data_of(config.data), seq_len=config.seq_len, config=config.data, commands=True
    )
    stream = SampleStream(datasets, seq_len=config.seq_len, seed=config.seed)
    found = uses(stream, config.steps * config.batch_samples)
    check_epochs(found, config.data.max_epochs)
    for use in found:
        yield Figure(
            f"epochs_{use.source}",
            use.epochs,
            f"{use.epochs:,.0f}" if use.epochs >= 100 else f"{use.epochs:.3g}",
            f"{use.needed_tokens:,} tokens of the run / {use.available_tokens:,} of one epoch",
        )


def _vocab_size(config: RunConfig) -> int | None:
    """Ids of the dataset's tokenizer, when data is named."""
    if not config.data.paths:
        return None
    from data.manifest import read_manifest

    return read_manifest(Path(config.data.paths[0])).vocab_size


def _warnings(config: RunConfig, cluster: Cluster, plan: Plan) -> Iterator[str]:
    waste = plan["dummy_waste"]
    if waste > WASTE_LIMIT:
        yield (
            f"{waste:.1%} of every step is spent on dummies: {config.batch_samples:,} sequences do "
            f"not fill {cluster.ranks:,} ranks evenly; change batch_tokens, micro_batch or the GPUs"
        )
    if not plan.fits:
        yield (
            f"{memory_per_gpu(config, cluster.ranks) / GB:,.1f} GB do not fit into "
            f"{cluster.gpu.memory_bytes / GB:,.0f} GB; {_advice(config, cluster)}"
        )
    every = config.checkpoint.every
    if isinstance(every, int) and every:
        share, best = plan["goodput_as_configured"], plan["goodput"]
        if share < best - GOODPUT_MARGIN:
            steps = int(plan["checkpoint_interval"])
            is_end = steps >= config.steps
            better = "one at the end" if is_end else f"a checkpoint every {steps:,} steps"
            yield (
                f"checkpoint.every={every:,} is productive {share:.1%} of the time, {better} "
                f"{best:.1%}; write checkpoint.every={0 if is_end else steps}, or auto to choose "
                "by what is measured"
            )
    elif every == 0 and plan["days"] * 86_400 > cluster.between_failures:
        yield (
            "checkpoint.every=0 saves at the end only, and a failure is expected every "
            f"{cluster.between_failures / 3600:,.1f} h; write checkpoint.every=auto"
        )
