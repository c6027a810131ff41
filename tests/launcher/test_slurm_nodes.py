"""Which nodes a job is queued again without, when stand-ins play Slurm's commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.slurm_stand_ins import Cluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster of stand-ins with a spare node, and n2 on the run's list."""
    monkeypatch.setenv("STATE", "")
    made = Cluster(tmp_path)
    made.command("sinfo", 'echo "n1\\nn2\\nn3\\nn4"')
    (made.run / "logs").mkdir()
    (made.run / "logs" / "exclude").write_text("n2\n")
    made.ends(1, outcome="failed")
    return made


def knows(cluster: Cluster, fields: str) -> None:
    """Let Slurm have these fields of the job; lists of hosts are written with blanks here."""
    cluster.command(
        "scontrol",
        'echo "$*" >>"$STATE/scontrol"\ncase "$*" in\n'
        f'  *"show job"*) echo "JobId=123456 {fields} Partition=batch" ;;\n'
        '  "show hostnames n[1-2]") echo "n1\\nn2" ;;\n'
        '  "show hostnames "*) echo "${3}" ;;\nesac',
    )


def asked(cluster: Cluster) -> list[str]:
    """What was changed."""
    lines = (cluster.state / "scontrol").read_text().splitlines()
    return [line for line in lines if not line.startswith(("show", "-o show"))]


def test_nodes_that_the_job_leaves_out_stay_left_out(cluster: Cluster) -> None:
    knows(cluster, "ReqNodeList=(null) ExcNodeList=n4")
    (cluster.run / "logs" / "exclude").write_text("n9\n")
    cluster.submitted()
    assert asked(cluster) == ["requeue 123456", "update JobId=123456 ExcNodeList=n4,n9"]


def test_a_node_that_the_job_must_have_is_not_left_out(cluster: Cluster) -> None:
    """Slurm takes the change, and the job waits forever (BadConstraints)."""
    knows(cluster, "ReqNodeList=n[1-2] ExcNodeList=(null)")
    done = cluster.submitted()
    assert "n2 is in" in done.stdout and "or --nodelist names it" in done.stdout, done.stderr
    assert asked(cluster) == ["requeue 123456"]
