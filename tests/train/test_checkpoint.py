"""The commit protocol: a checkpoint is complete or it does not exist, and damage is named."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.durable import read_sealed, write_sealed
from tests.train.checkpoints import SHAPES, inventory, values, write
from train import checkpoint, slices
from train.checkpoint import CheckpointError, committed, completed_steps, open_checkpoint
from train.choice import choose
from train.retention import Retention
from train.slices import write_slices
from train.tables import Tables, columns, flat_table


def test_any_range_reads_back_whatever_the_number_of_writers(tmp_path: Path) -> None:
    for num_ranks in (1, 2, 3, 8):
        written = write(tmp_path, num_ranks, num_ranks=num_ranks)
        saved = open_checkpoint(tmp_path, num_ranks)
        for key in ("param", "exp_avg"):
            for name, shape in SHAPES.items():
                stored = written[f"{key}/{name}"]
                assert np.array_equal(saved.read(name, key), stored.reshape(shape))
                assert np.array_equal(saved.reader.read(name, key, 2, 4), stored[2:6])
        assert (saved.step, saved.scalars, saved.state) == (
            num_ranks,
            {"step": num_ranks},
            {"step": num_ranks},
        )


def test_only_the_chunks_of_a_range_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "CHUNK_BYTES", 64)
    write(tmp_path, 1, num_ranks=1)
    saved = open_checkpoint(tmp_path)
    saved.reader.read("b", "exp_avg", 0, 3)
    assert saved.reader.bytes_read <= 128


def test_every_flipped_bit_of_a_file_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "CHUNK_BYTES", 64)
    write(tmp_path, 1)
    path = tmp_path / "checkpoints/step-000000001/rank-00001.safetensors"
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        with pytest.raises(
            CheckpointError, match=rf"rank-00001.safetensors: chunk {position // 64} "
        ):
            open_checkpoint(tmp_path).verify()


def test_damage_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    folder = tmp_path / "checkpoints/step-000000001"
    path = folder / "rank-00000.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(
        CheckpointError, match=f"has {len(good) - 1} bytes, {len(good)} were written"
    ):
        open_checkpoint(tmp_path).verify()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is missing"):
        open_checkpoint(tmp_path).verify()


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "checkpoints/step-000000001/manifest.json"
    path.write_text(path.read_text().replace('"step":1.0', '"step":2.0'))
    with pytest.raises(CheckpointError, match="does not match the sha256 at its end"):
        open_checkpoint(tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(CheckpointError, match="is damaged or was edited"):
        open_checkpoint(tmp_path)


def test_a_folder_without_manifest_does_not_exist(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (tmp_path / "checkpoints/step-000000020").mkdir()
    assert committed(tmp_path) == [10]
    with pytest.raises(
        CheckpointError, match="no committed checkpoint of step 20; committed steps: 10"
    ):
        open_checkpoint(tmp_path, 20)
    with pytest.raises(CheckpointError, match="holds no committed checkpoint; train it with"):
        open_checkpoint(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "pieces",
    [
        [("a", 0, 29)],
        [("a", 0, 20), ("a", 19, 11)],
        [("a", 0, 10), ("a", 11, 19)],
        [("a", 0, 31)],
        [],
    ],
)
def test_ranges_must_tile(pieces: list[tuple[str, int, int]]) -> None:
    table = columns(flat_table(pieces, {"a": 0}))
    files = [{"tensors": {"param": {"offset": 0, "table": 0}}, "tables": [table]}]
    with pytest.raises(CheckpointError, match="do not tile its 30 elements"):
        Tables({"a": 30}, files).check_tiling()


def test_weights_must_be_there_and_states_be_whole() -> None:
    whole = columns([0, 0, 30, 1, 0, 7])
    part = columns([0, 0, 30, 1, 0, 6])
    where = {"offset": 0, "table": 0}
    for tensors, tables, told in (
        ({"exp_avg": where}, [whole], "param of 'a' .*: covered to 0, nothing after that"),
        ({"param": where, "exp_avg": {**where, "table": 1}}, [whole, part], "exp_avg of 'b' do"),
    ):
        with pytest.raises(CheckpointError, match=told):
            Tables({"a": 30, "b": 7}, [{"tensors": tensors, "tables": tables}]).check_tiling()
    # A state that a parameter does not have at all is none that is missing.
    some: list[dict[str, Any]] = [
        {
            "tensors": {"param": where, "exp_avg": {**where, "table": 1}},
            "tables": [whole, columns([0, 0, 30])],
        }
    ]
    Tables({"a": 30, "b": 7}, some).check_tiling()


def test_a_checkpoint_that_was_copied_over_another_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    newer = tmp_path / "checkpoints/step-000000002"
    shutil.rmtree(newer)
    shutil.copytree(tmp_path / "checkpoints/step-000000001", newer)
    with pytest.raises(
        CheckpointError, match=r"000000002/manifest.json is the manifest of step 1, not of step 2"
    ):
        open_checkpoint(tmp_path)


def test_a_manifest_without_time_still_opens(tmp_path: Path) -> None:
    before = time.time()
    write(tmp_path, 1)
    saved = open_checkpoint(tmp_path)
    assert before <= saved.time <= time.time()
    path = saved.folder / "manifest.json"
    content = {k: v for k, v in read_sealed(path).items() if k != "time"}
    path.unlink()
    write_sealed(path, content)
    os.utime(path, (1e9, 1e9))
    assert open_checkpoint(tmp_path).time == 1e9
    open_checkpoint(tmp_path).verify()


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "checkpoints/step-000000000").mkdir()
    retired = checkpoint.retire(tmp_path, Retention(2), newest=4)
    assert committed(tmp_path) == [4, 3]
    assert retired == [tmp_path / f"checkpoints/step-00000000{step}" for step in (0, 1, 2)]
    shutil.rmtree(retired[1])
    checkpoint.remove(retired)
    assert not any(map(Path.exists, retired))


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EBUSY])
def test_a_folder_that_somebody_reads_in_is_removed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """On NFS a file that is open keeps a name there, .nfs..., until it is closed."""
    for step in (1, 2, 3):
        write(tmp_path, step)
    real = shutil.rmtree

    def remove(folder: Path) -> None:
        if folder.name == "step-000000001":
            raise OSError(code, os.strerror(code), str(folder))
        real(folder)

    retired = checkpoint.retire(tmp_path, Retention(1), newest=3)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove)
        checkpoint.remove(retired)
    assert checkpoint.uncommitted(tmp_path) == retired[:1]
    checkpoint.remove(checkpoint.uncommitted(tmp_path))
    assert committed(tmp_path) == [3] and not retired[0].exists()


def test_what_somebody_has_put_beside_the_checkpoints_stays(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    copy, packed = (tmp_path / f"checkpoints/step-000000001.{end}" for end in ("good", "tar"))
    shutil.copytree(tmp_path / "checkpoints/step-000000001", copy)
    packed.touch()
    assert checkpoint.uncommitted(tmp_path) == []
    checkpoint.remove(checkpoint.retire(tmp_path, Retention(1), newest=2))
    assert committed(tmp_path) == [2]
    assert (copy / "manifest.json").exists() and packed.exists()


@pytest.mark.parametrize("unseen", ["checkpoints", "checkpoints/step-000000002/manifest.json"])
def test_a_checkpoint_that_nobody_can_look_for_is_not_taken_for_garbage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unseen: str
) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    away = [str(tmp_path / unseen)]

    def refuses(name: str) -> Any:
        real = getattr(os, name)

        def ask(path: Any, *rest: Any, **options: Any) -> Any:
            # Once: the next look may succeed.
            if str(path) in away:
                away.clear()
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *rest, **options)

        return ask

    for name in ("scandir", "listdir", "stat"):
        monkeypatch.setattr(os, name, refuses(name))
    with pytest.raises(CheckpointError, match=r"cannot be looked into: Permission denied; mend"):
        checkpoint.retire(tmp_path, Retention(1), newest=2)
    assert committed(tmp_path) == [2, 1]


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = checkpoint.begin(tmp_path, 1)
    entry = write_slices(folder, 0, {"param": [np.zeros(1)]}, {"param": [("a", 0, 1)]})
    checkpoint.commit(
        folder,
        step=1,
        parameters=inventory({"a": (1,)}),
        scalars={},
        state={},
        files=[{**entry, "name": "../x"}],
    )
    with pytest.raises(
        CheckpointError, match=r"manifest\.json holds what no headrace writes: files\.0\.name"
    ):
        open_checkpoint(tmp_path)


WRITER = """
import sys
from pathlib import Path
from data.durable import read_sealed, write_sealed
from tests.train.checkpoints import write
from train.checkpoint import remove, retire
from train.retention import Retention
step = int(sys.argv[2])
while True:
    step += 1
    write(Path(sys.argv[1]), step)
    remove(retire(Path(sys.argv[1]), Retention(2), newest=step))
    print(step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    reached = 0
    moments = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(reached)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout:
            announced = int(process.stdout.readline())
            time.sleep(moments.uniform(0.0, 0.05))
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        process.wait()
        announced = int(rest[-1]) if rest else announced
        reached = committed(tmp_path)[0]
        assert reached >= announced
        saved = open_checkpoint(tmp_path)
        saved.verify()
        assert np.array_equal(saved.read("b"), values(reached)["param/b"])
        manifest = json.loads((saved.folder / "manifest.json").read_text())
        assert manifest["state"] == {"step": reached}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"state":{"step":2}', '"state":{"x":' + "[" * 50_000 + "]" * 50_000 + "}", "recursion"),
        ('"state":{"step":2}', '"state":{"step":' + "9" * 5000 + "}", "integer string"),
        ('"shape":[6,5]', f'"shape":[{2**45}]', "parameters.a: 30 of its 35184372088832 elements"),
    ],
)
def test_a_seal_does_not_make_nonsense_a_manifest(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    path = tmp_path / "checkpoints/step-000000002/manifest.json"
    body = json.dumps(read_sealed(path), sort_keys=True, separators=(",", ":"))
    assert old in body
    changed = body.replace(old, new).encode()
    seal = hashlib.sha256(changed).hexdigest()
    path.write_bytes(changed[:-1] + f',"sha256":"{seal}"}}\n'.encode())
    chosen = choose(tmp_path)
    assert chosen.taken is not None and chosen.taken.step == completed_steps(tmp_path) == 1
    assert f"{path} holds what no headrace writes" in chosen.passed_over[0].reason
    assert told in chosen.passed_over[0].reason


def test_no_memory_is_taken_for_what_is_in_no_file(tmp_path: Path) -> None:
    """Shape, tables and sizes agree, and all of them are of a file that is not there."""
    write(tmp_path, 1, num_ranks=1)
    path = tmp_path / "checkpoints/step-000000001/manifest.json"
    content = read_sealed(path)
    huge = 2**45
    content["parameters"]["b"]["shape"] = [huge]
    (entry,) = content["files"]
    entry["tables"] = [[0, 0, 30, 1, 0, huge]]
    entry.update(bytes=2**50, chunk_bytes=2**50, chunks="0" * 16)
    write_sealed(path, content)
    with pytest.raises(CheckpointError, match=rf"has \d+ bytes, {2**50} were written"):
        open_checkpoint(tmp_path).read("b")
    entry.update(bytes=(path.parent / entry["name"]).stat().st_size)
    content["parameters"]["b"]["shape"], entry["tables"] = [7], [[0, 0, 30, 1, 0, 7]]
    write_sealed(path, content)
    with pytest.raises(CheckpointError, match=r"chunk 0 .* is not what was written"):
        open_checkpoint(tmp_path).verify()
