"""`headrace replay` and `headrace guard`, as commands: what they print, and how they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launcher.test_cli import headrace
from tests.ranks import run_ranks
from tests.test_architecture import run_clean
from tests.train.test_pretrain import config, train_run


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven steps on two ranks."""
    folder = tmp_path_factory.mktemp("run") / "run"
    run_ranks(2, train_run, config(dataset, "steps=7", "eval.samples=1"), folder)
    return folder


def test_replay_starts_as_many_ranks_as_there_were(run: Path, tmp_path: Path) -> None:
    attempts = (run / "attempts.jsonl").read_text()
    done = headrace("replay", run, "--step", 6, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{run} step 6, recomputed from the checkpoint of step 3 on 2 ranks: loss, gradient norm "
        "and data_hash and the state in its checkpoint are equal, bit for bit\n"
    )
    assert (run / "attempts.jsonl").read_text() == attempts


def copy_of(run: Path, other: Path, *, but: str) -> Path:
    """A run with the files of another, but for one."""
    other.mkdir()
    for path in run.iterdir():
        if path.name != but:
            (other / path.name).symlink_to(path)
    return other


def test_replay_leaves_with_1_when_something_differs(run: Path, tmp_path: Path) -> None:
    other = copy_of(run, tmp_path / "other", but="metrics.jsonl")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["step"] == 5 and "loss" in row:
            row["loss"] += 1e-15
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = headrace("replay", other, "--step", 5, "--json", cwd=tmp_path)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["differences"][0].startswith("step 5: loss ")
    assert f"error: {other}: the replay is not what was recorded" in done.stderr
    assert "Traceback" not in done.stderr
    assert headrace("replay", run, "--step", 9, cwd=tmp_path).returncode == 2


def test_guard_judges_in_hindsight_without_torch(run: Path, tmp_path: Path) -> None:
    done = headrace("guard", run, "guard.outlier=skip", cwd=tmp_path)
    assert done.stdout == (
        "7 steps: the guard would have objected to 0\n"
        "121 good steps more have to be known before anything is out of the ordinary; a smaller "
        "guard.window takes fewer\n"
    )
    other = copy_of(run, tmp_path / "other", but="attempts.jsonl")
    start = json.loads((run / "attempts.jsonl").read_text().splitlines()[0])
    start["config"]["guard"]["skip_steps"] = [2]
    (other / "attempts.jsonl").write_text(json.dumps(start) + "\n")
    done = headrace("guard", other, "--json", cwd=tmp_path)
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding == {
        "step": 2,
        "decision": "skip",
        "reason": "listed in guard.skip_steps",
        "samples": [12, 24],
    }
    refused = headrace("guard", run, "guard.sigma=3", cwd=tmp_path)
    assert refused.returncode == 2
    assert "did you mean 'guard.sigmas'?" in refused.stderr
    run_clean(f"""
        sys.argv = ["headrace", "guard", {str(run)!r}]
        from launcher.cli import main
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
        check("guard")
    """)
