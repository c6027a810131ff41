"""A small corpus and its dataset by the real preparation, and what tests compare of datasets."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data.config import PrepareConfig
from data.manifest import read_manifest
from data.prepare import Summary, prepare
from data.tokens import TokenSource
from tests.data.texts import prose, write_lines

SETTINGS = {"vocab_size": 400, "val_fraction": 0.2, "part_bytes": 9_000, "shard_bytes": 30_000}


def run(path: Path, output: Path, *, workers: int = 1, **settings: object) -> Summary:
    config = PrepareConfig.model_validate(SETTINGS | settings)
    return prepare([str(path)], output, config, workers=workers)


def stored(dataset: Path, side: str) -> list[list[int]]:
    """Every document of a side as ids."""
    manifest = read_manifest(dataset)
    found: list[list[int]] = []
    for name in manifest.source_names(side):
        source = TokenSource(dataset, manifest, side, name)
        start = 0
        for document in source.documents(0, source.num_tokens):
            found.append(source.read(start, start + document.num_tokens).tolist())
            start += document.num_tokens
    return found


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long text of several pieces, small texts and JSON lines."""
    folder = tmp_path_factory.mktemp("input") / "corpus"
    folder.mkdir()
    (folder / "long.txt").write_text(prose(250_000))
    (folder / "short.txt").write_text(prose(500, seed=1))
    write_lines(folder / "lines.jsonl", [prose(400, seed=seed) for seed in range(2, 60)])
    return folder


@pytest.fixture(scope="module")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dataset") / "dataset"
    run(corpus, output)
    return output
