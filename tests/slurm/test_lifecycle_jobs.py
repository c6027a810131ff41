"""A whole life cycle on a real Slurm, from one TOML file: text to scores, and what a second
submission leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.config import PrepareConfig
from data.prepare import prepare
from tests.data.prepared import tree
from tests.slurm.cluster import Cluster, cluster
from tests.train.test_pretrain import RECIPE

LIFECYCLE = """
[prepare]
inputs = ["CORPUS"]
output = "work/dataset"
options = ["--vocab-size=400", "--val-fraction=0.1", "--dedup=exact", "--shuffle"]
tasks = 3
slurm = { time = "30", cpus_per_task = 1, mem_per_cpu = "1G" }
[pretrain]
recipe = "small.toml"
output = "work/run"
overrides = ["steps=20", "eval.samples=2", "zero.stage=2"]
slurm = { nodes = 2, gpus_per_node = 0, time = "30" }
[export]
output = "work/model"
slurm = { time = "30" }
[finetune]
recipe = "classify"
data = "labelled.csv"
output = "work/tuned"
overrides = ["batch_size=16", "steps=20", "seq_len=32"]
slurm = { gpus_per_node = 0, time = "30" }
[evaluate]
data = "labelled.csv"
output = "work/scores"
options = ["--split=val"]
slurm = { gpus_per_node = 0, cpus_per_task = 1, time = "30" }
"""
STAGES = ("prepare", "pretrain", "export", "finetune", "evaluate")
pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as made:
        (made.folder / "small.toml").write_text(RECIPE)
        (made.folder / "life.toml").write_text(LIFECYCLE.replace("CORPUS", str(corpus)))
        lines = [f"{word} {n},{word}s" for n in range(60) for word in ("import", "class")]
        (made.folder / "labelled.csv").write_text("\n".join(["text,label", *lines]) + "\n")
        yield made


def submit(slurm: Cluster) -> dict[str, Any]:
    """`headrace submit life.toml`; what became of each stage."""
    rows = json.loads(slurm.run("headrace", "submit", "life.toml", "--json"))
    assert [row["stage"] for row in rows] == list(STAGES)
    return {row["stage"]: row for row in rows}


def ends(slurm: Cluster, link: dict[str, Any]) -> None:
    """Wait for a stage's job, and see that it ended well."""
    state = slurm.wait(link["job"], seconds=300)
    folder = Path(link["folder"])
    logs = [*folder.glob("logs/*"), *folder.with_name(f"{folder.name}.stage").glob("*.out")]
    assert state == "COMPLETED", "\n".join(log.read_text() for log in logs)


@pytest.fixture(scope="module")
def first(slurm: Cluster) -> dict[str, Any]:
    """The first submission, seen to its end."""
    links = submit(slurm)
    for link in links.values():
        assert link["state"] == "submitted"
        ends(slurm, link)
    return links


def test_arrays_on_several_nodes_leave_the_bytes_of_a_local_preparation(
    slurm: Cluster, first: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    config = PrepareConfig.model_validate(
        {"vocab_size": 400, "val_fraction": 0.1, "shuffle": True, "clean": {"dedup": "exact"}}
    )
    prepare([str(corpus)], tmp_path / "local", config, workers=1)
    assert tree(slurm.folder / "work" / "dataset") == tree(tmp_path / "local")
    logs = list((slurm.folder / "work" / "dataset.stage").glob("headrace-read-*.out"))
    assert len(logs) == 3, "a log per task"


def test_the_life_cycle_comes_to_its_end(slurm: Cluster, first: dict[str, Any]) -> None:
    scores = json.loads((slurm.folder / "work" / "scores" / "evaluation.json").read_text())
    assert 0 <= scores["accuracy"] <= 1 and set(scores["per_class"]) == {"imports", "classs"}
    provenance = json.loads((slurm.folder / "work" / "model" / "headrace.json").read_text())
    assert provenance["step"] == 20
    slurm.until(lambda: slurm.commands() == [], "end of all processes", seconds=30)


def test_what_is_unchanged_is_skipped_and_a_changed_evaluation_runs_alone(
    slurm: Cluster, first: dict[str, Any]
) -> None:
    assert [link["state"] for link in submit(slurm).values()] == ["skipped"] * 5
    path = slurm.folder / "life.toml"
    path.write_text(path.read_text().replace("--split=val", "--split=all"))
    links = submit(slurm)
    assert [link["state"] for link in links.values()] == ["skipped"] * 4 + ["submitted"]
    ends(slurm, links["evaluate"])
    scores = json.loads((slurm.folder / "work" / "scores" / "evaluation.json").read_text())
    assert sum(scores["per_class"][label]["support"] for label in scores["per_class"]) == 120


def test_a_run_that_was_stopped_breaks_the_chain(slurm: Cluster, first: dict[str, Any]) -> None:
    """The job of a stopped run leaves with 0, and nothing is exported."""
    run = slurm.folder / "other" / "run"
    run.mkdir(parents=True)
    (run / "STOP").touch()
    text = (slurm.folder / "life.toml").read_text()
    (slurm.folder / "stop.toml").write_text(
        text.replace("work/", "other/").replace("other/dataset", "work/dataset")
    )
    rows = json.loads(slurm.run("headrace", "submit", "stop.toml", "--json"))
    links = {row["stage"]: row for row in rows}
    assert links["prepare"]["state"] == "skipped"
    assert slurm.wait(links["pretrain"]["job"]) == "COMPLETED"
    assert slurm.wait(links["export"]["job"]) == "FAILED"
    assert slurm.wait(links["finetune"]["job"]) == "CANCELLED"
    assert slurm.wait(links["evaluate"]["job"]) == "CANCELLED"
    log = next((slurm.folder / "other" / "model.stage").glob("*.out")).read_text()
    assert f"{run} is not complete (the end of its last attempt: none)" in log
