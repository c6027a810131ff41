"""What a resume takes from the mirror, and that it never goes on as if whole copies were none."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import data.store
from data.store import FolderStore
from tests.ranks import run_ranks
from tests.train.checkpoints import values, write
from train import patience
from train.attempts import begin_attempt
from train.checkpoint import CheckpointError, committed, open_checkpoint, step_folder
from train.config import RunConfig
from train.events import record
from train.mirror import Mirror
from train.opening import _check_history
from train.restore import mend, restore_newer
from train.state import load_newest
from train.world import World


@dataclass(frozen=True)
class Trouble:
    """What a place does to calls whose path has `name` in it."""

    name: str = "nothing"
    code: int = errno.EACCES
    times: int = 99
    call: str = "read"


@contextmanager
def troubled(trouble: Trouble) -> Iterator[None]:
    left = [trouble.times]

    def fail(path: str) -> None:
        if trouble.name in path and left[0]:
            left[0] -= 1
            raise OSError(trouble.code, os.strerror(trouble.code))

    def read(self: FolderStore, name: str, first: int = 0) -> Iterator[bytes]:
        for number, piece in enumerate(original_read(self, name, first)):
            if number or first or trouble.code != errno.EIO:
                fail(self.path(name))
            yield piece

    def write(self: FolderStore, name: str, pieces: Any) -> None:
        fail(self.path(name))
        original_write(self, name, pieces)

    def names(self: FolderStore) -> list[str]:
        fail(self.path(""))
        return original_names(self)

    original_read, original_write = FolderStore.read, FolderStore.write
    original_names = FolderStore.names
    calls = {"read": read, "write": write, "names": names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "PAUSES", (0.0, 0.0))
        patch.setattr(data.store, "BLOCK_BYTES", 100)
        patch.setattr(FolderStore, trouble.call, calls[trouble.call])
        yield


def started(world: World, cases: list[tuple[Path, Path, Trouble]]) -> list[str]:
    """What ends the start of each run on this rank, before an engine is needed; or nothing."""
    told = []
    for run, far, trouble in cases:
        with troubled(trouble):
            try:
                restore_newer(world, run, str(far))
                told.append("")
            except ValueError as error:
                told.append(f"{type(error).__name__}: {error}")
    return told


def taken(world: World, cases: list[tuple[Path, Path, Trouble]]) -> list[str]:
    """Why a run of which no manifest is whole cannot be loaded: no engine is asked."""
    told = []
    for run, far, trouble in cases:

        def mending(step: int, run: Path = run, far: Path = far) -> bool:
            return mend(world, run, str(far), step)

        engine: Any = None
        with troubled(trouble), pytest.raises(ValueError) as refused:
            load_newest(engine, world, run, mend=mending)
        told.append(f"{type(refused.value).__name__}: {refused.value}")
    return told


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def mirrored(folder: Path, name: str, *, stays: int = 0) -> tuple[Path, Path]:
    """A run that has lost all checkpoints but the first so many, and its mirror, which has 10 and
    20.
    """
    run, far = folder / name, folder / "far"
    for step in (10, 20):
        write(run, step, num_ranks=2)
        (run / "config.json").write_text("{}")
        Mirror(str(far), run).copy_out(step)
    for step in (10, 20)[stays:]:
        shutil.rmtree(step_folder(run, step))
    return run, far


def test_what_may_be_whole_is_never_given_up(tmp_path: Path) -> None:
    rank_1 = "step-000000020/rank-00001"
    troubles = {
        "refused": Trouble(f"far/refused/{rank_1}"),
        "older": Trouble(f"far/older/{rank_1}", errno.EIO),
        "full": Trouble("full/checkpoints/step-000000020/rank", errno.ENOSPC, call="write"),
        "listed": Trouble("far/listed", call="names"),
        "away": Trouble("far/away", call="names"),
        "passing": Trouble(f"far/passing/{rank_1}", errno.EIO, 2),
        "damaged": Trouble(),
        "hurt": Trouble(),
        "left": Trouble(),
        "torn": Trouble(),
    }
    cases = {}
    for name, trouble in troubles.items():
        run, far = mirrored(tmp_path, name, stays=int(name in ("older", "away", "hurt", "torn")))
        if name in ("damaged", "hurt"):
            for step in (10, 20):
                flip(far / name / f"step-0000000{step}/rank-00001.safetensors")
        if name == "torn":
            (far / "torn/config.json").write_text('{"id": ')
        if name == "left":
            record(run, "rollback", steps=[5])
        cases[name] = (run, far, trouble)
    both = run_ranks(2, started, list(cases.values()))
    told, second = (dict(zip(cases, answers, strict=True)) for answers in both)
    assert told == second
    far = tmp_path / "far"
    for name in ("refused", "older"):
        assert told[name].startswith(
            f"MirrorError: step 20 is in the mirror {far / name} and cannot be copied back: the "
            f"mirror {far / name} cannot be read: "
        )
        assert told[name].endswith(
            "Mend that and run the same command again; with checkpoint.mirror= (no mirror) it goes "
            "on from an older checkpoint, if the run has one"
        )
    assert "No space left on device" in told["full"] and told["full"].startswith("MirrorError: ")
    assert f"the mirror {far / 'listed'} cannot be read: PermissionError" in told["listed"]
    assert told["damaged"].startswith(
        f"CheckpointError: {tmp_path / 'damaged'} has no usable checkpoint, and the mirror {far} "
        f"no whole copy:\n  step 20: {far}/damaged/step-000000020/rank-00001.safetensors: chunk 0"
    )
    assert told["damaged"].endswith(
        "\nput a whole copy of one of them back, or train again from step 0 with another --run"
    )
    assert {name for name in told if not told[name]} == {"away", "passing", "hurt", "left", "torn"}
    steps = {name: committed(run) for name, (run, _, _) in cases.items()}
    assert steps == {name: [] for name in cases} | {
        "older": [10],
        "away": [10],
        "hurt": [10],
        "torn": [10],
        "passing": [20],
    }
    assert (open_checkpoint(tmp_path / "passing", 20).read("b") == values(20)["param/b"]).all()
    for name in cases:
        assert Mirror(str(far), tmp_path / name).steps() == [20, 10]


def test_a_checkpoint_that_cannot_be_mended_is_told_with_its_own_damage_first(
    tmp_path: Path,
) -> None:
    troubles = {
        "hurt": Trouble(),
        "away": Trouble("far/away", call="names"),
        "refused": Trouble("far/refused/step-000000020/rank"),
    }
    cases = []
    for name, trouble in troubles.items():
        run, far = mirrored(tmp_path, name, stays=2)
        for step in (10, 20):
            flip(step_folder(run, step) / "manifest.json")
            if name == "hurt":
                (far / name / f"step-0000000{step}/rank-00000.safetensors").unlink()
        cases.append((run, far, trouble))
    ((hurt, away, refused),) = run_ranks(1, taken, cases)
    for name, told in (("hurt", hurt), ("away", away)):
        run, far = tmp_path / name, tmp_path / "far" / name
        copy = f"{far}/step-000000020/rank-00000.safetensors is missing"
        problem = copy if name == "hurt" else f"the mirror {far} cannot be read: Permission"
        assert told.startswith(
            f"CheckpointError: no checkpoint of {run} is usable:\n  step 20: "
            f"{step_folder(run, 20)}/manifest.json is damaged or was edited: "
        )
        assert f"; the mirror is no help: {problem}" in told
        assert told.endswith(
            "\nput a whole copy of one of them back, or train again from step 0 with another --run"
        )
    # It may be whole: nobody goes on from step 10.
    assert refused.startswith(f"MirrorError: step 20 is in the mirror {tmp_path}/far/refused and")


def test_a_run_that_went_on_from_a_step_has_completed_it(tmp_path: Path) -> None:
    config = RunConfig(steps=100)
    _check_history(tmp_path)
    begin_attempt(tmp_path, 1, world_size=1, resumed_from=20, config=config, machine={})
    with pytest.raises(CheckpointError, match=r"recorded step 20, but .* with another --run"):
        _check_history(tmp_path)
    write(tmp_path, 20)
    _check_history(tmp_path)


def test_a_folder_that_may_not_be_read_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        FolderStore(tmp_path).names()
