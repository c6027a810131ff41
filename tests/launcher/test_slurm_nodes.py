"""Which nodes a job is queued again without, when stand-ins play Slurm's commands."""

from __future__ import annotations

import pytest

from tests.launcher.slurm_stand_ins import Cluster


@pytest.fixture
def cluster(cluster: Cluster) -> Cluster:
    """A cluster of stand-ins with a spare node, and n2 on the run's list."""
    cluster.command("sinfo", 'echo "n1\\nn2\\nn3\\nn4"')
    (cluster.run / "logs").mkdir()
    (cluster.run / "logs" / "exclude").write_text("n2\n")
    cluster.ends(1, outcome="failed")
    return cluster


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
    (cluster.run / "logs" / "exclude").write_text("n3\n")
    cluster.submitted()
    assert asked(cluster) == ["requeue 123456", "update JobId=123456 ExcNodeList=n3,n4"]


@pytest.mark.parametrize("state", ["down", "drain", "drng", "idle*", "maint"])
def test_a_node_that_is_down_is_no_substitute(cluster: Cluster, state: str) -> None:
    knows(cluster, "ReqNodeList=(null) ExcNodeList=(null)")
    told = 'case "$*" in *%t*) echo "n1 alloc\\nn2 mix\\nn3 {}" ;; *) echo "n1\\nn2\\nn3" ;; esac'
    cluster.command("sinfo", told.format(state))
    done = cluster.submitted()
    assert "too few nodes are left" in done.stdout and asked(cluster) == ["requeue 123456"]
    cluster.command("sinfo", told.format("idle"))
    cluster.submitted()
    assert asked(cluster)[-1] == "update JobId=123456 ExcNodeList=n2"


def test_a_node_that_the_job_must_have_is_not_left_out(cluster: Cluster) -> None:
    """Slurm takes the change, and the job waits forever (BadConstraints)."""
    knows(cluster, "ReqNodeList=n[1-2] ExcNodeList=(null)")
    done = cluster.submitted()
    assert "n2 is in" in done.stdout and "or --nodelist names it" in done.stdout, done.stderr
    assert asked(cluster) == ["requeue 123456"]


PREFLIGHT = """
case " $* " in
  *" launcher preflight "*) ;;
  *pretrain*) touch $STATE/trained; exit 0 ;;
  *) exit 0 ;;
esac
for word; do case $word in --output=*) log=${word#--output=} ;; esac; done
echo "error: not fit to train: $TOLD" >>"${log/\\%n/0}"
echo "torchrun's own words" >>"${log/\\%n/0}"
"""


def test_another_job_of_the_run_says_what_its_own_preflight_has_found(cluster: Cluster) -> None:
    """Both begin with attempt 0, and Slurm appends to logs that are there."""
    (cluster.run / "logs" / "exclude").unlink()
    cluster.command("srun", PREFLIGHT)
    cluster.submitted(PREFLIGHT="1", TOLD="n1", SLURM_JOB_ID="7")
    done = cluster.submitted(PREFLIGHT="1", TOLD="n3", SLURM_JOB_ID="8")
    assert "error: not fit to train: n3\n" in done.stdout and "n1\n" not in done.stdout
    assert "torchrun's own words" not in done.stdout


def test_a_job_whose_time_ends_in_the_preflight_trains_no_more(cluster: Cluster) -> None:
    (cluster.run / "logs" / "exclude").unlink()
    verdict = f"{cluster.run}/logs/preflight/verdict.json"
    fit = f"""printf '{{\n "fit": true\n}}\n' >{verdict}; kill -USR1 "$PPID"\n"""
    cluster.command("srun", PREFLIGHT.replace("for word", f"{fit}for word"))
    cluster.submitted(PREFLIGHT="1")
    assert cluster.requeued and not (cluster.state / "trained").exists()


STOPPED = """
trap 'cat "$STATE/row" >>RUN/attempts.jsonl; exit 0' USR1
kill -USR1 "$PPID"
for _ in {1..200}; do /bin/sleep 0.05; done
"""


@pytest.mark.parametrize(("left", "codes"), [("-10 seconds", [0, 0, 1]), ("+1 hour", [0, 0, 0, 0])])
def test_a_limit_that_leaves_no_time_for_a_step_is_not_met_forever(
    left: str, codes: list[int], cluster: Cluster
) -> None:
    """A job that is preempted as often before its first step is no failure."""
    (cluster.run / "logs" / "exclude").unlink()
    (cluster.state / "row").write_text('{"outcome": "stopped", "reason": "SIGUSR1"}\n')
    cluster.command("squeue", f'date -d "{left}" +%FT%T')
    cluster.command("srun", STOPPED.replace("RUN", str(cluster.run)))
    done = [cluster.submitted(SLURM_RESTART_COUNT=str(count)) for count in range(len(codes))]
    assert [one.returncode for one in done] == codes, done[-1].stdout + done[-1].stderr
    gave_up = "had most of its time and made no step: write a longer --time" in done[-1].stdout
    assert gave_up == (codes[-1] == 1)


def test_a_limit_that_brought_progress_forgives_a_failure(cluster: Cluster) -> None:
    (cluster.run / "logs" / "exclude").unlink()
    cluster.command("squeue", 'date -d "-10 seconds" +%FT%T')
    for count in range(5):
        cluster.ends(count % 2, outcome="failed" if count % 2 else "stopped",
                     reason="9 s before the end of the Slurm job",
                     checkpoint="" if count % 2 else f"step-{count:09d}")  # fmt: skip
        done = cluster.submitted(SLURM_RESTART_COUNT=str(count), MAX_FAILURES="2")
        assert done.returncode == 0, done.stdout
