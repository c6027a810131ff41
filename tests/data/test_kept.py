"""One bound on the chunks in memory, however many sources a process reads."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from data import kept, shards
from data.config import DataSource
from data.kept import KeptChunks
from data.sources import open_datasets
from tests.data.tiny import documents, write_dataset


def test_the_chunks_used_last_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_TOKENS", 10)
    held = KeptChunks()
    for key in "ab":
        held.add(key, np.zeros(4, np.uint16))
    assert held.get("a") is not None
    held.add("c", np.zeros(4, np.uint16))
    assert (held.get("a") is not None, held.get("b"), held.tokens) == (True, None, 8)
    held.add("too large", np.zeros(11, np.uint16))
    assert held.tokens == 0


def test_the_sources_of_a_mixture_share_one_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK_TOKENS", 500)
    for seed, name in enumerate(("web", "books")):
        texts = documents(40, seed=seed)
        write_dataset(tmp_path / name, {"train/main": texts}, block_tokens=512)
    monkeypatch.setattr(kept, "KEPT_TOKENS", 2000)
    listed = [DataSource(name=n, path=str(tmp_path / n), weight=1) for n in ("web", "books")]
    opened = open_datasets(listed, seq_len=100)
    # Loader workers get a copy.
    for sources in (opened.sources, pickle.loads(pickle.dumps(opened)).sources):
        web, books = (source.tokens for source in sources)
        assert web._kept is books._kept
        assert web._kept.tokens == 0
        for source in (web, books):
            source.read(0, source.num_tokens)
            assert 1000 <= web._kept.tokens <= 2000
