"""A disk that is full or read-only costs a run nothing: what was saved stays, and every rank says
why it stopped.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import fill, make_room, read_only, small_disk
from tests.ranks import run_ranks
from tests.train.folders import make_folder
from tests.train.test_pretrain import config, losses, train_run
from train.attempts import attempts
from train.checkpoint import CheckpointError, committed, open_checkpoint, step_folder
from train.config import FinetuneConfig, RunConfig
from train.decode import load_config
from train.export import _remove_leftovers, export
from train.finetune import finetune_on
from train.job import Job
from train.world import RankError, World

HEADRACE = str(Path(sys.executable).with_name("headrace"))


def refused(world: World, made: RunConfig, run: Path) -> str:
    """The message of the error that a run ends with, on this rank."""
    with pytest.raises(RankError) as refusal:
        train_run(world, made, run)
    assert refusal.value.exit_code == 1
    return str(refusal.value)


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two ranks with checkpoints at 3, 6 and 8, for those who do not write."""
    run = tmp_path_factory.mktemp("storage") / "run"
    assert run_ranks(2, train_run, config(dataset), run) == ["complete"] * 2
    return run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 20_000) as folder:
        yield folder


def test_a_checkpoint_on_a_full_disk_costs_the_steps_since_the_last_one(
    dataset: Path, whole: Path, disk: Path
) -> None:
    run = disk / "run"
    run_ranks(2, train_run, config(dataset), run, 3)
    # Room for the rows, not for the checkpoint of step 6.
    fill(disk, leave_kilobytes=200)
    room = os.statvfs(disk).f_bavail
    messages = run_ranks(2, refused, config(dataset), run)
    assert messages[0] == messages[1]
    what = rf"{step_folder(run, 6)} needs [\d,]+ bytes, and its file system has [\d,]+ free; "
    remedy = "make room on that disk, then run the same command again: what was finished is kept"
    assert re.search(what + remedy, messages[0])
    assert committed(run) == [3]
    open_checkpoint(run, 3).verify()
    assert not step_folder(run, 6).exists() and room - os.statvfs(disk).f_bavail < 8
    assert attempts(run)[-1]["outcome"] == "failed"
    make_room(disk)
    assert run_ranks(2, train_run, config(dataset), run) == ["complete"] * 2
    assert losses(run) == losses(whole)


def test_what_a_cut_save_of_another_step_takes_is_room_for_the_next_one(
    dataset: Path, whole: Path, disk: Path
) -> None:
    run = disk / "run"
    run_ranks(2, train_run, config(dataset), run, 3)
    # The attempt that was killed saved at another step, and left no room for step 6.
    left = step_folder(run, 5)
    left.mkdir()
    fill(left, leave_kilobytes=200)
    assert run_ranks(2, train_run, config(dataset), run) == ["complete"] * 2
    assert losses(run) == losses(whole) and not left.exists()


def refused_rows(world: World, made: RunConfig, run: Path) -> str:
    """`refused`, with the disk filled once the rows of step 4 are being written."""
    import train.step

    original = train.step._record

    def record(job: Job, step: int, **rest: object) -> None:
        if step == 4 and world.is_main:
            path = run / "metrics.jsonl"
            path.write_bytes(path.read_bytes() + b"\n" * (-path.stat().st_size % 4096))
            fill(run.parent)
        original(job, step, **rest)  # type: ignore[arg-type]

    train.step._record = record
    return refused(world, made, run)


def test_a_row_that_cannot_be_written_stops_all_ranks_and_no_checkpoint_is_ahead_of_it(
    dataset: Path, whole: Path, disk: Path
) -> None:
    run = disk / "run"
    # Else the disk would be full before step 3 is committed.
    made = config(dataset, "checkpoint.background=false")
    messages = run_ranks(2, refused_rows, made, run)
    assert messages[0] == messages[1]
    assert f"{run}/metrics.jsonl cannot be written: No space left on device" in messages[0]
    assert [row[0] for row in losses(run)] == [1, 2, 3]
    assert committed(run) == [3]
    make_room(disk)
    assert run_ranks(2, train_run, config(dataset), run) == ["complete"] * 2
    assert losses(run) == losses(whole)


def refused_on_one(world: World, made: RunConfig, run: Path) -> str:
    """`refused`, with only the last rank unable to write its file."""
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    return refused(world, made, run)


def test_a_rank_that_alone_cannot_write_stops_all(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    messages = run_ranks(3, refused_on_one, config(dataset), run)
    assert len(set(messages)) == 1
    assert "rank-00002.safetensors cannot be written: File too large; raise the" in messages[0]
    assert committed(run) == [] and not step_folder(run, 3).exists()


def test_a_finished_run_on_read_only_or_full_storage_is_complete(
    dataset: Path, whole: Path, disk: Path
) -> None:
    run = disk / "run"
    shutil.copytree(whole, run)
    with read_only(disk):
        assert run_ranks(2, train_run, config(dataset), run) == ["complete"] * 2
    fill(disk)
    assert run_ranks(1, train_run, config(dataset), run) == ["complete"]
    message = run_ranks(2, refused, config(dataset), disk / "new")[1]
    assert "disk/new/attempts/000001.json cannot be written: No space left on device" in message


def headrace(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HEADRACE, *map(str, argv)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_commands_end_in_one_message_and_go_on_when_there_is_room(
    corpus: Path, dataset: Path, disk: Path
) -> None:
    train = ("pretrain", "tiny-cpu", f"data={dataset}", "--run", disk / "run", "steps=4")
    train += ("seq_len=32", "batch_tokens=64", "checkpoint.every=2", "model.num_layers=1")
    train += ("model.hidden_size=64", "model.ffn_size=128")
    commands: list[tuple[tuple[object, ...], int]] = [
        (("prepare", "--input", corpus, "--output", disk / "ds", "--vocab-size", 400), 40),
        (train, 500),
        (("export", disk / "run", disk / "hf"), 100),
    ]
    for command, room in commands:
        fill(disk, leave_kilobytes=room)
        done = headrace(*command)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert str(disk) in line and "make room on that disk, then run the same command" in line
        assert not list(disk.rglob("*.tmp*"))
        make_room(disk)
        done = headrace(*command)
        assert done.returncode == 0, done.stderr
    with read_only(disk):
        done = headrace(*train)
        assert (done.returncode, "is complete: 4 of 4 steps" in done.stderr) == (0, True)
        done = headrace("export", disk / "run", disk / "again")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "Read-only file system; have that file system mounted" in done.stderr


def test_what_a_killed_export_left_is_removed_by_the_next(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    command = [HEADRACE, "export", str(whole), str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as killed:
        try:
            assert killed.stderr is not None
            assert any("comparing it with transformers" in line for line in killed.stderr)
            killed.send_signal(signal.SIGSTOP)
            (left,) = tmp_path.iterdir()
            # Neither one that is alive nor somebody else's goes.
            (tmp_path / "hf.tmp-mine").mkdir()
            _remove_leftovers(out)
            assert left.exists()
        finally:
            killed.kill()
    assert (left / "model.safetensors").exists()
    export(whole, out)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "hf.tmp-mine"}


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    # Weights are last; an export reads nothing else.
    raw[-100] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "manifest.json"])
def test_the_remedies_for_a_damaged_last_checkpoint_work(
    dataset: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flip(step_folder(run, 8) / name)
    with pytest.raises(CheckpointError) as damage:
        export(run, tmp_path / "hf")
    assert name in str(damage.value)
    assert f"remove {step_folder(run, 8)}, and the same training command goes on from step 6" in (
        str(damage.value)
    )
    assert f"`headrace export {run} {tmp_path / 'hf'} --step 6`" in str(damage.value)
    assert export(run, tmp_path / "hf", step=6).step == 6
    shutil.rmtree(step_folder(run, 8))
    assert run_ranks(2, train_run, config(dataset), run) == ["complete"] * 2
    assert export(run, tmp_path / "again").step == 8
    assert losses(run) == losses(whole)
    flip(step_folder(run, 3) / name.replace("00001", "00000"))
    flip(step_folder(run, 6) / name)
    flip(step_folder(run, 8) / name)
    with pytest.raises(CheckpointError, match=r"no other .* is intact: put back a copy .* --run"):
        export(run, tmp_path / "third")


def warnings_of_a_run(world: World, made: RunConfig, run: Path) -> list[str]:
    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    logging.getLogger("train").addHandler(Listener())
    train_run(world, made, run)
    return found


def test_a_checkpoint_that_is_passed_over_is_told_once(
    dataset: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (step_folder(run, 8) / "rank-00001.safetensors").unlink()
    told, silent = run_ranks(2, warnings_of_a_run, config(dataset), run)
    assert silent == []
    (line,) = [line for line in told if "not usable" in line]
    assert "going on from step 6" in line and "rank-00001.safetensors is missing" in line


def test_a_run_is_warned_at_its_start_when_its_checkpoints_will_not_fit(
    dataset: Path, disk: Path
) -> None:
    made = config(dataset, "checkpoint.keep=999")
    told, silent = run_ranks(2, warnings_of_a_run, made, disk / "r")
    assert silent == []
    (line,) = [line for line in told if "checkpoint.keep" in line]
    found = re.match(
        r"a checkpoint takes ([\d,]+) bytes, and checkpoint.keep=999 needs room for 1000: ", line
    )
    assert found is not None
    taken = sum(file.stat().st_size for file in step_folder(disk / "r", 8).iterdir())
    # Blocks, and what is not yet known of the manifest.
    assert taken <= int(found[1].replace(",", "")) <= taken + 6 * 4096


def tune(world: World, made: FinetuneConfig, run: Path) -> str:
    try:
        return finetune_on(world, made, run)
    except RankError as error:
        assert error.exit_code == 1
        return str(error)


def test_a_tuned_folder_that_lost_a_file_or_met_a_full_disk_is_written_again(
    tmp_path: Path, disk: Path
) -> None:
    data = tmp_path / "labelled.csv"
    data.write_text("text,label\n" + "the hill,up\nthe river,down\n" * 8)
    overrides = [f"model={make_folder(tmp_path / 'model')}", f"data={data}", "steps=2"]
    made = load_config(FinetuneConfig, 'task = "classify"\nbatch_size = 4', overrides)
    run = disk / "run"
    assert run_ranks(1, tune, made, run) == ["complete"]
    written = (run / "hf" / "model.safetensors").read_bytes()
    (run / "hf" / "tokenizer.json").unlink()
    (message,) = run_ranks(1, tune, made, run)
    assert f"{run}/hf is not whole, missing or cut is tokenizer.json; remove {run}/hf" in message
    (run / "hf" / "model.safetensors").write_bytes(written[:-1])
    assert "cut is model.safetensors, tokenizer.json" in run_ranks(1, tune, made, run)[0]
    shutil.rmtree(run / "hf")
    fill(disk, leave_kilobytes=len(written) // 2048)
    (message,) = run_ranks(1, tune, made, run)
    assert f"{run}/hf.tmp" in message and "No space left on device; make room" in message
    assert not list(run.glob("hf*"))
    make_room(disk)
    assert run_ranks(1, tune, made, run) == ["complete"]
    assert (run / "hf" / "model.safetensors").read_bytes() == written
    shutil.rmtree(run / "hf")
    flip(next((run / "checkpoints").glob("*/rank-00000.safetensors")))
    (message,) = run_ranks(1, tune, made, run)
    assert "is not what was written\nno other checkpoint of" in message
