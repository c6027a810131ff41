"""A long packed file becomes several parts that hold its documents once, in order."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import ranges
from data.config import DataError, PrepareConfig
from data.prepare import prepare
from data.readers import Document, Reading, cut_parts, find_files, read_extent
from tests.data.files import FORMATS, parquet, write
from tests.data.texts import prose

DOCUMENTS = [prose(300, seed=seed) for seed in range(80)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Packed lines with blank and bad ones between, and a few other formats."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in DOCUMENTS]
    lines[5:5] = ["\n", "{oops\n"]
    write(folder / "a.jsonl.gz", gzip.compress("".join(lines).encode()))
    parquet(folder / "b.parquet", {"text": DOCUMENTS})
    write(folder / "c.csv.gz", gzip.compress(FORMATS["a.csv"]))
    write(folder / "d.tar", FORMATS["a.tar"])
    write(folder / "e.txt", prose(5000))
    return folder


@pytest.mark.parametrize("range_bytes", [1, 700, 10**9])
def test_ranges_hold_every_document_once_in_order(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int
) -> None:
    monkeypatch.setattr(ranges, "LONG_BYTES", 100)
    whole = cut_parts(find_files([str(corpus)]), 2**9)
    found = {
        file: ranges.find_ranges(file, reading=Reading(), range_bytes=range_bytes)
        for file in ranges.long_files(whole)
    }
    cut = ranges.cut_long(whole, found)
    assert [item for part in cut for extent in part for item in read_extent(extent)] == [
        item for part in whole for extent in part for item in read_extent(extent)
    ]
    assert (len(cut) > len(whole)) == (range_bytes < 10**9)
    sizes = [sum(extent.stop - extent.start for extent in part) for part in cut]
    assert sum(sizes) == sum(file.num_bytes for file in find_files([str(corpus)]))
    for part in cut:
        items = [item for extent in part for item in read_extent(extent)]
        texts = [len(item.text) for item in items if isinstance(item, Document)]
        assert part[0].file.name.endswith("e.txt") or sum(texts[:-1]) < range_bytes


def test_a_dataset_from_ranges_is_the_same_at_any_number_of_workers(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PrepareConfig(vocab_size=400, val_fraction=0.2, max_bad_lines=1)
    whole = prepare([str(corpus)], tmp_path / "whole", config, workers=1)
    monkeypatch.setattr(ranges, "LONG_BYTES", 100)
    monkeypatch.setattr(ranges, "RANGE_BYTES", 3000)
    for workers in (1, 2):
        output = tmp_path / f"cut-{workers}"
        summary = prepare([str(corpus)], output, config, workers=workers)
        assert summary.manifest.counts == whole.manifest.counts
        assert summary.manifest.fingerprint == whole.manifest.fingerprint


def test_a_cut_file_is_found_before_anything_is_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "LONG_BYTES", 100)
    path = corpus / "a.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: the gzip data is cut off at byte"):
        prepare([str(path)], tmp_path / "dataset", PrepareConfig(), workers=1)
    assert not (tmp_path / "dataset").exists()


PEAK = r"""
import re, sys
from pathlib import Path
from data.readers import cut_parts, find_files, read_extent
for part in cut_parts(find_files([sys.argv[1]]), 2**21):
    for extent in part:
        for item in read_extent(extent): pass
# Not getrusage: its peak begins with what the parent of this process held.
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_reading_takes_no_more_memory_for_more_documents(tmp_path: Path, name: str) -> None:
    def peak(count: int) -> int:
        documents = [json.dumps({"text": DOCUMENTS[i % 80] * 30}) for i in range(count)]
        if name == "a.json":
            path = write(tmp_path / name, f"[{', '.join(documents)}]")
        else:
            path = write(tmp_path / name, gzip.compress("\n".join(documents).encode(), 1))
        command = [sys.executable, "-c", PEAK, str(path)]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    small, large = peak(100), peak(3000)
    assert large < small + 16, "27 MB more of text"
