"""The standard library as a corpus: deterministic, bounded, and split without leaks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from launcher.corpus import MAX_CORPUS_BYTES, PACKAGES, Corpus, CorpusError, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The corpus of the Python that runs the tests."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def rows(path: Path) -> list[dict[str, str]]:
    """Parsed lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def file_of(row: dict[str, str]) -> str:
    """Source file of a row."""
    return row["path"].split(":")[0]


def test_the_same_python_gives_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    again = write_corpus(tmp_path)
    for name in ("text", "windows", "val_windows"):
        assert getattr(again, name).read_bytes() == getattr(corpus, name).read_bytes()


def test_the_text_comes_from_all_over_the_library_within_its_bound(corpus: Corpus) -> None:
    text = rows(corpus.text)
    size = sum(len(row["text"].encode()) for row in text)
    assert 0.9 * MAX_CORPUS_BYTES < size <= MAX_CORPUS_BYTES
    paths = [row["path"] for row in text]
    assert paths == sorted(paths)
    assert len({path.split("/")[0] for path in paths}) > 50
    assert not [path for path in paths if path.startswith("test/") or "site-packages" in path]


def test_nothing_that_is_evaluated_was_trained_on(corpus: Corpus) -> None:
    held_out = {file_of(row) for row in rows(corpus.val_windows)}
    assert held_out
    assert not held_out & {file_of(row) for row in rows(corpus.windows)}
    assert not held_out & {file_of(row) for row in rows(corpus.text)}


def test_every_label_has_windows_on_both_sides(corpus: Corpus) -> None:
    for path, least in ((corpus.windows, 30), (corpus.val_windows, 5)):
        counts = Counter(row["label"] for row in rows(path))
        assert sorted(counts) == sorted(PACKAGES)
        assert min(counts.values()) >= least
    assert all(len(row["text"].splitlines()) <= 20 for row in rows(corpus.windows))


def test_a_python_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="has no sources of 'asyncio'; run headrace under a full"):
        write_corpus(tmp_path / "out", library=tmp_path)
