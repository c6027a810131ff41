"""`headrace status` on real runs: what it says of each state, and that it says it without libraries
that take long to import.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.queue import QueuedJob, jobs
from launcher.rank import follow_parent
from launcher.show_status import duration, paragraph
from launcher.status import status_of
from tests.launcher.test_cli import ROOT, headrace
from tests.ranks import RankFailure, run_ranks
from tests.train.test_pretrain import config, train_run
from train.attempts import attempts
from train.events import read_events, record
from train.rows import last_rows
from train.world import World, cause_of


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped at step 4 of 8, and gone on to its end."""
    made = tmp_path_factory.mktemp("status") / "run"
    run_ranks(2, train_run, config(dataset), made, 4)
    run_ranks(2, train_run, config(dataset), made)
    return made


def test_a_run_is_told_in_a_paragraph(run: Path, tmp_path: Path) -> None:
    record_copy = shutil.copytree(run, tmp_path / "copy")
    record(record_copy, "skip", attempt=2, step=6, reason="loss is nan")
    said = headrace("status", record_copy, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    text = said.stdout
    assert f"{record_copy}: complete, attempt 2 on 2 ranks, process " in text
    assert re.search(r"\n  step 8 of 8 \(100\.0%\), loss \d\.\d{4}, val \d\.\d{4}, ", text)
    assert re.search(r" tokens/s, (mfu .*%, )?last row \d+ s ago\n", text)
    assert re.search(r"\n  checkpoint of step 8, \d+ s old; 4 kept\n", text)
    assert re.search(r"\n  \d+ s ago: skip at step 6: loss is nan\n", text)
    assert "to go" not in text


def test_the_start_of_every_attempt_is_kept_part_by_part(run: Path) -> None:
    first, second = read_events(run, "started")
    assert (first["attempt"], first["step"], second["attempt"], second["step"]) == (1, 1, 2, 5)
    parts = ["import", "rendezvous", "open", "build", "load", "first step"]
    assert list(second["seconds"]) == parts
    assert all(seconds >= 0 for seconds in second["seconds"].values())
    status = status_of(run)
    assert status.start_seconds == second["seconds"]
    start = [row for row in attempts(run) if row["event"] == "start"][1]
    end = next(row for row in attempts(run) if row["event"] == "end")
    assert status.down_seconds == start["time"] - end["time"]
    assert re.search(r"attempt 2: \d+\.\d s nobody trained, import .* s, ", _text(run))


def test_programs_get_json_and_several_runs_a_table(run: Path, tmp_path: Path) -> None:
    found = json.loads(headrace("status", run, "--json", cwd=tmp_path).stdout)
    assert (found["state"], found["step"], found["steps"], found["checkpoint_step"]) == (
        *("complete", 8, 8),
        8,
    )
    (tmp_path / "new" / "logs").mkdir(parents=True)
    both = json.loads(headrace("status", run, "new", "--json", cwd=tmp_path).stdout)
    assert [one["state"] for one in both] == ["complete", "not started"]
    table = headrace("status", run, "new", cwd=tmp_path).stdout.splitlines()
    assert table[0].split()[:4] == ["run", "state", "attempt", "step"]
    assert table[1].split()[1:4] == ["complete", "2", "8"]
    assert table[2].split() == ["new", "not", "started", *["-"] * 7]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    said = headrace("status", tmp_path, cwd=tmp_path)
    assert said.returncode == 2
    assert (
        f"error: {tmp_path} is no run directory: it has neither config.json nor logs; name the "
        in (said.stderr)
    )


def test_ranks_that_were_killed_have_ended_without_a_word(dataset: Path, tmp_path: Path) -> None:
    os.environ["HEADRACE_FAULT"] = ""
    with pytest.raises(RankFailure, match="died without a word"):
        run_ranks(1, _die, config(dataset), tmp_path / "run")
    status = status_of(tmp_path / "run")
    assert (status.state, status.step, status.eta_seconds) == ("gone", 4, None)
    assert "ended without a word, last heartbeat" in _text(tmp_path / "run")


def test_a_rank_that_only_heard_of_a_death_says_so(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(RankFailure):
        run_ranks(2, _die_second, config(dataset), tmp_path / "run")
    text = _text(tmp_path / "run")
    assert ": failed, attempt 1 on 2 ranks" in text
    assert re.search(
        r"\n  another rank was gone, its connection from \S+ broke; what ended that rank stands in "
        r"its own log, or in that of its host\n",
        text,
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Read error [10.0.0.2]:36240: Connection reset by peer. GLHF!", "another rank was gone,"),
        ("Connection closed by peer [10.0.0.2]:33713. GLHF!", "another rank was gone,"),
        ("Timed out waiting 1000ms", "RuntimeError: [/g/gloo/pair.cc:5] Timed out"),
    ],
)
def test_of_what_gloo_says_the_peer_is_kept(said: str, told: str) -> None:
    cause = cause_of(RuntimeError(f"[/g/gloo/pair.cc:5] {said}"))
    assert cause.startswith(told) and ("from 10.0.0.2 broke" in cause) == ("peer" in said)


def test_an_attempt_elsewhere_lives_as_long_as_its_heart_beats(run: Path, tmp_path: Path) -> None:
    """The attempt of another machine, of which only the files can be seen."""
    copy = shutil.copytree(run, tmp_path / "copy")
    rows = [row for row in attempts(copy) if not (row["attempt"] == 2 and row["event"] == "end")]
    (copy / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    owner = json.loads((copy / "attempts" / "000002.json").read_text()) | {"host": "elsewhere"}
    (copy / "attempts" / "000002.json").write_text(json.dumps(owner))
    beat = copy / "attempts" / "000002.beat"
    beat.touch()
    assert status_of(copy).state == "running" and " on elsewhere, begun" in _text(copy)
    assert status_of(copy).eta_seconds == 0
    late = time.time() - 30
    os.utime(beat, (late, late))
    assert ": running, last heartbeat 30 s ago, attempt 2" in _text(copy)
    dead = time.time() - 600
    os.utime(beat, (dead, dead))
    assert ": ended without a word, last heartbeat 10.0 minutes ago, attempt 2" in _text(copy)
    (copy / "attempts" / "000002.stall.json").write_text('{"verdict": "rank 1 stands still"}')
    (copy / "STOP").touch()
    assert "\n  rank 1 stands still\n" in _text(copy)
    assert f"{copy}/STOP keeps the run standing until it is removed" in _text(copy)


def test_a_job_is_found_by_its_log_or_by_its_number(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new" / "logs").mkdir(parents=True)
    log = f"{tmp_path.resolve()}/new/logs/slurm-7.out"
    queued = [
        QueuedJob("6", "RUNNING", "None", "1:00", 0, "n[1-2]", "/elsewhere/slurm-6.out"),
        QueuedJob("7", "PENDING", "Resources", "30:00", 0, "", log),
    ]
    assert status_of(run, queued).job is None
    found = status_of(tmp_path / "new", queued)
    assert next(paragraph(found)).endswith("/new: not started, job 7 PENDING (Resources)")
    copy = shutil.copytree(run, tmp_path / "copy")
    rows = [row | {"slurm_job": "6"} for row in attempts(copy)]
    (copy / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ", job 6 RUNNING on n[1-2], 1:00 left" in next(paragraph(status_of(copy, queued)))


def test_the_log_of_a_job_is_named_as_it_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = "7:|RUNNING:|None:|1:00:|0:|n1:|/runs/a/logs/slurm-%j.out:|"
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '{row.replace(':|', '|')}'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [job.output for job in jobs()] == ["/runs/a/logs/slurm-7.out"]


def test_speed_and_mfu_are_of_the_same_steps(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    rows = [row for row in last_rows(run / "metrics.jsonl") if row["attempt"] == 2]
    shares = iter([0.2, 0.3, 0.2, 0.9])
    told = [
        row | {"tokens_per_second": 1e4 * (share := next(shares)), "mfu": share}
        for row in rows
        if "loss" in row
    ]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    assert "2,500 tokens/s, mfu 25.0%" in _text(copy)


def test_an_exported_model_is_no_run(tmp_path: Path) -> None:
    for name in ("config.json", "headrace.json"):
        (tmp_path / name).write_text("{}")
    said = headrace("status", tmp_path, cwd=tmp_path)
    assert said.returncode == 2
    assert f"error: {tmp_path} is an exported model, and no run; name the run it" in said.stderr


def test_watch_into_a_file_shows_one_state_below_the_other(run: Path, tmp_path: Path) -> None:
    copy, file = shutil.copytree(run, tmp_path / "copy"), tmp_path / "file"
    with (
        file.open("wb") as out,
        subprocess.Popen(
            [sys.executable, "-m", "launcher", "status", copy, "--watch"],
            cwd=ROOT, stdout=out, stderr=out, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        end = time.monotonic() + 20
        while file.read_text().count("complete, attempt 2") < 2 and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert file.read_text().count(f"{copy}: complete, attempt 2 on 2 ranks") >= 2


def test_a_run_that_was_submitted_again_is_told_by_its_new_job(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    rows = [row | {"slurm_job": "99"} for row in attempts(copy)]
    (copy / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (copy / "logs").mkdir(exist_ok=True)
    log = f"{copy.resolve()}/logs/slurm-100.out"
    jobs = [
        QueuedJob("100", "PENDING", "Priority", "30:00", 0, "", log),
        QueuedJob("99", "FAILED", "NonZeroExitCode", "0:00", 0, "n1", "/a/slurm-99.out"),
    ]
    assert ", job 100 PENDING (Priority)" in next(paragraph(status_of(copy, jobs)))


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert last_rows(path) == []
    path.write_text("".join(f'{{"step": {n}}}\n' for n in range(100)) + '{"step": 1')
    assert [row["step"] for row in last_rows(path)] == list(range(100))
    # 36 bytes: half of the third row from the end, and the torn one.
    assert [row["step"] for row in last_rows(path, num_bytes=40)] == [98, 99]
    with path.open("r+b") as file:
        file.truncate(10**12)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"step": 7}\n')
    assert last_rows(path) == [{"step": 7}]


def test_watch_shows_what_changes_until_it_is_interrupted(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    outside, inside = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "launcher", "status", copy, "--watch"],
        cwd=ROOT, stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
        # Wide enough for the path: what is looked for must not be broken in two.
        env=os.environ | {"COLUMNS": "400"},
        # A session of its own outlives a test that is killed.
        preexec_fn=lambda: follow_parent(signal.SIGKILL),
    ) as process:  # fmt: skip
        os.close(inside)
        try:
            shown = _until(outside, "complete, attempt 2")
            (copy / "STOP").touch()
            shown += _until(outside, "keeps the run standing")
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0, shown
        finally:
            process.kill()
    os.close(outside)
    refused = headrace("status", copy, "--watch", "--json", cwd=tmp_path)
    assert refused.returncode == 2 and "--watch is for people" in refused.stderr


@pytest.mark.parametrize(
    ("seconds", "told"), [(5.4, "5 s"), (119, "119 s"), (150, "2.5 minutes"), (200_000, "2.3 days")]
)
def test_durations_are_in_a_unit_that_a_person_would_choose(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def _die(world: object, *args: object) -> str:
    from train import faults

    faults.arm("forward:5:0:kill", 0)
    return train_run(world, *args)  # type: ignore[arg-type]


def _die_second(world: World, *args: object) -> str:
    from train import faults

    faults.arm("forward:5:1:kill", world.rank)
    return train_run(world, *args)  # type: ignore[arg-type]


def _text(run: Path) -> str:
    return "\n".join(paragraph(status_of(run))) + "\n"


def _until(terminal: int, text: str) -> str:
    """What a terminal shows, up to this text."""
    shown, end = "", time.monotonic() + 60
    while text not in shown:
        assert time.monotonic() < end, shown
        shown += os.read(terminal, 65536).decode(errors="replace")
    return shown
