"""Real text that every Python has: the source of its own standard library.

`write_corpus` turns it into three files: text to train on, and windows of 20 lines from eight
packages to tell apart, split by file. The files that windows are held out from are not in the text,
so nothing that is evaluated has been trained on. The choice depends on names and contents alone:
the same Python gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data.durable import write_durably

PACKAGES = (
    "asyncio", "email", "encodings", "http", "importlib", "multiprocessing", "unittest", "xml",
)  # fmt: skip
LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages"}
MAX_CORPUS_BYTES = 4_000_000
MAX_FILE_BYTES = 200_000
"""Longer files are generated tables."""
WINDOW_LINES = 20
MIN_WINDOW_CHARS = 200
VAL_FRACTION = 0.25
"""Of the files of each package, at least one."""
MAX_TRAIN_WINDOWS, MAX_VAL_WINDOWS = 160, 40
"""Per package."""


class CorpusError(ValueError):
    """A Python without the source files that are needed."""

    exit_code: ClassVar[int] = 1


@dataclass(frozen=True)
class Corpus:
    """Files that were written, as JSON lines."""

    text: Path
    """{"path", "text"}: whole source files."""
    windows: Path
    """{"text", "label", "path"}: windows to fine-tune on."""
    val_windows: Path
    """The same from files that are in neither of the other two."""


@dataclass(frozen=True)
class Source:
    """One source file of the library."""

    path: str
    """Relative to the library, with slashes."""
    text: str

    @property
    def package(self) -> str:
        """First part of the path; empty for a top-level module."""
        head, slash, _ = self.path.partition("/")
        return head if slash else ""


def write_corpus(folder: Path, *, library: Path | None = None) -> Corpus:
    """Write the corpus of `library` (this Python's standard library) into `folder`.

    Files that already hold the same bytes are left alone. CorpusError when a package is missing.
    """
    corpus = Corpus(folder / "stdlib.jsonl", folder / "windows.jsonl", folder / "windows-val.jsonl")
    sources = read_sources(library or Path(sysconfig.get_path("stdlib")))
    train, val = split_packages(sources)
    held_out = {source.path for source in val}
    text = choose(source for source in sources if source.path not in held_out)
    folder.mkdir(parents=True, exist_ok=True)
    _write(corpus.text, ({"path": source.path, "text": source.text} for source in text))
    _write(corpus.windows, windows(train, MAX_TRAIN_WINDOWS))
    _write(corpus.val_windows, windows(val, MAX_VAL_WINDOWS))
    return corpus


def read_sources(library: Path) -> list[Source]:
    """Every source file of the library but its tests, sorted by path; undecodable ones left out."""
    sources = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if LEFT_OUT & set(name.parts[:-1]) or not 0 < path.stat().st_size <= MAX_FILE_BYTES:
            continue
        try:
            sources.append(Source(name.as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return sources


def choose(sources: Iterable[Source]) -> list[Source]:
    """Files from all over the library, at most MAX_CORPUS_BYTES together, sorted by path."""
    chosen, size = [], 0
    for source in sorted(sources, key=lambda source: _key(source.path)):
        size += len(source.text.encode())
        if size > MAX_CORPUS_BYTES:
            break
        chosen.append(source)
    return sorted(chosen, key=lambda source: source.path)


def split_packages(sources: Iterable[Source]) -> tuple[list[Source], list[Source]]:
    """(train, validation) files of PACKAGES; no file is on both sides, every package on each."""
    train: list[Source] = []
    val: list[Source] = []
    sources = list(sources)
    for package in PACKAGES:
        files = [
            source for source in sources if source.package == package and any(_windows(source))
        ]
        if len(files) < 2:
            raise CorpusError(
                f"this Python's standard library has no sources of {package!r}; "
                "run headrace under a full Python (Debian and Ubuntu: apt-get install python3)"
            )
        files.sort(key=lambda source: _key(source.path))
        num_val = max(1, round(VAL_FRACTION * len(files)))
        val += files[:num_val]
        train += files[num_val:]
    return train, val


def windows(sources: Iterable[Source], limit: int) -> list[dict[str, str]]:
    """At most `limit` labelled windows per package, in hash order so that labels are mixed."""
    found = [
        {"text": text, "label": source.package, "path": f"{source.path}:{line}"}
        for source in sources
        for line, text in _windows(source)
    ]
    found.sort(key=lambda window: _key(window["path"]))
    taken: dict[str, int] = dict.fromkeys(PACKAGES, 0)
    kept = []
    for window in found:
        if taken[window["label"]] < limit:
            taken[window["label"]] += 1
            kept.append(window)
    return kept


def _windows(source: Source) -> Iterator[tuple[int, str]]:
    lines = source.text.splitlines(keepends=True)
    for start in range(0, len(lines), WINDOW_LINES):
        text = "".join(lines[start : start + WINDOW_LINES])
        if len(text.strip()) >= MIN_WINDOW_CHARS:
            yield start + 1, text


def _key(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    write_durably(path, text.encode())
