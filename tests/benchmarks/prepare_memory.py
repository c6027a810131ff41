"""Peak memory of a preparation at several sizes of input: it does not grow with the input.

Documents are 1 to 8 KB of real text (by default the docstrings of Python's standard library): runs
of paragraphs drawn anew for each document, so that all of them differ, but for one in ten, which is
an earlier one with a few words changed. All stages of cleaning and the shuffle are on. The sizes
marked with a plus are prepared to the end, the others up to the tokenizer. Each preparation runs in
a process of its own with 2 workers; resident memory (mapped files included) of all of its processes
is looked at every 50 ms. The bar: no size needs over 10 % more than the smallest.

    .venv/bin/python -m tests.benchmarks.prepare_memory [--sizes +256 +1024 4096]   (MiB)
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import PrepareConfig
from data.prepare import prepare
from tests.benchmarks.scale import descendants

SIZES = ("+256", "+1024", "4096")
FILE_BYTES = 2**26
BAR = 1.10
CLEAN = {"normalize": True, "filter": True, "mask_pii": True, "dedup": "near"}


def paragraphs(files: list[Path]) -> list[str]:
    """Paragraphs of real text: those of the files, or of the standard library's docstrings."""
    if not files:
        folder = Path(sysconfig.get_paths()["stdlib"])
        sources = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
        texts = [text for path in sources for text in _docstrings(path)]
    else:
        texts = [path.read_text(errors="replace") for path in files]
    # One line each, with an end: what counts as prose to the filter.
    lines = (" ".join(part.split()) for text in texts for part in text.split("\n\n"))
    found = sorted({line for line in lines if len(line) > 80 and "{" not in line})
    return [line if line.endswith((".", "!", "?")) else f"{line}." for line in found]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def documents(pool: list[str], rng: random.Random) -> Iterator[str]:
    """Endless; one in ten is nearly an earlier one, one in twenty mentions an address."""
    recent: list[str] = []
    while True:
        if recent and rng.random() < 0.1:
            words = rng.choice(recent).split(" ")
            words[rng.randrange(len(words))] = f"edit{rng.randrange(10**6)}"
            yield " ".join(words)
            continue
        size, text = int(2 ** rng.uniform(10, 13)), []
        while size > 0:
            text.append(rng.choice(pool))
            size -= len(text[-1])
        if rng.random() < 0.05:
            text.append(f"Write to reader{rng.randrange(10**6)}@example.org for more.")
        document = "\n".join(text)
        recent.append(document)
        del recent[:-200]
        yield document


def write_input(folder: Path, num_bytes: int, pool: list[str]) -> None:
    """JSON lines in files of 64 MiB."""
    folder.mkdir()
    found = documents(pool, random.Random(0))
    for number in range(-(-num_bytes // FILE_BYTES)):
        left = min(FILE_BYTES, num_bytes - number * FILE_BYTES)
        with (folder / f"{number:05d}.jsonl").open("w", encoding="utf-8") as file:
            while left > 0:
                left -= file.write(json.dumps({"text": next(found)}, ensure_ascii=False) + "\n")


class _Stop(Exception):
    """Ends a preparation before its tokenizer."""


def prepare_one(folder: Path, *, is_whole: bool, workers: int) -> None:
    """Prepare FOLDER/input in this process; stages are printed as they begin."""
    config = PrepareConfig.model_validate({"clean": CLEAN, "shuffle": True})
    last = ""

    def note(stage: str, done: int, total: int) -> None:
        nonlocal last
        if stage != last:
            print(stage, flush=True)
            last = stage
        if stage == "survey" and done == total and not is_whole:
            raise _Stop

    try:
        prepare(
            [str(folder / "input")],
            folder / "dataset",
            config,
            workers=workers,
            decontaminate=[folder / "evaluation.txt"],
            progress=note,
        )
    except _Stop:
        return


def measure(folder: Path, *, is_whole: bool, workers: int) -> dict[str, Any]:
    """Peaks in MiB of a preparation in a fresh process: all processes together, by stage, and the
    largest one.
    """
    command = [sys.executable, "-m", "tests.benchmarks.prepare_memory", "--one", str(folder)]
    command += ["--whole"] * is_whole + ["--workers", str(workers)]
    stage, peaks, largest = "start", {}, 0.0
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:

        def listen() -> None:
            nonlocal stage
            assert child.stdout is not None
            for line in child.stdout:
                stage = line.strip()

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        while child.poll() is None:
            sizes = [_resident(pid) / 2**20 for pid in (child.pid, *descendants(child.pid))]
            peaks[stage] = max(peaks.get(stage, 0.0), sum(sizes))
            largest = max(largest, *sizes)
            time.sleep(0.05)
        listener.join()
    if child.returncode:
        raise SystemExit(f"the preparation of {folder} left with {child.returncode}")
    seconds = time.perf_counter() - start
    before = max(
        peak for name, peak in peaks.items() if name not in ("tokenizer", "encode", "commit")
    )
    return {
        "before_tokenizer": before,
        "all": max(peaks.values()),
        "process": largest,
        "seconds": seconds,
        "stages": peaks,
    }


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def main() -> None:
    """Measure all sizes and compare them with the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="in MiB; + is to the end")
    parser.add_argument("--text", nargs="*", type=Path, default=[], help="files of real text")
    parser.add_argument("--folder", type=Path, help="where input and output lie for a while")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        prepare_one(options.one, is_whole=options.whole, workers=options.workers)
        return
    pool = paragraphs(options.text)
    print(f"{len(pool):,} paragraphs of real text, {sum(map(len, pool)) / 2**20:.1f} MiB")
    figures: dict[str, dict[str, Any]] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="headrace-memory-", dir=options.folder) as name:
            folder = Path(name)
            (folder / "evaluation.txt").write_text("\n".join(pool[:3]))
            write_input(folder / "input", int(size.lstrip("+")) << 20, pool)
            is_whole = size.startswith("+")
            figures[size] = measure(folder, is_whole=is_whole, workers=options.workers)
        row = figures[size]
        by_stage = ", ".join(f"{stage} {peak:,.0f}" for stage, peak in row["stages"].items())
        print(f"{size} MiB in {row['seconds']:,.0f} s: peak MiB by stage: {by_stage}", flush=True)
    is_met = True
    for key in ("before_tokenizer", "all", "process"):
        rows = {s: row[key] for s, row in figures.items() if key != "all" or s.startswith("+")}
        if not rows:
            continue
        smallest = next(iter(rows.values()))
        ratio = max(rows.values()) / smallest
        is_met &= ratio <= BAR
        listed = ", ".join(
            f"{size}: {peak:,.0f} ({peak / smallest:.2f})" for size, peak in rows.items()
        )
        print(f"{key}: {listed}; largest ratio {ratio:.3f}, bar {BAR}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
    sys.exit(not is_met)


if __name__ == "__main__":
    main()
