"""`headrace preflight` on real ranks: what it prints, writes, and leaves with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launcher import slurm
from launcher.fitness import Facts
from launcher.preflight import PreflightError, read_preflight
from launcher.presence import Presence, folder_of, left_by_ranks
from tests.launcher.test_cli import ROOT, headrace
from train.exclusion import exclude, excluded, minority
from train.preflight import rounds_of

HOST = socket.gethostname()


def test_two_ranks_that_are_fit(dataset: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    done = headrace(
        *("preflight", "tiny-cpu", f"data={dataset}", "--run", tmp_path / "run", "--nproc", "2"),
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begun < 60
    told = json.loads(done.stdout)
    # Notes, as of core files, are this machine's business.
    assert told["fit"] and told["exclude"] == []
    assert [finding for finding in told["findings"] if finding["is_fatal"]] == []
    first, second = told["ranks"]
    assert (first["rank"], second["rank"], first["host"]) == (0, 1, HOST)
    assert first["phase"] == second["phase"] == "done"
    assert first["versions"] == second["versions"] and "torch" in first["versions"]
    for one in (first, second):
        assert one["matmul"] > 1e8 and one["all_reduce"] > 1e6 and one["import_seconds"] > 0
        assert one["pairs"] == {} and abs(one["skew_seconds"]) < 5
    # A node's first rank looks at the node.
    assert first["disk"] > 0 and second["disk"] is None
    assert first["num_shards"] == 2 and len(first["fingerprint"]) == 64
    left = tmp_path / "run" / "logs" / "preflight"
    assert json.loads((left / "verdict.json").read_bytes()) == told
    assert sorted(path.name for path in left.iterdir()) == [
        f"00000-{HOST}.json", f"00001-{HOST}.json", "verdict.json",
    ]  # fmt: skip
    assert not (tmp_path / "run" / "logs" / "exclude").exists()


def test_what_a_person_reads(dataset: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(dataset, tmp_path / "dataset")
    shard = next((damaged / "train" / "main").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    done = headrace("preflight", "tiny-cpu", f"data={damaged}", "--run", "run", cwd=tmp_path)
    assert done.returncode == 1
    table, *findings = done.stdout.splitlines()[1:]
    assert table.split()[:3] == [HOST, "1", "0"] and table.split()[-1] == "unreadable"
    assert findings[0].startswith(f"unfit: {HOST}: dataset: {shard} is damaged: ")
    assert findings[-1] == "not fit to train"
    assert done.stderr.splitlines()[-1] == (
        "error: not fit to train (dataset); no other node would help: mend what was found, and run "
        "the same command again"
    )


def start(
    dataset: Path, run: Path, rank: int, port: int, seconds: int, **more: str
) -> subprocess.Popen[str]:
    """One of two ranks, on a host of its own name, as srun starts it."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"}
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURMD_NODENAME": f"n{rank + 1}"}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    argv = ["preflight", "tiny-cpu", f"data={dataset}", "--run", str(run), f"--seconds={seconds}"]
    return subprocess.Popen(
        [sys.executable, "-m", "launcher", *argv],
        cwd=ROOT,
        env=os.environ | step | own | meet | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(found: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def phase(run: Path, rank: int) -> str:
    return next((one.phase for one in left_by_ranks(run) if one.rank == rank), "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_rank_that_stops_answering_is_named_and_its_host_excluded(
    dataset: Path, tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    with start(dataset, run, 0, port, 12) as first, start(dataset, run, 1, port, 12) as second:
        try:
            until(lambda: phase(run, 1) == "matmul")
            second.send_signal(signal.SIGSTOP)
            out, err = first.communicate(timeout=60)
        finally:
            second.kill()
            first.kill()
    assert first.returncode == 1, out + err
    assert "unfit: n2: presence: rank 1 no longer answers at matmul; " in out
    assert "not fit to train (presence); " in err and "names n2: start without" in err
    assert excluded(run) == ["n2"]
    assert json.loads((run / "logs/preflight/verdict.json").read_bytes())["exclude"] == ["n2"]


def test_a_rank_that_never_comes_is_missed_and_read_says_it_again(
    dataset: Path, tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    with start(dataset, run, 0, port, 2) as first:
        out, err = first.communicate(timeout=90)
    assert first.returncode == 1, out + err
    said = "unfit: the run: presence: rank 1 of 2 never came; those that did are on n1; "
    assert said in out
    read = headrace(
        "preflight", "tiny-cpu", f"data={dataset}", "--run", run, "--read", cwd=tmp_path
    )
    assert read.returncode == 1 and said in read.stdout, read.stdout + read.stderr


@pytest.mark.parametrize("is_there", [False, True])
def test_read_of_nothing_is_no_verdict(dataset: Path, tmp_path: Path, is_there: bool) -> None:
    left = tmp_path / "run" / "logs" / "preflight"
    if is_there:
        left.mkdir(parents=True)
    asked = ("preflight", "tiny-cpu", f"data={dataset}", "--run", tmp_path / "run", "--read")
    read = headrace(*asked, cwd=tmp_path, SLURM_JOB_NODELIST="", SLURM_STEP_NODELIST="")
    assert read.returncode == 1 and read.stdout == ""
    assert read.stderr == (
        f"error: {left} holds nothing of a preflight; name the --run of one, or leave out --read "
        "to look at the nodes now\n"
    )


def test_a_node_with_another_library_is_told(dataset: Path, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    other = tmp_path / "other" / "numpy-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.9\n")
    with (
        start(dataset, run, 0, port, 30) as first,
        start(dataset, run, 1, port, 30, PYTHONPATH=str(other.parent)) as second,
    ):
        out, err = first.communicate(timeout=90)
        second.communicate(timeout=90)
    assert (first.returncode, second.returncode) == (1, 0), out + err
    found = [line for line in out.splitlines() if line.startswith("unfit: ")]
    assert found[0].startswith("unfit: n1, n2: versions: numpy differs: ") and len(found) == 1
    assert ", 9.9 on rank 1; nobody can say which is right; install the same" in found[0]
    # Each has been tried with the other.
    told = json.loads((run / "logs/preflight/verdict.json").read_bytes())
    assert [list(one["pairs"]) for one in told["ranks"]] == [["n2"], ["n1"]]
    assert excluded(run) == []


def test_a_port_that_somebody_holds_is_named(dataset: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with start(dataset, tmp_path / "run", 0, port, 5) as first:
            out, err = first.communicate(timeout=90)
    assert first.returncode == 1, out + err
    assert f"n1: port {port} (MASTER_PORT) cannot be used: Address already in use" in out


def test_a_file_of_an_earlier_preflight_is_replaced(tmp_path: Path) -> None:
    Presence(tmp_path, Facts(0, 2, "old", 0))
    presence = Presence(tmp_path, Facts(0, 2, "new", 0))
    presence.tell(phase="node", nofile=5)
    (one,) = left_by_ranks(tmp_path)
    assert (one.host, one.phase, one.nofile) == ("new", "node", 5)
    assert left_by_ranks(tmp_path, since=presence.began + 3600) == []


def test_the_list_names_each_host_once(tmp_path: Path) -> None:
    exclude(tmp_path, [])
    assert excluded(tmp_path) == [] and not (tmp_path / "logs").exists()
    exclude(tmp_path, ["n2", "n2"])
    exclude(tmp_path, ["n3", "n2"])
    assert (tmp_path / "logs" / "exclude").read_text() == "n2\nn3\n"


def test_what_people_have_written_on_the_list_stays(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "exclude"
    path.parent.mkdir()
    path.write_bytes(b"n1  # bad disk\r\n\n# caf\xe9\n")
    assert excluded(tmp_path) == ["n1"]
    exclude(tmp_path, ["n1", "n2"])
    assert path.read_bytes() == b"n1  # bad disk\n\n# caf\xe9\nn2\n"
    assert excluded(tmp_path) == ["n1", "n2"]


def test_a_preflight_that_never_was_is_not_called_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(PreflightError, match=r"/logs/preflight holds nothing of a preflight; name"):
        read_preflight(tmp_path, as_json=False)
    assert not folder_of(tmp_path).exists()


@pytest.mark.parametrize(
    "changes", [{"phase": "lunch"}, {"rank": "1"}, {"rank": 7}, {"host": "elsewhere"}, {"x": 1}]
)
def test_a_file_that_no_rank_has_written_is_no_rank(
    changes: dict[str, object], tmp_path: Path
) -> None:
    Presence(tmp_path, Facts(0, 2, "n1", 0, phase="done"))
    told = asdict(Facts(1, 2, "n2", 0, phase="done")) | changes
    (folder_of(tmp_path) / "00001-n2.json").write_text(json.dumps(told))
    assert [one.rank for one in left_by_ranks(tmp_path)] == [0]


@pytest.mark.parametrize("body", ["exec sleep 60", "printf 'n\\351 n2'", "exit 1"])
def test_hosts_that_nobody_names_are_not_waited_for(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\n{body}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "HOSTS_SECONDS", 0.5)
    hosts = slurm.hosts_of({"SLURM_JOB_NODELIST": "n[1-2]"})
    assert hosts in ((), ("n\udce9", "n2"))


def test_more_than_half_of_the_hosts_are_hardly_to_blame() -> None:
    assert minority(["b"], ["a", "b"]) == ["b"]
    assert minority(["a"], ["a"]) == []
    assert minority(["b", "c", "b"], ["a", "b", "c"]) == []


@pytest.mark.parametrize("num_nodes", range(1, 40))
def test_each_node_is_tried_with_others_at_most_once_a_round(num_nodes: int) -> None:
    rounds = rounds_of(num_nodes)
    pairs = [pair for one in rounds for pair in one]
    assert len(set(pairs)) == len(pairs) and all(a < b < num_nodes for a, b in pairs)
    for one in rounds:
        assert len({node for pair in one for node in pair}) == 2 * len(one)
    if 1 < num_nodes <= 8:
        assert len(pairs) == num_nodes * (num_nodes - 1) // 2
    tried = {node for pair in pairs for node in pair}
    assert tried == (set(range(num_nodes)) if num_nodes > 1 else set())
