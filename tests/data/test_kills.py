"""A preparation with every stage on is killed at random moments and leaves the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.test_tasks import corpus as corpus
from tests.data.texts import prose

ROOT = Path(__file__).resolve().parents[2]

KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import webdataset.writer
from data import ranges, shuffle
from data.claim import WORK
from data.config import PrepareConfig
from data.jobs import Task
from data.prepare import STAGES, prepare, prepare_task
from tests.data.prepared import tree

corpus, evaluation, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
how, num_kills, workers = sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
shuffle.BUCKET_BYTES, ranges.LONG_BYTES, ranges.RANGE_BYTES = 30_000, 1_000, 9_000
config = PrepareConfig.model_validate({
    "vocab_size": 400, "val_fraction": 0.2, "part_bytes": 9_000, "shard_bytes": 30_000,
    "max_bad_lines": 1, "shuffle": True,
    "clean": {"dedup": "near", "mask_pii": True, "normalize": True},
})
rng = random.Random(0)

def whole(output, workers):
    prepare([corpus], output, config, workers=workers, decontaminate=[evaluation])

def tasks(output, workers):
    for stage in STAGES:
        count = 1 if stage in ("plan", "drop", "tokenizer", "commit") else 3
        for share in range(count):
            prepare_task([corpus], output, config, stage=stage, task=Task(share, count),
                         workers=workers, decontaminate=[evaluation])

def start(work, *args):
    pid = os.fork()
    if pid == 0:
        try:
            work(*args)
        except BaseException as error:
            print(type(error), error, flush=True)
            os._exit(1)
        os._exit(0)
    return pid

def ended(pid, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (found := os.waitpid(pid, os.WNOHANG))[0]:
            assert found[1] == 0, found
            return True
        time.sleep(0.001)
    return False

begin = time.monotonic()
assert ended(start(whole, folder / "reference", workers), 300)
seconds = time.monotonic() - begin
expected = tree(folder / "reference")
work = whole if how == "plain" else tasks
kills = datasets = 0
while kills < num_kills:
    output = folder / f"dataset-{datasets}"
    while True:
        pid = start(work, output, workers)
        # Half of them early: what was done before a kill makes the next attempt shorter.
        moment = seconds * rng.random() * rng.choice([0.2, 1.2])
        if ended(pid, moment if kills < num_kills else 300):
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        left = output / WORK
        stages = {path.name.split("-")[0] for path in left.iterdir()} if left.exists() else set()
        print("killed", *sorted(stages) or ["nothing"], flush=True)
    assert tree(output) == expected, output
    datasets += 1
print("datasets", datasets, flush=True)
"""


@pytest.mark.parametrize(
    ("how", "num_kills", "workers"),
    [
        ("plain", 10, 1),
        pytest.param("plain", 200, 1, marks=pytest.mark.slow),
        pytest.param("plain", 40, 2, marks=pytest.mark.slow),
        pytest.param("tasks", 100, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_it_is_the_uninterrupted_dataset(
    corpus: Path, tmp_path: Path, how: str, num_kills: int, workers: int
) -> None:
    (tmp_path / "test.txt").write_text(prose(300, seed=3))
    command = [sys.executable, "-c", KILLS, str(corpus), str(tmp_path / "test.txt")]
    command += [str(tmp_path), how, str(num_kills), str(workers)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *moments, last = done.stdout.splitlines()
    assert len(moments) == num_kills and last.startswith("datasets ")
    assert len(set(moments)) > 2, f"all kills met the same stage: {set(moments)}"
