"""One attempt owns a run: others are refused while it lives, and it can only lose once replaced."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data import durable
from data.durable import read_sealed, write_sealed
from tests.ranks import run_ranks
from tests.train.checkpoints import pieces, values, write
from tests.train.test_pretrain import config
from train import checkpoint, opening, ownership
from train.attempts import attempts, end_attempt
from train.checkpoint import CheckpointError, committed, open_checkpoint, step_folder
from train.ownership import Ownership, RunInUse, ago, own
from train.pretrain import pretrain_on
from train.slices import write_slices
from train.world import RankError, World

BEAT = 0.05
CLAIM = """
import sys, time
from pathlib import Path
from train.ownership import own
print(own(Path(sys.argv[1]), slurm_job="77").number, flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Ownership]:
    found = own(tmp_path, beat_seconds=BEAT)
    yield found
    found.release()


def elsewhere(run: Path, number: int = 1, **changes: Any) -> None:
    """Make an attempt one of another machine."""
    path = run / "attempts" / f"{number:06d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "node7"} | changes))


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (20, "0 minutes ago"),
        (61, "1 minute ago"),
        (5_400, "90 minutes ago"),
        (9_000, "2.5 hours ago"),
        (1_814_400, "21.0 days ago"),
    ],
)
def test_a_run_of_weeks_is_not_told_in_minutes(seconds: float, told: str) -> None:
    assert ago(seconds) == told


def test_the_run_of_a_living_process_is_refused(tmp_path: Path) -> None:
    living = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert living.stdout is not None
        assert living.stdout.readline() == "1\n"
        with pytest.raises(RunInUse) as refused:
            own(tmp_path)
        assert re.search(
            rf"is being trained by attempt 1 \(process {living.pid} on .*, Slurm job 77, begun 0 "
            r"minutes ago\); wait until it has ended or stop it, and then run the same command",
            str(refused.value),
        )
        living.send_signal(signal.SIGSTOP)
        with pytest.raises(RunInUse):
            own(tmp_path)
    finally:
        living.kill()
        living.communicate()
    started = time.monotonic()
    assert own(tmp_path).number == 2
    assert time.monotonic() - started < 5, "nobody waits for the beat of a process that is gone"


def test_an_attempt_that_has_ended_is_followed_at_once(tmp_path: Path, owner: Ownership) -> None:
    end_attempt(tmp_path, 1, outcome="stopped", step=5)
    assert own(tmp_path).number == 2
    assert owner.is_lost


def test_a_beat_from_another_machine_is_respected(tmp_path: Path, owner: Ownership) -> None:
    elsewhere(tmp_path)
    with pytest.raises(RunInUse, match=r"by attempt 1 \(process \d+ on node7, begun"):
        own(tmp_path, beat_seconds=1.0)


@pytest.mark.parametrize("torn", [False, True])
def test_a_heart_that_stands_still_is_replaced_and_can_only_lose(
    tmp_path: Path, owner: Ownership, torn: bool
) -> None:
    owner.release()
    elsewhere(tmp_path)
    if torn:
        (tmp_path / "attempts" / "000001.json").write_text('{"host": "no')
    started = time.monotonic()
    taker = own(tmp_path, beat_seconds=BEAT)
    assert time.monotonic() - started >= 3 * BEAT
    assert taker.number == 2
    taker.check()
    with pytest.raises(RunInUse, match=r"attempt 1 no longer owns .*: attempt 2 \(process \d+ on "):
        owner.check()
    taker.release()


def test_of_many_at_once_one_gets_the_run(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def race(run: Path) -> Ownership | None:
        start.wait()
        try:
            return own(run)
        except RunInUse:
            return None

    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            won = [found for found in pool.map(race, [tmp_path / str(number)] * 8) if found]
            assert [found.number for found in won] == [1]
            won[0].release()


def test_who_waits_for_a_dead_owner_sees_the_one_that_came_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(tmp_path).release()
    elsewhere(tmp_path)
    original, later = ownership._check_gone, []

    def watched(*told: Any) -> None:
        original(*told)
        if not later:
            later.append(1)
            later.append(own(tmp_path, beat_seconds=BEAT))
            begin = {"attempt": 2, "event": "start", "time": 0.0}
            (tmp_path / "attempts.jsonl").write_text(json.dumps(begin) + "\n")

    monkeypatch.setattr(ownership, "_check_gone", watched)
    with pytest.raises(RunInUse, match=r"is being trained by attempt 2 "):
        own(tmp_path, beat_seconds=BEAT)
    later[1].check()
    later[1].release()


def stop_at(world: World, dataset: Path, run: Path, step: int) -> str:
    try:
        return pretrain_on(world, config(dataset), run, stop_at=step)
    except RankError as error:
        return f"{error.exit_code}: {error}"


def test_a_second_job_is_refused_and_leaves_no_trace(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(1, stop_at, dataset, run, 1) == ["stopped"]
    before = attempts(run), (run / "metrics.jsonl").read_bytes()
    owner = own(run)
    (told,) = run_ranks(1, stop_at, dataset, run, 2)
    assert told.startswith("2: ")
    assert f"is being trained by attempt 2 (process {os.getpid()} on" in told
    assert (attempts(run), (run / "metrics.jsonl").read_bytes()) == before
    owner.release()
    end_attempt(run, 2, outcome="failed", step=None)
    assert run_ranks(1, stop_at, dataset, run, 2) == ["stopped"]
    assert [row["attempt"] for row in attempts(run)] == [1, 1, 2, 3, 3]


def test_a_first_start_that_is_refused_writes_no_config(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    owner = own(run)
    (told,) = run_ranks(1, stop_at, dataset, run, 2)
    assert told.startswith("2: ") and "is being trained by attempt 1" in told
    assert [entry.name for entry in run.iterdir()] == ["attempts"]
    owner.release()


def lose_and_save(
    world: World, dataset: Path, run: Path, at: int, *overrides: str
) -> tuple[str, list[int]]:
    """Train; from look number `at` on the run belongs to somebody else, at step 9 already."""
    original = ownership.Ownership.check
    looks: list[int] = []

    def check(self: Ownership) -> None:
        looks.append(1)
        if len(looks) == at:
            ownership._create(run, self.number + 1, None)
            shutil.copytree(step_folder(run, committed(run)[0]), step_folder(run, 9))
        original(self)

    ownership.Ownership.check = check  # type: ignore[method-assign]
    try:
        pretrain_on(world, config(dataset, *overrides), run)
    except RankError as error:
        return str(error), committed(run)
    finally:
        ownership.Ownership.check = original  # type: ignore[method-assign]
    return "", committed(run)


@pytest.mark.parametrize(("at", "steps"), [(4, [9, 3]), (5, [9, 3]), (6, [9, 6, 3])])
def test_who_has_lost_the_run_begins_commits_and_prunes_nothing(
    dataset: Path, tmp_path: Path, at: int, steps: list[int]
) -> None:
    """Three looks per save: before the folder, the manifest, and the removal of others."""
    told = run_ranks(2, lose_and_save, dataset, tmp_path / "run", at)
    assert [found for _, found in told] == [steps, steps]
    assert all("attempt 1 no longer owns" in message for message, _ in told)


def test_who_has_lost_the_run_removes_no_folder_that_it_took_back(
    dataset: Path, tmp_path: Path
) -> None:
    """The fourth look of the second save: its thread was slow, and the step may be another's."""
    run = tmp_path / "run"
    (told,) = run_ranks(1, lose_and_save, dataset, run, 7, "checkpoint.keep=1")
    assert "attempt 1 no longer owns" in told[0]
    assert sorted(path.name for path in step_folder(run, 3).iterdir()) == ["rank-00000.safetensors"]


def test_a_rank_that_comes_late_overwrites_no_file_of_the_new_owner(tmp_path: Path) -> None:
    """It was frozen between the folder and its file; only rank 0 looks whose the run is."""
    checkpoint.begin(tmp_path, 60)
    stored = write(tmp_path, 60, num_ranks=4)
    with pytest.raises(CheckpointError, match="a later attempt has begun this checkpoint anew"):
        write_slices(step_folder(tmp_path, 60), 1, *pieces(values(60, seed=1), 1, 2))
    saved = open_checkpoint(tmp_path)
    saved.verify()
    assert saved.read("a").tobytes() == stored["param/a"].tobytes()


def test_the_last_look_comes_when_the_manifest_lacks_its_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is cut off from the storage stands in the fsync of the manifest."""
    calls: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync") or fsync(number))
    monkeypatch.setattr(durable, "publish", lambda *paths: calls.append("publish"))
    folder = checkpoint.begin(tmp_path, 1)
    checkpoint.commit(
        folder,
        step=1,
        parameters={},
        scalars={},
        state={},
        files=[],
        check=lambda: calls.append("check"),
    )
    assert calls[-3:] == ["fsync", "check", "publish"]


def test_a_run_that_went_on_while_its_owner_was_waited_for_is_looked_at_again(
    dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (told,) = run_ranks(1, go_on_meanwhile, dataset, run)
    assert f"{run} went on from step 1 to 3 while this attempt waited for it; run the same" in told
    assert [row["event"] for row in attempts(run)] == ["start", "end"] * 2


def go_on_meanwhile(world: World, dataset: Path, run: Path) -> str:
    assert pretrain_on(world, config(dataset), run, stop_at=1) == "stopped"
    original = opening.own

    def wait(*args: Any, **settings: Any) -> Ownership:
        shutil.copytree(step_folder(run, 1), step_folder(run, 3))
        manifest = step_folder(run, 3) / "manifest.json"
        content = {k: v for k, v in read_sealed(manifest).items() if k != "sha256"}
        write_sealed(manifest, {**content, "step": 3})
        return original(*args, **settings)

    opening.own = wait  # type: ignore[attr-defined]
    try:
        pretrain_on(world, config(dataset), run)
    except RankError as error:
        return str(error)
    finally:
        opening.own = original  # type: ignore[attr-defined]
    return ""
