"""Which samples a step had, where a sample comes from, and where a document went, in a run or in
what a recipe would make of a dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from data.config import DataConfig, DataError, OnDamage
from data.inspect import Inspection, decoder, inspect_samples
from data.lookup import Lookup, look_up
from data.phases import Phases, RunPhase, first_phase
from data.places import is_at
from data.sources import Datasets, data_of, open_datasets
from data.stream import SampleStream
from launcher.recipes import find_recipe
from train.config import RunConfig
from train.decode import load_config
from train.phases import data_tables, read_phases


class InspectError(ValueError):
    """A run that cannot be inspected, or whose data was not what the dataset says."""

    exit_code: ClassVar[int] = 1


class InspectUsageError(InspectError):
    """A request that contradicts itself."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Subject:
    """A run, or what a recipe would make of a dataset: which samples every step has."""

    name: str
    steps: int
    stream: SampleStream
    phases: Phases
    datasets: Datasets
    on_damage: OnDamage

    def check_step(self, step: int) -> None:
        """InspectUsageError for a step after the last one."""
        if step > self.steps:
            raise InspectUsageError(
                f"step {step} does not exist: the last step of {self.name} is {self.steps}"
            )


def inspect_step(
    dataset: str | Path | None,
    *,
    step: int,
    run: Path | None,
    recipe: str,
    overrides: Sequence[str],
) -> Inspection:
    """The samples of a training step of `run`, or of a run of `recipe` with `overrides`.

    With a run, InspectError when the hash that it recorded for the step is another one.
    """
    subject = open_subject(dataset, run=run, recipe=recipe, overrides=overrides)
    if run is None and step > subject.steps:
        raise InspectUsageError(
            f"step {step} does not exist: the last step of a run of {recipe} is {subject.steps}; "
            "write steps=N to look at a longer one"
        )
    subject.check_step(step)
    first, last = subject.phases.samples(step)
    inspection = _inspect(subject, step, first, last)
    recorded = None if run is None else recorded_hash(run, step)
    if recorded is not None and recorded != inspection.data_hash:
        raise InspectError(
            f"step {step} of {run} was trained on samples with data_hash {recorded}, but "
            f"{inspection.dataset} gives {inspection.data_hash}: it is not the dataset of that "
            "run, or it was changed"
        )
    return inspection


def inspect_sample(
    dataset: str | Path | None,
    *,
    sample: int,
    run: Path | None,
    recipe: str,
    overrides: Sequence[str],
) -> Inspection:
    """One sample with its documents, under the step that trains on it."""
    subject = open_subject(dataset, run=run, recipe=recipe, overrides=overrides)
    step = subject.phases.step_of(sample)
    if step > subject.steps:
        last = subject.phases.samples(subject.steps)[1] - 1
        raise InspectUsageError(
            f"sample {sample} comes after the last step of {subject.name}, {subject.steps}, which "
            f"ends with sample {last}"
        )
    return _inspect(subject, step, sample, sample + 1)


def find_document(
    dataset: str | Path | None,
    *,
    document: str,
    run: Path | None,
    recipe: str,
    overrides: Sequence[str],
) -> Lookup:
    """The samples and steps that train on a document, written SHARD:NUMBER."""
    shard, colon, number = document.rpartition(":")
    if not colon or not number.isdecimal():
        raise InspectUsageError(
            f"--document {document!r} is not of the form SHARD:NUMBER, such as "
            "train/main/shard-000000.tar:12"
        )
    subject = open_subject(dataset, run=run, recipe=recipe, overrides=overrides, several=True)
    return look_up(
        subject.stream,
        subject.phases,
        shard=shard,
        number=int(number),
        steps=subject.steps,
        dataset=dataset,
    )


def open_subject(
    dataset: str | Path | None,
    *,
    run: Path | None,
    recipe: str,
    overrides: Sequence[str],
    several: bool = False,
) -> Subject:
    """The stream and phases of a run or a recipe. `dataset` stands for the one that they name; of
    `several` it only says which one is meant.
    """
    if run is not None and overrides:
        raise InspectUsageError(
            f"a run fixes its own config: {' '.join(overrides)} cannot change which samples {run} "
            "was trained on; leave out either --run or the overrides"
        )
    if run is None:
        found = find_recipe(recipe, "pretrain")
        config = load_config(RunConfig, found.text, overrides, name=found.name)
    else:
        config = config_of(run)
    name = str(run) if run is not None else f"a run of {recipe}"
    if dataset is not None and config.data.sources and not several:
        raise InspectUsageError(
            f"{name} mixes {len(config.data.sources)} sources, which its config names; leave out "
            f"{dataset}"
        )
    if not config.data.sources:
        path = str(dataset or config.data.path)
        if not path:
            raise InspectUsageError(f"{name} names no data; write the DATASET to look into")
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": path})})
    datasets = open_datasets(
        data_of(config.data),
        seq_len=config.seq_len,
        config=config.data,
        # A command counts as written by a person, and not when a run directory names it.
        commands=run is None or (dataset is not None and not config.data.sources),
    )
    rows = () if run is None else read_phases(run)
    if run is not None and dataset is not None and not config.data.sources:
        _check_same_data(run, datasets, rows)
    phases = Phases(
        rows
        or [
            first_phase(
                config.batch_samples,
                datasets.slots(),
                datasets.fingerprints(),
                seq_len=config.seq_len,
            )
        ]
    )
    if run is not None:
        datasets = _with_earlier(datasets, run, config)
    return Subject(
        name=name,
        steps=config.steps,
        stream=SampleStream(datasets, seq_len=config.seq_len, seed=config.seed, phases=phases),
        phases=phases,
        datasets=datasets,
        on_damage=config.data.on_damage,
    )


def _check_same_data(run: Path, datasets: Datasets, rows: Sequence[RunPhase]) -> None:
    """InspectUsageError when a dataset that was named is not the one that the run was trained on,
    or not any more.
    """
    dataset, found = datasets.places[0][0], datasets.fingerprints()
    known = Phases(rows).fingerprints if rows else found
    other = next((name for name in found if known.get(name) != found[name]), None)
    if other is None:
        return
    trained_on = config_of(run).data.path
    if is_at(dataset, trained_on):
        raise InspectUsageError(
            f"{dataset} was changed since {run} was trained on it: source {other!r} is data of "
            f"fingerprint {found[other][:16]} now and was {known.get(other, 'not there')[:16]}; "
            "put the data of the run back"
        )
    raise InspectUsageError(
        f"{run} was not trained on {dataset} but on other data, at {trained_on}; write "
        f"{trained_on} instead"
    )


def _inspect(subject: Subject, step: int, first: int, last: int) -> Inspection:
    decode = decoder(subject.datasets)
    return inspect_samples(
        subject.stream.of(first),
        step=step,
        first=first,
        last=last,
        decode=decode,
        on_damage=subject.on_damage,
    )


def _with_earlier(datasets: Datasets, run: Path, config: RunConfig) -> Datasets:
    """With the sources that earlier phases had and that are still there."""
    sources = {source.name: source for source in datasets.sources}
    for table in reversed(data_tables(run)):
        try:
            named = DataConfig.model_validate(table)
            earlier = open_datasets(data_of(named), seq_len=config.seq_len, config=config.data)
        except DataError:
            # Its steps cannot be shown; those of other phases can.
            continue
        sources = {source.name: source for source in earlier.sources} | sources
    return replace(datasets, sources=tuple(sources.values()))


def config_of(run: Path) -> RunConfig:
    """The config of a pretraining run."""
    from train.run import read_config

    config = read_config(run)
    if not isinstance(config, RunConfig):
        raise InspectError(f"{run} is a fine-tuning run; its examples are lines of a file")
    return config


def recorded_hash(run: Path, step: int) -> str | None:
    """What the run's metrics say of a step; None when they do not say anything yet."""
    from train.rows import read_metrics

    rows = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return next(
        (row["data_hash"] for row in rows if row["step"] == step and "data_hash" in row), None
    )
