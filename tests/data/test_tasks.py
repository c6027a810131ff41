"""Shares of stages, done anywhere in any number, leave what one plain preparation leaves."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from data import ranges, shuffle
from data.claim import WORK, holding
from data.config import DataError, DataUsageError, PrepareConfig
from data.jobs import Job, Task, alone, do
from data.prepare import STAGES, TaskSummary, prepare, prepare_task
from tests.data.prepared import tree
from tests.data.test_dedup import edited, real_texts
from tests.data.texts import prose, write_lines

SETTINGS = {
    "vocab_size": 400,
    "val_fraction": 0.2,
    "part_bytes": 9_000,
    "shard_bytes": 30_000,
    "max_bad_lines": 1,
}
EVERYTHING = {"shuffle": True, "clean": {"dedup": "near", "mask_pii": True, "normalize": True}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": EVERYTHING,
    "cleaned": {"clean": {"dedup": "exact"}},
    "empty side": {"val_fraction": 1e-9, "part_bytes": 2**20},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines with near copies, a bad one, a packed file that is cut, two texts."""
    folder = tmp_path_factory.mktemp("input") / "corpus"
    folder.mkdir()
    rng = random.Random(0)
    texts = real_texts(40)
    texts += [edited(rng.choice(texts), 0.01, rng) for _ in range(20)]
    rng.shuffle(texts)
    path = write_lines(folder / "a.jsonl", texts)
    path.write_text(path.read_text() + "{oops\n\n")
    lines = "".join(json.dumps({"text": prose(400, seed=s)}) + "\n" for s in range(60))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "long.txt").write_text(prose(80_000))
    (folder / "short.txt").write_text("a@b.org " + prose(700, seed=1))
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that this corpus reaches; jobs carry them to every process."""
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 30_000)
    monkeypatch.setattr(ranges, "LONG_BYTES", 1_000)
    monkeypatch.setattr(ranges, "RANGE_BYTES", 9_000)


def config(case: str) -> PrepareConfig:
    return PrepareConfig.model_validate(SETTINGS | CASES[case])


def task(corpus: Path, output: Path, case: str, stage: str, share: str) -> TaskSummary:
    return prepare_task(
        [str(corpus)], output, config(case), stage=stage, task=Task.parse(share), workers=1
    )


@pytest.mark.parametrize("case", CASES)
def test_tasks_leave_the_bytes_of_a_plain_preparation(
    corpus: Path, tmp_path: Path, case: str
) -> None:
    """Every stage with another number of tasks, in random order, some of them twice."""
    prepare([str(corpus)], tmp_path / "plain", config(case), workers=1)
    rng = random.Random(case)
    for stage in STAGES:
        count = 1 if stage in ("plan", "drop", "tokenizer", "commit") else rng.choice([1, 2, 3, 50])
        shares = [*range(count), rng.randrange(count)]
        rng.shuffle(shares)
        for share in shares:
            done = task(corpus, tmp_path / "tasks", case, stage, f"{share}/{count}")
        assert done.is_complete == (stage == "commit")
    assert tree(tmp_path / "tasks") == tree(tmp_path / "plain")
    assert task(corpus, tmp_path / "tasks", case, "read", "5/7").is_complete
    assert prepare([str(corpus)], tmp_path / "tasks", config(case), workers=1).was_complete


def test_a_task_continues_what_a_plain_call_has_begun_and_the_other_way(
    corpus: Path, tmp_path: Path
) -> None:
    prepare([str(corpus)], tmp_path / "plain", config("everything"), workers=1)

    class Stop(Exception):
        """Ends a plain call in the middle of a stage."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "clean" and done > total / 2:
            raise Stop

    output = tmp_path / "both"
    with pytest.raises(Stop):
        prepare([str(corpus)], output, config("everything"), workers=1, progress=stop)
    before = {path: path.stat().st_mtime_ns for path in (output / WORK).glob("*/*.json")}
    assert len(before) > 5
    for stage in ("clean", "dedup", "drop"):
        task(corpus, output, "everything", stage, "0/1")
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing is done twice"
    prepare([str(corpus)], output, config("everything"), workers=1)
    assert tree(output) == tree(tmp_path / "plain")


@pytest.mark.parametrize("case", ["everything", "empty side"])
def test_input_that_moved_meanwhile_is_the_same_input(
    corpus: Path, tmp_path: Path, case: str
) -> None:
    prepare([str(corpus)], tmp_path / "plain", config(case), workers=1)
    for name in ("there", "elsewhere"):
        (tmp_path / name).mkdir()
    there = tmp_path / "there" / "corpus"
    shutil.copytree(corpus, there)
    for stage in STAGES[:-2]:
        task(there, tmp_path / "out", case, stage, "0/1")
    elsewhere = there.rename(tmp_path / "elsewhere" / "corpus")
    prepare([str(elsewhere)], tmp_path / "out", config(case), workers=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")


def test_a_task_reads_no_files_but_its_own(corpus: Path, tmp_path: Path) -> None:
    """The files of one task are taken away while the others work."""
    mine = tmp_path / "corpus"
    mine.mkdir()
    for number in range(4):
        (mine / f"{number}.txt").write_text(prose(12_000, seed=number))
    for stage in ("plan", "read"):
        task(mine, tmp_path / "out", "everything", stage, "0/1")
    (mine / "2.txt").rename(tmp_path / "away")
    for stage in ("clean", "dedup", "drop", "scatter", "shuffle", "survey"):
        for share in (0, 1, 3):
            if stage == "clean":
                task(mine, tmp_path / "out", "everything", stage, f"{share}/4")
        if stage == "clean":
            with pytest.raises(DataError, match=r"input changed .*2\.txt: No such file or dir"):
                task(mine, tmp_path / "out", "everything", stage, "2/4")
            (tmp_path / "away").rename(mine / "2.txt")
        task(mine, tmp_path / "out", "everything", stage, "0/1")
        if stage == "shuffle":
            # From here on only the buckets are read.
            (mine / "2.txt").rename(tmp_path / "away")
    for stage in ("tokenizer", "encode"):
        task(mine, tmp_path / "out", "everything", stage, "0/1")
    (tmp_path / "away").rename(mine / "2.txt")
    assert task(mine, tmp_path / "out", "everything", "commit", "0/1").is_complete


def test_a_stage_that_is_not_complete_is_refused_with_the_command(
    corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(DataUsageError, match=r"stage plan is not complete; run: .*--stage plan"):
        task(corpus, output, "cleaned", "read", "0/4")
    assert not output.exists()
    task(corpus, output, "cleaned", "plan", "0/1")
    task(corpus, output, "cleaned", "read", "2/3")
    with pytest.raises(DataUsageError) as refused:
        task(corpus, output, "cleaned", "clean", "0/3")
    assert str(refused.value) == (
        "stage read is not complete: 2 of its 3 jobs are not done, those of tasks 0/3, 1/3; run: "
        "headrace prepare ... --stage read --task 0/3"
    )
    task(corpus, output, "cleaned", "read", "0/1")
    # How many jobs there are follows from the size of this repository's own code.
    with pytest.raises(DataUsageError, match=r"tasks 0/9, 1/9, .* and [34] more; run: "):
        task(corpus, output, "cleaned", "dedup", "8/9")
    task(corpus, output, "cleaned", "clean", "0/1")
    with pytest.raises(DataUsageError, match=r"stage dedup is not complete.*--stage dedup --task"):
        task(corpus, output, "cleaned", "survey", "0/9")
    task(corpus, output, "cleaned", "dedup", "0/1")
    with pytest.raises(DataUsageError, match=r"stage drop .* tasks 0/1; run: .* drop --task 0/1"):
        task(corpus, output, "cleaned", "encode", "3/9")
    with pytest.raises(DataUsageError, match=r"--stage sort: there is no such stage; one of plan,"):
        task(corpus, output, "cleaned", "sort", "0/1")
    with pytest.raises(DataUsageError, match=r"--stage sort: there is no such stage; one of plan,"):
        task(corpus, tmp_path / "without-a-plan", "cleaned", "sort", "0/1")


@pytest.mark.parametrize("text", ["1", "4/4", "1/0", "-1/3", "1/2/3", "a/b", " 1/2"])
def test_a_task_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(DataUsageError, match=r"numbered from 0, .*: 0/64, 1/64 \.\.\. 63/64"):
        Task.parse(text)
    assert Task.parse("03/4") == Task(3, 4)


def test_a_task_of_another_command_is_refused(corpus: Path, tmp_path: Path) -> None:
    task(corpus, tmp_path / "out", "cleaned", "plan", "0/1")
    with pytest.raises(
        DataUsageError, match=r"planned by another command:(?s:.*)--val-fraction: was"
    ):
        task(corpus, tmp_path / "out", "empty side", "read", "0/1")
    with pytest.raises(DataUsageError, match=r"--input: was .*, is .*short\.txt\ngive the same"):
        task(corpus / "short.txt", tmp_path / "out", "cleaned", "read", "0/1")
    prepare([str(corpus)], tmp_path / "done", config("plain"), workers=1)
    with pytest.raises(
        DataUsageError, match=r"begun by another command:(?s:.*)--dedup: was off, is exact"
    ):
        task(corpus, tmp_path / "done", "cleaned", "plan", "0/1")


def test_text_that_came_and_went_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    """Whichever stage has met other text refuses, and the old text back gives its own dataset."""
    path, output = tmp_path / "a.txt", tmp_path / "out"
    text, other = prose(20_000), prose(20_000, seed=1)
    path.write_text(text)
    task(path, tmp_path / "expected", "cleaned", "plan", "0/1")
    for stage in STAGES:
        task(path, tmp_path / "expected", "cleaned", stage, "0/1")
    for number in range(1, len(STAGES)):
        for stage in STAGES[:number]:
            task(path, output, "cleaned", stage, "0/1")
        path.write_text(other)
        for later in STAGES[1:]:
            with suppress(DataError):
                task(path, output, "cleaned", later, "0/1")
        with pytest.raises(DataError, match=r"the input changed while it was .*a\.txt\), so what"):
            task(path, output, "cleaned", "read", "0/1")
        assert not (output / "manifest.json").exists()
        path.write_text(text)
    for stage in STAGES:
        task(path, output, "cleaned", stage, "0/1")
    assert tree(output) == tree(tmp_path / "expected")


HOLD = """
import sys
from pathlib import Path
from data.jobs import Job, alone
with alone(Job(Path(sys.argv[1]), 7, 1)):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_no_job_is_done_by_two_processes_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(
            DataUsageError, match=r"another process is writing .*000007\.json; wait"
        ):
            do(Job(tmp_path, 7, 1))
        with alone(Job(tmp_path, 6, 1)):
            pass
        other.kill()
    with alone(Job(tmp_path, 7, 1)):
        pass


def test_a_plain_call_and_tasks_keep_each_other_out(corpus: Path, tmp_path: Path) -> None:
    task(corpus, tmp_path / "out", "plain", "plan", "0/1")
    with (
        holding(tmp_path / "out"),
        pytest.raises(DataUsageError, match="another process is writing"),
    ):
        task(corpus, tmp_path / "out", "plain", "read", "0/1")
    with holding(tmp_path / "out", shared=True):
        task(corpus, tmp_path / "out", "plain", "read", "0/1")
        with pytest.raises(DataUsageError, match="another process is writing"):
            prepare([str(corpus)], tmp_path / "out", config("plain"), workers=1)
