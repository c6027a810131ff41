"""The datasets of a run, opened together: what each source holds, and that one tokenizer made them.

A dataset given alone keeps the names of its own sources. One that is listed under a name gives its
only source that name (`web`), or puts the name before several (`web/main`). Names are part of the
keys of the sample order. Cost: one manifest per dataset; no token is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.config import DataConfig, DataError, DataSource, DataUsageError, Packing
from data.kept import KeptChunks
from data.manifest import Manifest, read_manifest
from data.mixture import quotas
from data.order import Geometry
from data.places import Place, place_of
from data.plans import check_plan
from data.samples import BestFit, Concat, Samples
from data.tokens import TokenSource

Data = str | Path | Sequence[DataSource]
"""A dataset, or several by name and weight."""


@dataclass(frozen=True)
class Source:
    """One source of a split: a name in the keys of the order, and the tokens behind it."""

    name: str
    dataset: Place
    tokens: TokenSource
    samples: Samples
    fingerprint: str
    """sha256 over its tokens and documents."""
    weight: float

    @property
    def geometry(self) -> Geometry:
        """Where its samples lie."""
        return self.samples.geometry

    def at(self, seq_len: int) -> Source:
        """The source in samples of another length."""
        return replace(self, samples=self.samples.at(seq_len))


@dataclass(frozen=True)
class Datasets:
    """Every source of a split, sorted by name, and what all their datasets share."""

    sources: tuple[Source, ...]
    vocab_size: int
    tokenizer_sha256: str
    bos: bool
    """Whether every document begins with BOS."""
    special_ids: dict[str, int]
    """As the manifest lists them; without "eos" where the tokens are documents to nobody."""
    fingerprint: str | dict[str, str]
    """Of the dataset, or of every dataset by its name."""
    packing: Packing
    """How documents fill samples."""
    places: tuple[tuple[Place, str], ...]
    """Every dataset that was named, with the name of its tokenizer's file."""

    def slots(self) -> dict[str, int]:
        """The mixture by the weights of the sources, out of NUM_SLOTS."""
        return quotas({source.name: source.weight for source in self.sources})

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of every source."""
        return {source.name: source.fingerprint for source in self.sources}


def data_of(config: DataConfig) -> Data:
    """What a [data] table names."""
    return config.sources or config.path


def open_datasets(
    data: Data,
    *,
    seq_len: int,
    split: str = "train",
    config: DataConfig | None = None,
    commands: bool = False,
    packing: Packing = "concat",
) -> Datasets:
    """Open the sources of a split; `config` and `commands` as of `place_of`. A config brings its
    own packing.

    Training needs all that are named; of another split each dataset gives what it has, by size.
    DataUsageError when the datasets do not fit each other or give no sample of seq_len.
    """
    packing = packing if config is None else config.packing
    if isinstance(data, str | Path):
        listed = [DataSource(name="dataset", path=str(data), weight=1)]
    else:
        listed = list(data)
    alone = isinstance(data, str | Path)
    places = [place_of(entry.path, config, commands=commands) for entry in listed]
    manifests = [read_manifest(place) for place in places]
    _check_alike(listed, manifests)
    kept = KeptChunks()
    sources: list[Source] = []
    refused: DataUsageError | None = None
    for entry, place, manifest in zip(listed, places, manifests, strict=True):
        if packing == "best_fit" and split == "train":
            # The plan of the other split, too: validation may come hours later.
            check_plan(place, manifest, seq_len)
        try:
            sources += _sources(entry, place, manifest, split, seq_len, packing, kept, alone=alone)
        except DataUsageError as error:
            if split == "train":
                raise
            refused = refused or error
    if not sources:
        assert refused is not None, "a dataset gives sources or a reason"
        raise refused
    _check_distinct(sources)
    by_name = {e.name: m.fingerprint for e, m in zip(listed, manifests, strict=True)}
    return Datasets(
        sources=tuple(sorted(sources, key=lambda source: source.name)),
        vocab_size=manifests[0].vocab_size,
        tokenizer_sha256=manifests[0].tokenizer_sha256,
        bos=_bos(manifests[0]),
        special_ids=manifests[0].special_ids,
        fingerprint=manifests[0].fingerprint if alone else by_name,
        packing=packing,
        places=tuple(
            (place, manifest.tokenizer_file)
            for place, manifest in zip(places, manifests, strict=True)
        ),
    )


def _sources(
    entry: DataSource,
    place: Place,
    manifest: Manifest,
    split: str,
    seq_len: int,
    packing: Packing,
    kept: KeptChunks,
    *,
    alone: bool,
) -> list[Source]:
    names = manifest.source_names(split)
    if not names:
        found = sorted({shard.split for shard in manifest.shards})
        raise DataUsageError(
            f"{place} has no split {split!r}, only {', '.join(found)}; prepare it with "
            "`--val-fraction` above 0"
        )
    if seq_len > manifest.block_tokens:
        raise DataUsageError(
            f"seq_len={seq_len} is longer than a block of {place}, which holds "
            f"{manifest.block_tokens} tokens; lower seq_len"
        )
    made: list[Samples] = []
    for name in names:
        tokens = TokenSource(place, manifest, split, name, kept=kept)
        if packing == "best_fit":
            made.append(BestFit(tokens, place, manifest, split, seq_len))
        else:
            made.append(Concat(tokens, Geometry(tokens.num_tokens, manifest.block_tokens, seq_len)))
        if made[-1].geometry.num_samples == 0:
            raise DataUsageError(_too_small(place, split, tokens, seq_len, packing))
    total = sum(samples.geometry.num_samples for samples in made)
    # By size, sources come to the end of their epochs together.
    scale = 1.0 if alone or split != "train" else entry.weight / total
    return [
        Source(
            name=_name(entry.name, name, alone=alone, only=len(names) == 1),
            dataset=place,
            tokens=samples.tokens,
            samples=samples,
            fingerprint=manifest.source_fingerprint(split, name),
            weight=samples.geometry.num_samples * scale,
        )
        for name, samples in zip(names, made, strict=True)
    ]


def _too_small(
    place: Place, split: str, tokens: TokenSource, seq_len: int, packing: Packing
) -> str:
    held = f"{place}: source {tokens.name!r} of split {split!r} holds"
    if packing == "best_fit":
        return f"{held} no document of two tokens or more; prepare more text"
    return (
        f"{held} {tokens.num_tokens} tokens, but one sample of seq_len={seq_len} needs "
        f"{seq_len + 1}; lower seq_len or prepare more text"
    )


def _name(entry: str, inner: str, *, alone: bool, only: bool) -> str:
    if alone:
        return inner
    return entry if only else f"{entry}/{inner}"


def _bos(manifest: Manifest) -> bool:
    return bool(manifest.preparation.get("config", {}).get("bos", False))


def _check_alike(listed: list[DataSource], manifests: list[Manifest]) -> None:
    first, reference = listed[0], manifests[0]
    for entry, manifest in zip(listed, manifests, strict=True):
        there, here = reference.tokenizer_sha256, manifest.tokenizer_sha256
        if here != there:
            raise DataUsageError(
                f"sources {first.name!r} and {entry.name!r} were made with different tokenizers: "
                f"{first.path} has sha256 {there}, {entry.path} has {here}; prepare one of them "
                f"again with `--tokenizer {first.path}/{reference.tokenizer_file}`"
            )
        if manifest.special_ids != reference.special_ids:
            raise DataUsageError(
                f"sources {first.name!r} and {entry.name!r} have different special ids: "
                f"{reference.special_ids} and {manifest.special_ids}; prepare one of them again "
                f"with `--tokenizer {first.path}/{reference.tokenizer_file}`"
            )
        if _bos(manifest) != _bos(reference):
            with_bos, without = (first, entry) if _bos(reference) else (entry, first)
            raise DataUsageError(
                f"source {with_bos.name!r} was prepared with --bos and {without.name!r} without "
                "it; prepare one of them again like the other"
            )


def _check_distinct(sources: list[Source]) -> None:
    seen: dict[str, str] = {}
    for source in sources:
        other = seen.setdefault(source.fingerprint, source.name)
        if other != source.name:
            raise DataUsageError(
                f"sources {other!r} and {source.name!r} are the same data; name it once, with the "
                "sum of both weights"
            )


def check_continues(known: Mapping[str, str], sources: Iterable[Source]) -> None:
    """DataError when a source of a run has become other data, or came back under another name."""
    names = {fingerprint: name for name, fingerprint in known.items()}
    for source in sources:
        name, was = source.name, known.get(source.name, source.fingerprint)
        other = names.get(source.fingerprint, name)
        if was != source.fingerprint:
            raise DataError(_changed(source, was, other))
        if other != name:
            raise DataUsageError(
                f"source {name!r} is the data that this run reads as {other!r}; call it {other!r}, "
                "or its samples would be trained on again from the first"
            )


def _changed(source: Source, was: str, other: str) -> str:
    name, dataset = source.name, source.dataset
    now = f"fingerprint {was[:16]} then, {source.fingerprint[:16]} now"
    if other != name:
        return (
            f"source {name!r}: {dataset} is the data that this run reads as {other!r} ({now}), so "
            "paths were exchanged and samples would be repeated and left out; give each source "
            "the path of its own data again"
        )
    return (
        f"source {name!r}: {dataset} holds other data than this run was trained on ({now}, with "
        f"{source.tokens.num_tokens:,} tokens): it was prepared again with other text, settings or "
        "tokenizer, or was replaced. Places in the old data mean nothing in the new, so samples "
        "would be repeated and left out. Put the old dataset back, or name it where it is now "
        "(data=PATH, or the source's path); or train on the new one, too, under a name of its own "
        "in [[data.sources]] with --allow-change data.sources; or begin a new --run"
    )
