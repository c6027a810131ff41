"""A life cycle as a chain: what is submitted, in which order, and what is left out the second time.

Stand-ins play Slurm and the commands (tests/launcher/chains.py);
tests/slurm/test_lifecycle_jobs.py does it in earnest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import run_command
from launcher.lifecycle import STAGES
from launcher.template import FOLDER, SlurmError
from tests.launcher.chains import LIFECYCLE, Chain


@pytest.fixture
def chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Chain:
    made = Chain(tmp_path, capsys)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STATE", str(made.state))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("NODE_LOCAL", str(tmp_path))
    return made


def test_each_stage_comes_after_the_one_before(chain: Chain) -> None:
    assert chain.submit() == [
        ["prepare", "job 6"], ["pretrain", "job 7"], ["export", "job 8"], ["finetune", "job 9"],
        ["evaluate", "job 10"],
    ]  # fmt: skip
    assert chain.submitted == [
        "1 prepare.sbatch plan after none", "2 prepare.sbatch read after 1",
        "3 prepare.sbatch survey after 2", "4 prepare.sbatch tokenizer after 3",
        "5 prepare.sbatch encode after 4", "6 prepare.sbatch commit after 5",
        "7 pretrain.sbatch  after 6", "8 export.sbatch  after 7", "9 finetune.sbatch  after 8",
        "10 evaluate.sbatch  after 9",
    ]  # fmt: skip
    script = (chain.folder / "work/run/logs/pretrain.sbatch").read_text()
    assert f"set -- tiny-cpu data={chain.folder}/work/dataset steps=8 " in script
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --nodelist=n[1-4]\n" in script
    script = (chain.folder / "work/dataset.stage/prepare.sbatch").read_text()
    assert "#SBATCH --partition=cpu\n" in script and "#SBATCH --mem-per-cpu=1G\n" in script
    assert "TASKS=2\n" in script
    script = (chain.folder / "work/tuned/logs/finetune.sbatch").read_text()
    assert "#SBATCH --signal=B:USR1@60\n" in script
    model, data = chain.folder / "work/model", chain.folder / "labelled.csv"
    assert f"set -- classify model={model} data={data}\n" in script


def test_what_is_unchanged_is_skipped(chain: Chain) -> None:
    chain.submit()
    (chain.folder / "corpus" / "a.txt").write_text("some text")  # another date, the same content
    (chain.folder / "labelled.csv").touch()
    chain.change('time = "30", partition = "cpu"', 'time = "60"')
    chain.change('"steps=8"', '"steps=8", "checkpoint.keep=7"')  # changes no number
    names = ("prepare", "pretrain", "export", "finetune", "evaluate")
    assert chain.submit() == [[name, "skipped: unchanged"] for name in names]
    assert chain.submitted == []


def test_a_changed_evaluation_runs_alone(chain: Chain) -> None:
    chain.submit()
    chain.change("--split=val", "--split=train")
    links = chain.submit()
    assert [told for _, told in links] == ["skipped: unchanged"] * 4 + ["job 11"]
    assert chain.submitted == ["11 evaluate.sbatch  after none"]


def test_a_stage_that_did_not_end_well_is_made_again_with_what_follows(chain: Chain) -> None:
    chain.submit()
    with (chain.folder / "work/run/attempts.jsonl").open("a") as rows:
        rows.write('{"outcome": "stopped"}\n')
    (chain.folder / "work/scores/evaluation.json").unlink()
    assert chain.submit()[1:] == [
        ["pretrain", "job 11"], ["export", "skipped: unchanged"],
        ["finetune", "skipped: unchanged"], ["evaluate", "job 12"],
    ]  # fmt: skip
    assert chain.submitted[1] == "12 evaluate.sbatch  after 11"


def test_a_job_that_is_in_the_queue_is_not_submitted_again(chain: Chain) -> None:
    (chain.state / "wait").touch()
    chain.submit()
    rows = [f"{job}|PENDING|Dependency|30|0||x|" for job in (6, 7)]
    (chain.state / "queue").write_text("\n".join(rows) + "\n")
    assert chain.submit()[:3] == [
        ["prepare", "job 6 (in the queue already)"], ["pretrain", "job 7 (in the queue already)"],
        ["export", "job 11"],
    ]  # fmt: skip
    assert chain.submitted[0] == "11 export.sbatch  after 7"


def wait_in_queue(chain: Chain, *jobs: int) -> None:
    """Let squeue name these jobs of the first chain that was submitted."""
    logs = dict.fromkeys(range(1, 7), "work/dataset.stage/%x-%A_%a.out")
    logs |= {7: "work/run/logs/slurm-%j.out", 8: "work/model.stage/slurm-%j.out"}
    logs |= {9: "work/tuned/logs/slurm-%j.out", 10: "work/scores.stage/slurm-%j.out"}
    rows = [f"{job}|PENDING|Dependency|30|0||{chain.folder}/{logs[job]}|" for job in jobs]
    (chain.state / "queue").write_text("".join(f"{row}\n" for row in rows))


def test_a_stage_that_slurm_refuses_is_named_with_what_stays_in_the_queue(chain: Chain) -> None:
    (chain.state / "wait").touch()
    sbatch = chain.folder / "bin" / "sbatch"
    taken = sbatch.read_text()
    refuses = 'case "$*" in *export.sbatch*) echo "too many processors" >&2; exit 1 ;; esac\n'
    sbatch.write_text(taken.replace("\n", f"\n{refuses}", 1))
    message = (
        r"^\[export\] `sbatch .*export\.sbatch` left with 1: too many processors; in the queue "
        r"stay prepare \(job 6\), pretrain \(job 7\); mend the stage and submit the file again: "
        r"it goes on from here$"
    )
    with pytest.raises(SlurmError, match=message):
        chain.submit()
    sbatch.write_text(taken)
    wait_in_queue(chain, 6, 7)
    assert [told for _, told in chain.submit()] == [
        "job 6 (in the queue already)", "job 7 (in the queue already)", "job 8", "job 9", "job 10",
    ]  # fmt: skip


def test_folders_stand_below_each_other(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    (chain.state / "wait").touch()
    chain.submit()
    wait_in_queue(chain, 6)
    run_command(["submit", "life.toml"], standalone=False)
    lines = capsys.readouterr().out.splitlines()
    assert "(in the queue already)" in lines[0]
    assert len({line.index(str(chain.folder)) for line in lines}) == 1


def test_a_file_that_was_edited_while_its_jobs_wait_is_not_submitted_beside_them(
    chain: Chain,
) -> None:
    """Two jobs would write one output, and the later one's record would stand for both."""
    (chain.state / "wait").touch()
    chain.submit()
    wait_in_queue(chain, *range(6, 11))
    chain.change("--split=val", "--split=train")
    with pytest.raises(ValueError, match="jobs in the queue make the same already") as refused:
        chain.submit()
    assert str(refused.value) == (
        "jobs in the queue make the same already, from other settings or by a submission that did "
        "not come to its end:\n"
        "  evaluate: job 10 (PENDING), whose log is "
        f"{chain.folder}/work/scores.stage/slurm-10.out\n"
        "let them end, or cancel them (scancel 10), then submit again"
    )
    assert getattr(refused.value, "exit_code", None) == 2
    assert chain.submitted == []


@pytest.mark.parametrize("last", [3, 7])
def test_a_submission_that_was_killed_leaves_no_second_job_behind(chain: Chain, last: int) -> None:
    """Slurm has taken a job of whose number nothing is written down."""
    (chain.state / "wait").touch()
    chain.submit()
    wait_in_queue(chain, *range(1, last + 1))
    stage = "dataset" if last == 3 else "run"
    for number in (chain.folder / f"work/{stage}.stage").glob("*.job"):
        number.unlink()
    with pytest.raises(ValueError, match=rf"scancel ({'1 2 3' if last == 3 else '7'})\), then sub"):
        chain.submit()
    assert chain.submitted == []


def test_two_submissions_at_once_make_one_chain(chain: Chain) -> None:
    (chain.state / "wait").touch()
    sbatch = chain.folder / "bin" / "sbatch"
    # The second one comes while the first one submits.
    second = f'{sys.executable} -m launcher submit life.toml >>"$STATE/second" 2>&1 && exit 9'
    again = f'#!/bin/bash\nif [ -z "${{INNER:-}}" ]; then INNER=1 {second}; fi\n'
    sbatch.write_text(sbatch.read_text().replace("#!/bin/bash\n", again, 1))
    chain.submit()
    assert len(chain.submitted) == 10
    told = (chain.state / "second").read_text()
    assert "another `headrace submit` is at work on" in told and "Traceback" not in told


def test_an_output_that_was_made_from_something_else_is_not_touched(chain: Chain) -> None:
    chain.submit()
    chain.change("--vocab-size=400", "--vocab-size=500")
    (chain.folder / "labelled.csv").write_text("text,label\nc,d\n")
    with pytest.raises(ValueError, match="these outputs were made from something else") as refused:
        chain.submit()
    work = chain.folder / "work"
    assert str(refused.value) == (
        "these outputs were made from something else:\n"
        f"  prepare: {work}/dataset\n"
        "    options: ['--vocab-size=400'] -> ['--vocab-size=500']\n"
        f"  pretrain: {work}/run\n    stage prepare is another one\n"
        f"  export: {work}/model\n    stage pretrain is another one\n"
        f"  finetune: {work}/tuned\n    file {chain.folder}/labelled.csv is another one\n"
        "    stage export is another one\n"
        "name other outputs, or remove the folders (with their .stage) to make them again"
    )
    assert chain.submitted == []
    assert getattr(refused.value, "exit_code", None) == 2


@pytest.mark.parametrize("text", ["[]", "x", '{"key": 5}', '{"key": "x", "settings": [1]}'])
def test_a_record_that_is_none_is_not_believed(chain: Chain, text: str) -> None:
    chain.submit()
    (chain.folder / "work/scores.stage/complete.json").write_text(text)
    assert chain.submit()[-1] == ["evaluate", "job 11"]


def test_an_export_does_not_go_where_something_is(chain: Chain) -> None:
    (chain.folder / "work/model").mkdir(parents=True)
    (chain.folder / "work/model/config.json").touch()
    with pytest.raises(ValueError, match=r"export: .*/work/model\n +was not made by a life cycle"):
        chain.submit("--dry-run")


def test_a_dry_run_prints_every_script_and_the_chain(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(["submit", "life.toml", "--dry-run", "--json"], standalone=False)
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["planned"] * 5
    run_command(["submit", "life.toml", "--dry-run"], standalone=False)
    shown = capsys.readouterr().out
    assert all(row["script"] in shown for row in rows)
    assert [line.split()[:2] for line in shown.splitlines()[-5:]] == [
        ["prepare", "at"], ["pretrain", "afterok:prepare"], ["export", "afterok:pretrain"],
        ["finetune", "afterok:export"], ["evaluate", "afterok:finetune"],
    ]  # fmt: skip
    assert not (chain.folder / "work").exists()
    if shutil.which("shellcheck") is None:
        told = "no shellcheck: apt-get install shellcheck"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(told)
    for row in rows:
        checked = subprocess.run(
            ["shellcheck", "-"], input=row["script"], capture_output=True, text=True
        )
        assert checked.returncode == 0, row["stage"] + checked.stdout


def test_stages_may_begin_in_the_middle(chain: Chain) -> None:
    """What the stages before would have made is named."""
    chain.submit()
    text = LIFECYCLE[LIFECYCLE.index("[finetune]") :].replace("work/tuned", "work/again")
    (chain.folder / "life.toml").write_text(text)
    with pytest.raises(ValueError, match=r"\[finetune\] model is not named, and there is no \[exp"):
        chain.submit()
    chain.change("work/again", 'work/again"\nmodel = "work/model')
    (chain.state / "wait").touch()
    assert chain.submit()[0] == ["finetune", "job 11"]
    assert (
        f"model={chain.folder}/work/model"
        in (chain.folder / "work/again/logs/finetune.sbatch").read_text()
    )


def test_the_example_is_one(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    example = (FOLDER / "lifecycle.toml").read_text()
    (chain.folder / "life.toml").write_text(example)
    run_command(["submit", "life.toml", "--dry-run", "--json"], standalone=False)
    links = json.loads(capsys.readouterr().out)
    assert [link["stage"] for link in links] == list(STAGES)
    assert [link["state"] for link in links] == ["planned"] * 5
