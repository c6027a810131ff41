"""What killed writers have left in a run: no reader takes it for content, its owner removes it."""

from __future__ import annotations

from pathlib import Path

from data.durable import is_leftover
from tests.data.test_writers import LEFT, leave
from tests.ranks import run_ranks
from tests.train.test_pretrain import config, losses, train_many, train_run
from train.checkpoint import committed, step_folder
from train.choice import choose
from train.exclusion import exclude, excluded
from train.listing import list_checkpoints, verify
from train.run import attempts, open_run


def leftovers(*folders: Path) -> list[str]:
    return [path.name for folder in folders for path in folder.iterdir() if is_leftover(path.name)]


def test_a_resume_takes_no_leftover_for_content_and_removes_it(
    dataset: Path, tmp_path: Path
) -> None:
    run, plain, far = tmp_path / "run", tmp_path / "plain", tmp_path / "far"
    made = config(dataset, f"checkpoint.mirror={far}")
    assert run_ranks(1, train_many, [(config(dataset), plain, None), (made, run, 5)]) == [
        ["complete", "stopped"]
    ]
    exclude(run, ["n1"])
    assert leave(run) > 10 and leave(far) > 4
    # A save that was killed before its commit, with the draft of its manifest.
    step_folder(run, 7).mkdir()
    (step_folder(run, 7) / f"manifest.json{LEFT}").write_bytes(b"{")
    before = committed(run)
    assert before == [5, 3]
    taken = choose(run).taken
    assert taken is not None and taken.step == 5
    assert [row.step for row in list_checkpoints(run).checkpoints if row.problem is None] == [
        5,
        3,
        5,
        3,
    ]
    assert verify(run).damages == () and verify(run).steps == (5, 3)
    assert excluded(run) == ["n1"] and len(attempts(run)) == 2
    assert run_ranks(1, train_run, made, run) == ["complete"]
    assert losses(run) == losses(plain)
    assert leftovers(run, run / "attempts", run / "logs", far / "run") == []
    assert leftovers(step_folder(run, 8), far / "run" / step_folder(run, 8).name) == []
    assert not step_folder(run, 7).exists()


def test_a_start_that_was_killed_may_begin_again(dataset: Path, tmp_path: Path) -> None:
    """Between the folder and the name of the config there is only a draft of it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"config.json{LEFT}").write_text("{")
    open_run(tmp_path / "run", config(dataset), {})
    assert (tmp_path / "run" / "config.json").is_file()
