"""When a batch script queues its job again, without which hosts, and when it gives up."""

from __future__ import annotations

import pytest

from tests.launcher.slurm_stand_ins import Cluster


def test_failures_without_progress_end_the_job(cluster: Cluster) -> None:
    cluster.ends(1, outcome="failed")
    codes = [cluster.submitted(SLURM_RESTART_COUNT=str(count)).returncode for count in range(3)]
    assert codes == [0, 0, 1]


def test_a_new_checkpoint_forgives_earlier_failures(cluster: Cluster) -> None:
    for count in range(4):
        cluster.ends(1, outcome="failed", checkpoint=f"step-{count:09d}")
        assert cluster.submitted(SLURM_RESTART_COUNT=str(count)).returncode == 0


def test_hosts_on_the_list_are_left_out_when_the_job_is_queued_again(cluster: Cluster) -> None:
    """n9 was put there by an earlier attempt; n2 by this one, whose ranks no longer answered."""
    cluster.command("sinfo", 'echo "n1\\nn2\\nn3\\nn9"')
    listed = cluster.run / "logs" / "exclude"
    listed.parent.mkdir()
    listed.write_text("n9\n")
    cluster.command("srun", f"echo n2 >>{listed}; exit 1")
    done = cluster.submitted()
    assert "queueing again without n2,n9" in done.stdout, done.stdout + done.stderr
    asked = (cluster.state / "scontrol").read_text().splitlines()
    assert asked[-2:] == ["requeue 123456", "update JobId=123456 ExcNodeList=n2,n9"]


def test_a_list_that_leaves_too_few_nodes_is_not_handed_on(cluster: Cluster) -> None:
    cluster.command("sinfo", 'echo "n1\\nn2"')
    (cluster.run / "logs").mkdir()
    (cluster.run / "logs" / "exclude").write_text("n2\n")
    cluster.ends(1)
    done = cluster.submitted()
    assert "n2 is in" in done.stdout and "too few nodes are left without" in done.stdout
    assert cluster.requeued and "ExcNodeList=" not in (cluster.state / "scontrol").read_text()


def test_a_job_that_may_start_with_fewer_nodes_does_without_one_on_the_list(
    cluster: Cluster,
) -> None:
    cluster.command("sinfo", 'echo "n1\\nn2"')
    (cluster.run / "logs").mkdir()
    (cluster.run / "logs" / "exclude").write_text("n2\n")
    cluster.submitted(min_nodes=1)
    assert "ExcNodeList=n2" in (cluster.state / "scontrol").read_text()


def test_a_job_on_a_host_that_is_on_the_list_is_queued_again_at_once(cluster: Cluster) -> None:
    cluster.command("sinfo", 'echo "n1\\nn2\\nn3"')
    (cluster.run / "logs").mkdir()
    (cluster.run / "logs" / "exclude").write_text("n2\n")
    cluster.ends(0, outcome="complete")
    done = cluster.submitted()
    assert "queueing again without n2" in done.stdout, done.stdout + done.stderr
    assert not (cluster.state / "srun").exists()


def test_a_list_that_people_have_edited_names_what_it_names(cluster: Cluster) -> None:
    """For one name that it does not know Slurm refuses the whole list."""
    cluster.command("sinfo", 'echo "n1\\nn2\\nn3\\nn9"')
    (cluster.run / "logs").mkdir()
    (cluster.run / "logs" / "exclude").write_text(
        "\r\n\n# since monday\nn9  # bad disk\r\nn.\nold7\n"
        "n3 Partition=high\nn1,n2\n$(exit 7)\n  \n"
    )
    cluster.ends(1)
    done = cluster.submitted()
    asked = (cluster.state / "scontrol").read_text().splitlines()
    assert asked[-2:] == ["requeue 123456", "update JobId=123456 ExcNodeList=n3,n9"], done.stderr
    assert "Slurm knows no node of this name: n.,old7,n1,n2,$(exit (in " in done.stderr


def test_a_job_on_a_host_whose_line_ends_as_on_windows_is_queued_again(cluster: Cluster) -> None:
    cluster.command("sinfo", 'echo "n1\\nn2\\nn3"')
    (cluster.run / "logs").mkdir()
    (cluster.run / "logs" / "exclude").write_bytes(b"n2\r\n")
    cluster.ends(0, outcome="complete")
    done = cluster.submitted()
    assert "queueing again without n2" in done.stdout, done.stdout + done.stderr
    assert not (cluster.state / "srun").exists()


def requeue_fails(cluster: Cluster, times: int, *, ping: int) -> None:
    """Let `scontrol requeue` fail so often, and `scontrol ping` leave with this."""
    cluster.command(
        "scontrol",
        'echo "$*" >>"$STATE/scontrol"; case $1 in show) echo "n1\\nn2" ;;\n'
        f"requeue) [ $(grep -c requeue $STATE/scontrol) -gt {times} ] ;;\n"
        f"ping) exit {ping} ;; esac",
    )


def test_a_controller_that_is_started_again_does_not_end_the_run(cluster: Cluster) -> None:
    cluster.ends(1)
    requeue_fails(cluster, 12, ping=1)
    done = cluster.submitted()
    assert done.returncode == 0, done.stdout + done.stderr
    asked = (cluster.state / "scontrol").read_text().splitlines()
    assert asked.count("requeue 123456") == 13


def test_a_controller_that_refuses_to_queue_a_job_again_is_not_asked_for_ever(
    cluster: Cluster,
) -> None:
    cluster.ends(1)
    requeue_fails(cluster, 99, ping=0)
    done = cluster.submitted()
    assert done.returncode == 1
    assert "Slurm has not queued the job again; submit it again, and the run goes on" in done.stdout
    asked = (cluster.state / "scontrol").read_text().splitlines()
    assert asked.count("requeue 123456") == 3


@pytest.mark.parametrize("preflight", ["0", "1"])
def test_failures_that_cannot_be_counted_end_the_job(cluster: Cluster, preflight: str) -> None:
    """On a full disk, on which no run goes on, the count would stay at one for ever. Root may write
    anywhere but to a folder.
    """
    for name in ("failures-123456", "unfit-123456"):
        (cluster.run / "logs" / name).mkdir(parents=True)
    cluster.ends(1)
    done = cluster.submitted(PREFLIGHT=preflight)
    assert (done.returncode, cluster.requeued) == (1, False), done.stdout + done.stderr
    if preflight == "0":
        assert "a failure that cannot be counted would be repeated for ever" in done.stdout


@pytest.mark.parametrize("count", ["a[$(touch {})]", "0 1\nx", "08", "-5", "9" * 30, ""])
def test_a_count_that_is_none_is_nought(cluster: Cluster, count: str) -> None:
    touched = cluster.state / "touched"
    (cluster.run / "logs").mkdir()
    file = cluster.run / "logs" / "failures-123456"
    file.write_text(count.replace("{}", str(touched)))
    cluster.ends(1)
    done = cluster.submitted()
    assert (done.returncode, cluster.requeued) == (0, True), done.stdout + done.stderr
    assert file.read_text() == "1\n" and not touched.exists()
