"""What the batch script makes of a preflight, when stand-ins play Slurm's commands."""

from __future__ import annotations

from tests.launcher.slurm_stand_ins import Cluster


def preflight_ends(cluster: Cluster, verdict: str, *, names: str = "") -> None:
    """Let a preflight end so, and the training after it well."""
    folder = cluster.run / "logs"
    (cluster.state / "verdict").write_text(verdict)
    (cluster.state / "names").write_text(names)
    cluster.command(
        "srun",
        f'case " $* " in *" launcher preflight "*) cp $STATE/verdict {folder}/preflight/'
        f"verdict.json; cat $STATE/names >>{folder}/exclude;;"
        f" *pretrain*) touch $STATE/trained; "
        f"""echo '{{"outcome": "complete"}}' >>{cluster.run}/attempts.jsonl;; esac""",
    )


def test_a_preflight_that_finds_all_fit_is_followed_by_training(cluster: Cluster) -> None:
    preflight_ends(cluster, '{\n "fit": true\n}\n')
    done = cluster.submitted(PREFLIGHT="1")
    assert done.returncode == 0 and not cluster.requeued, done.stdout + done.stderr
    assert (cluster.state / "trained").exists()


def test_a_node_that_is_not_fit_is_left_out_and_no_crash_is_counted(cluster: Cluster) -> None:
    cluster.command("sinfo", 'echo "n1\\nn2\\nn3"')
    preflight_ends(cluster, '{\n "fit": false\n}\n', names="n2\n")
    done = cluster.submitted(PREFLIGHT="1")
    assert "queueing again without n2" in done.stdout, done.stdout + done.stderr
    assert not (cluster.state / "trained").exists()
    assert not list((cluster.run / "logs").glob("failures-*"))


def test_what_no_other_node_would_mend_ends_the_job_after_a_few_tries(cluster: Cluster) -> None:
    preflight_ends(cluster, '{\n "fit": false\n}\n')
    ends = [cluster.submitted(SLURM_RESTART_COUNT=str(count), PREFLIGHT="1") for count in range(3)]
    assert [end.returncode for end in ends] == [0, 0, 1]
    assert "no node to blame that others could replace" in ends[-1].stdout
    assert not (cluster.state / "trained").exists()
