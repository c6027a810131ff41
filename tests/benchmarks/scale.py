"""Open a dataset of 10^13 tokens in 100,000 shards and read the last sample of an epoch.

The manifest, its table and the indexes that are read are real; shards are sparse files, and only
those that hold the sample are there with tokens in them (zeros, hashed as zeros). Measured in fresh
processes as a rank sees it: CPU and wall seconds from start of opening to the last sample, memory
of the rank and its 2 loader processes together when it comes (what nobody shares, beyond what the
rank's imports take), later peaks of the rank and of each loader process, which keeps chunks up to
its bound (data/kept.py), and most files open at once. Exit code 1 when a bar is missed, which is
named.

    .venv/bin/python -m tests.benchmarks.scale [--json FIGURES.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.durable import write_sealed
from data.loader import SampleStream, micro_batches
from data.manifest import ShardEntry, write_manifest
from data.shard_index import INDEX_FORMAT, INDEX_VERSION, index_path
from tests.benchmarks.bars import Bar, judge

NUM_SHARDS = 100_000
CHUNK_TOKENS, CHUNKS = 10**6, 100
"""Of a shard: 10^8 tokens, 200 MB."""
SEQ_LEN, BATCH = 2048, 8
MEMBER_BYTES = 2 * CHUNK_TOKENS + 4096
SHARD_BYTES = CHUNKS * MEMBER_BYTES


def write_dataset(folder: Path, num_shards: int) -> None:
    """Every shard has the same content, so one index serves all of them by link."""
    tokens_hash = xxhash.xxh3_64_hexdigest(bytes(2 * CHUNK_TOKENS))
    lens_hash = xxhash.xxh3_64_hexdigest(np.array([CHUNK_TOKENS], "<u4").tobytes())
    chunks = [
        {
            "key": f"000000-{i:05d}",
            "documents": 1,
            "tokens": CHUNK_TOKENS,
            "lens_offset": i * MEMBER_BYTES,
            "tokens_offset": i * MEMBER_BYTES + 4096,
            "lens_xxh3": lens_hash,
            "tokens_xxh3": tokens_hash,
        }
        for i in range(CHUNKS)
    ]
    shards = folder / "train" / "main"
    shards.mkdir(parents=True)
    first = shards / "shard-000000.tar"
    with first.open("wb") as file:
        os.truncate(file.fileno(), SHARD_BYTES)
    content = {
        "format": INDEX_FORMAT,
        "version": INDEX_VERSION,
        "dtype": "<u2",
        "bytes": SHARD_BYTES,
        "tar_sha256": "0" * 64,
        "chunks": chunks,
    }
    sha256 = write_sealed(index_path(first), content)
    for number in range(1, num_shards):
        path = shards / f"shard-{number:06d}.tar"
        path.symlink_to(first.name)
        index_path(path).symlink_to(index_path(first).name)
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(b"stands for a tokenizer")
    write_manifest(
        folder,
        (
            ShardEntry(
                path=f"train/main/shard-{number:06d}.tar",
                bytes=SHARD_BYTES,
                # What nobody reads may be anything; distinct, as real ones are.
                sha256=hashlib.sha256(b"%d" % number).hexdigest(),
                idx_sha256=sha256,
                tokens=CHUNKS * CHUNK_TOKENS,
                documents=CHUNKS,
            )
            for number in range(num_shards)
        ),
        tokenizer=tokenizer,
        vocab_size=2**16,
        special_ids={"eos": 2},
        preparation={},
        split_rule="none",
    )


def seek(folder: Path, num_workers: int) -> dict[str, float]:
    """Open, and read the last samples of the first epoch, in this process."""
    watch = _Watch()
    wall, cpu = time.perf_counter(), time.process_time()
    stream = SampleStream(folder, seq_len=SEQ_LEN, seed=0)
    last = stream.num_samples_per_epoch
    batches = micro_batches(
        stream,
        first_sample=last - BATCH,
        batch_samples=BATCH,
        num_steps=1 + 20 * num_workers,
        rank=0,
        num_ranks=1,
        micro_batch=BATCH,
        num_workers=num_workers,
    )
    next(batches)
    figures = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    figures["together_mb"] = watch.together()
    # On into the next epoch, so that workers hold what they hold in training.
    for _ in batches:
        pass
    return {**figures, **watch.result(), "samples_per_epoch": last}


class _Watch:
    """Memory and files of this process and its children, looked at every 20 ms."""

    def __init__(self) -> None:
        self._before = _private_bytes(os.getpid())
        self._unshared_before = _unshared_bytes(os.getpid())
        self._peaks = {"rank_mb": 0.0, "each_worker_mb": 0.0, "open_files": 0.0}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def together(self) -> float:
        """MB of this process beyond its start and of all its children, as they are now."""
        children = sum(_unshared_bytes(pid) for pid in descendants(os.getpid()))
        return (_unshared_bytes(os.getpid()) - self._unshared_before + children) / 2**20

    def result(self) -> dict[str, float]:
        self._done.set()
        self._thread.join()
        return self._peaks

    def _look(self) -> None:
        while not self._done.wait(0.02):
            own = (_private_bytes(os.getpid()) - self._before) / 2**20
            children = [_private_bytes(pid) / 2**20 for pid in descendants(os.getpid())]
            files = [_num_files(pid) for pid in [os.getpid(), *descendants(os.getpid())]]
            for name, value in (
                ("rank_mb", own),
                ("each_worker_mb", max(children, default=0)),
                ("open_files", max(files)),
            ):
                self._peaks[name] = max(self._peaks[name], value)


def _private_bytes(pid: int) -> int:
    """Resident memory that is not a mapped file, 0 when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    kib = found.get("RssAnon") or found.get("VmRSS") or "0"
    return int(kib.split()[0]) * 1024


def _unshared_bytes(pid: int) -> int:
    """Resident memory that no other process shares, 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def _num_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def descendants(pid: int) -> list[int]:
    """Processes below one, as they are now."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_text()
            except OSError:
                continue
            parents[int(name)] = int(stat.rpartition(")")[2].split()[1])
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def bars(figures: dict[str, dict[str, float]]) -> list[Bar]:
    """What is promised of a rank process; its loader processes have their own memory."""
    # With workers the wall time is that of a new fork server, whatever the data.
    seconds = {"0 workers": ("wall_seconds", "cpu_seconds"), "2 workers": ("cpu_seconds",)}
    return [
        *(
            Bar(f"{case}: {key}", figures[case][key], below=2)
            for case, keys in seconds.items()
            for key in keys
        ),
        *(
            Bar(f"{case}: together_mb", row["together_mb"], below=200)
            for case, row in figures.items()
        ),
        *(Bar(f"{case}: rank_mb", row["rank_mb"], below=200) for case, row in figures.items()),
        *(
            Bar(f"{case}: open_files", row["open_files"], below=257)
            for case, row in figures.items()
        ),
    ]


def main() -> int:
    """Write the dataset into a temporary folder and measure 0 and 2 workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shards", type=int, default=NUM_SHARDS)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--one", nargs=2, metavar=("DATASET", "WORKERS"))
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(seek(Path(options.one[0]), int(options.one[1]))))
        return 0
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-scale-") as name:
        write_dataset(Path(name), options.shards)
        tokens = options.shards * CHUNKS * CHUNK_TOKENS
        print(f"{tokens:.1e} tokens in {options.shards:,} shards")
        for workers in (0, 2):
            command = [sys.executable, "-m", "tests.benchmarks.scale"]
            command += ["--one", name, str(workers)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
            figures[f"{workers} workers"] = json.loads(line.removeprefix("RESULT "))
    for case, row in figures.items():
        print(case + ": " + ", ".join(f"{key} {value:,.2f}" for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
    return judge(bars(figures))


if __name__ == "__main__":
    sys.exit(main())
