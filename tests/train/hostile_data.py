"""Datasets, tars, texts and tokenizers that somebody else has made, for tests/train/attack.py."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig
from data.durable import read_sealed, write_sealed
from data.foreign_tar import read_arrays
from data.instruct import read_examples
from data.manifest import read_manifest, write_manifest
from data.readers import cut_parts, find_files, read_extent
from data.sources import open_datasets
from data.stream import SampleStream
from data.tokenizer import load_tokenizer
from tests.data.tiny import documents, write_dataset
from tests.train.attack import BOMBS, NAMES, NUMBERS, Case, Evil, pickled
from tests.train.folders import make_tokenizer
from train.world import World


def datasets(folder: Path, world: World) -> Iterator[Case]:
    """Manifests of datasets with a good seal and bad content, and shards that hold objects."""
    dataset = folder / "dataset"
    # One shard: whatever is read, its index is.
    made = write_dataset(dataset, {"train/main": documents(40)}, shard_bytes=2**20)
    content = read_sealed(dataset / "manifest.json")
    (index,) = dataset.rglob("*.idx.json")
    indexed = read_sealed(index)

    def load(changed: Any) -> None:
        write_sealed(dataset / "manifest.json", changed)
        read_manifest(dataset)
        SampleStream(dataset, seq_len=16, seed=0).tokens(0)

    yield Case("dataset good", lambda: load(content), (dataset,), is_good=True)
    for key in sorted(content):
        for value in (*NUMBERS, *NAMES[:4]):
            changed = {**content, key: value}
            yield Case(f"dataset {key} {value!r}", lambda c=changed: load(c), (dataset,))
    for key in content["shards"][0]:
        for value in (*NUMBERS[:6], *NAMES[:4]):
            changed = json.loads(json.dumps(content))
            changed["shards"][0][key] = value
            yield Case(f"shard {key} {value!r}", lambda c=changed: load(c), (dataset,))

    def linked(file: Path) -> None:
        file.rename(folder / "away")
        file.symlink_to(folder / "secret")
        try:
            load(content)
        finally:
            file.unlink()
            (folder / "away").rename(file)

    # Followed, as people keep files on several disks; what is there must have the hash.
    for file in (index, index.with_name("shard-000000.tar"), dataset / "shards.npy"):
        roots = (dataset, folder / "secret")
        yield Case(f"dataset link {file.name}", lambda file=file: linked(file), roots)

    cache = folder / "cache"
    staged = DataConfig(stage=True, cache_dir=str(cache))

    def told(changed: Any) -> None:
        entry = replace(made.shards[0], idx_sha256=write_sealed(index, changed))
        options = made.model_dump(include={"vocab_size", "special_ids", "preparation"})
        write_manifest(
            dataset,
            [entry],
            tokenizer=dataset / "tokenizer.model",
            split_rule=made.split_rule,
            block_tokens=made.block_tokens,
            **options,
        )
        read_manifest(dataset)
        SampleStream(dataset, seq_len=16, seed=0).tokens(0)
        SampleStream(
            open_datasets(str(dataset), seq_len=16, config=staged), seq_len=16, seed=0
        ).tokens(0)

    yield Case("index good", lambda: told(indexed), (dataset, cache), is_good=True)
    for key in indexed:
        for value in (*NUMBERS[:8], *NAMES[:3], [{}]):
            changed = {**indexed, key: value}
            yield Case(f"index {key} {value!r}", lambda c=changed: told(c), (dataset, cache))
    for key in indexed["chunks"][0]:
        for value in NUMBERS:
            changed = json.loads(json.dumps(indexed))
            changed["chunks"][0][key] = value
            yield Case(f"index chunk {key} {value!r}", lambda c=changed: told(c), (dataset, cache))


def tokenizers(folder: Path, world: World) -> Iterator[Case]:
    """Tokenizers of datasets and runs."""
    good = folder / "tokenizer"
    make_tokenizer(good)
    text = (good / "tokenizer.json").read_bytes()
    yield Case("tokenizer good", lambda: load_tokenizer(good), (good,), is_good=True)

    def load(name: str, raw: bytes) -> None:
        old = (good / name).read_bytes() if (good / name).exists() else None
        (good / name).write_bytes(raw)
        try:
            load_tokenizer(good).encode_batch(["a text"])
        finally:
            (good / name).unlink()
            if old is not None:
                (good / name).write_bytes(old)

    bombs = {f"bomb {number}": raw for number, raw in enumerate(BOMBS)}
    table = json.loads(text)
    for key in table:
        for value in (7, "../secret", [], {}, {"type": "../secret"}):
            bombs[f"{key} {value!r}"] = json.dumps({**table, key: value}).encode()
    for name in ("tokenizer.json", "tokenizer.model"):
        for kind, raw in bombs.items():
            yield Case(f"{name} {kind}", lambda n=name, r=raw: load(n, r), (good,))
    for kind, raw in tuple(bombs.items())[: len(BOMBS)]:
        yield Case(f"names {kind}", lambda r=raw: load("tokenizer_config.json", r), (good,))
    for value in ("../secret", 7, ["../secret"], {"content": "../secret"}):
        raw = json.dumps({"eos_token": value, "tokenizer_file": "../secret"}).encode()
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            yield Case(f"{name} {value!r}", lambda n=name, r=raw: load(n, r), (good,))


def tars(folder: Path, world: World) -> Iterator[Case]:
    """Members that point elsewhere, are no files, or hold pickles."""
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    inside = folder / "in"
    inside.mkdir()
    objects = io.BytesIO()
    np.save(objects, np.array([Evil()], dtype=object), allow_pickle=True)
    payloads = (objects.getvalue(), pickled(), b"\x93NUMPY\x01\x00\xff\xff", b"")
    number = 0
    for name in (*(f"{n}.npy" for n in NAMES[:8]), "a.pickle", "a.pyd", "a.npy"):
        for kind in (tarfile.REGTYPE, *kinds):
            for payload in payloads if kind == tarfile.REGTYPE else (b"",):
                path = inside / f"{number}.tar"
                number += 1
                with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
                    member = tarfile.TarInfo(name.replace("\0", "0"))
                    member.type, member.linkname = kind, "../secret"
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))

                def load(path: Path = path) -> None:
                    list(read_arrays(path, dtype=None, ignored=Counter()))

                def read(path: Path = path) -> None:
                    for extent in chain(*cut_parts(find_files([str(path)]), 2**20)):
                        list(read_extent(extent))

                yield Case(f"tar {name} {kind!r}", load, (path,))
                yield Case(f"tar text {name} {kind!r}", read, (path,))


def lines(folder: Path, world: World) -> Iterator[Case]:
    """JSON lines that are deep, long, or no text."""
    inside = folder / "in"
    inside.mkdir()
    for number, bomb in enumerate(BOMBS):
        path = inside / f"{number}.jsonl"
        path.write_bytes(b'{"text": "good", "label": "x"}\n' + bomb + b"\n")

        def load(path: Path = path) -> None:
            read_examples(path, {"text": "text", "label": "label"})

        def read(path: Path = path) -> None:
            for extent in chain(*cut_parts(find_files([str(path)]), 2**20)):
                list(read_extent(extent))

        yield Case(f"examples {number}", load, (path,))
        yield Case(f"documents {number}", read, (path,))
