"""What a life cycle's file may say, and what is refused before anything is submitted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from launcher.cli import run_command
from launcher.lifecycle import load_lifecycle
from launcher.site import Site
from launcher.stages import resolve
from tests.launcher.chains import LIFECYCLE, Chain
from tests.launcher.test_lifecycle import chain

__all__ = ["chain"]  # a fixture


@pytest.mark.parametrize("output", ["dataset", "run", "model", "tuned", "scores"])
def test_an_output_that_is_a_file_is_refused(chain: Chain, output: str) -> None:
    (chain.folder / "work").mkdir()
    (chain.folder / "work" / output).touch()
    with pytest.raises(ValueError, match=rf"\] output: work/{output} is a file, no folder; name"):
        chain.submit()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[export]", "[exports]", r"life\.toml: unknown stage 'exports'; did you mean 'export'\?"),
        ("tasks = 2", "task = 2", r"life\.toml \[prepare\]: unknown key 'task'; did you mean 'ta"),
        ("nodes = 2, ", "nods = 2, ", r"unknown key 'slurm\.nods'; did you mean 'slurm\.nodes'\?"),
        ("lead = 60", "cpus_per_task = 2", r"\[finetune\]: slurm\.cpus_per_task is for prepare and "
                                           r"evaluate alone; leave it out"),
        ("lead = 60", "preflight = true", r"slurm\.preflight is for pretrain alone"),
        ("lead = 60", "min_nodes = 1", r"slurm\.min_nodes is for pretrain alone"),
        ("lead = 60", "nodes = 2", r"\[finetune\]: slurm\.nodes = 2, but only pretrain runs"),
        ("work/scores", "work/tuned", r"two stages write work/tuned; give each an output of its"),
        ("work/scores", "work/../work/tuned/", r"two stages write work/tuned; give each an output"),
        ('["corpus"]', "[]", r"\[prepare\] inputs: it is empty; name files or folders of text"),
        ('["corpus"]', '["@gone"]', r"gone"),
        ("--vocab-size=400", "--vocab-sizee=400", r"\[prepare\] options: No such option: --voc"),
        ("--vocab-size=400", "--vocab-size=many", r"\[prepare\] options: Invalid value for '--vo"),
        ("--split=val", "--split=tset", r"\[evaluate\] options: Invalid value .*'tset' is not one"),
        ("--split=val", "--help", r"\[evaluate\] options: --help makes nothing; see `headrace ev"),
        ('output = "work/model"', 'output = "work/model"\noptions = ["--dtype", "bf17"]',
         r"\[export\] options: Invalid value for '--dtype'"),
        ("work/scores", "", r"output: '' names no new folder; write one such as work/NAME"),
        ("work/scores", "/", r"output: '/' names no new folder"),
        ("work/scores", "work/..", r"output: 'work/\.\.' names no new folder"),
        ("work/scores", "s3://bucket/x", r"output: s3://bucket/x is no path; jobs write to a disk"),
        ("[evaluate]", "[[evaluate]]", r"life\.toml: evaluate = \[.*\] is no table; write \[eva"),
        ("steps=8", "step=8", r"tiny-cpu: unknown key 'step'; did you mean 'steps'\?"),
        ("labelled.csv", "gone.csv", r"\[finetune\] data: there is no .*/gone\.csv, and no stage"),
        ('["corpus"]', '["gone"]', r"--input gone: no such file or folder"),
        ('["corpus"]', '["-"]', r"\[prepare\] inputs: - is standard input, which jobs do not"),
        (LIFECYCLE[: LIFECYCLE.index("[pretrain]")], "", r"no dataset is named; write data="),
        ('time = "30", lead', 'time = "2", lead', r"--time 2 is 120 s: the job is asked to save"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_run_is_refused_before_anything_is_submitted(
    chain: Chain, old: str, new: str, message: str
) -> None:
    chain.change(old, new)
    with pytest.raises(ValueError, match=message) as refused:
        chain.submit()
    assert getattr(refused.value, "exit_code", None) == 2
    assert chain.submitted == []


def test_another_key_of_data_leaves_the_dataset_to_prepare(chain: Chain) -> None:
    chain.change('"steps=8"', '"steps=8", "data.num_workers=2"')
    stages = {stage.name: stage for stage in resolve(load_lifecycle(Path("life.toml")), Site())}
    assert f" data={chain.folder}/work/dataset steps=8 data.num" in stages["pretrain"].script


def test_a_long_word_is_no_file(chain: Chain) -> None:
    chain.change("--vocab-size=400", "--symbol=" + "x" * 300)
    chain.change("--split=val", "--text-column=" + "x" * 300)
    stages = resolve(load_lifecycle(Path("life.toml")), Site())
    assert list(stages[0].origin.inputs) == ["corpus/a.txt"]


def test_an_output_within_another_is_the_inner_stage_s(chain: Chain) -> None:
    """What is made from it is made anew when the inner stage's options change."""
    chain.change("work/model", "work/run/hf")
    stages = {stage.name: stage for stage in resolve(load_lifecycle(Path("life.toml")), Site())}
    assert list(stages["finetune"].origin.upstream) == ["export"]


@pytest.mark.parametrize(
    ("asked", "site", "told"),
    [("", 1, 1), ("preflight = false, ", 1, 0), ("preflight = true, ", 0, 1)],
)
def test_a_stage_may_differ_from_its_site(
    chain: Chain, asked: str, site: int, told: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chain.change("nodes = 2, ", f"nodes = 2, {asked}")
    (chain.folder / "site.toml").write_text("preflight = true\n" * site)
    argv = ["submit", "life.toml", "--dry-run", "--json", "--site", "site.toml"]
    run_command(argv, standalone=False)
    scripts = {row["stage"]: row["script"] for row in json.loads(capsys.readouterr().out)}
    assert f"PREFLIGHT=${{PREFLIGHT:-{told}}}\n" in scripts["pretrain"]
    assert "PREFLIGHT" not in scripts["finetune"]


def test_what_a_file_says_is_no_option(chain: Chain) -> None:
    with pytest.raises(
        typer.BadParameter, match=r"life\.toml is a life cycle, in which each stage has its"
    ):
        chain.submit("--nodes", "3")
