"""What a preflight makes of facts: which node is to blame, and when nobody is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.fitness import PHASES, SLOW, Facts, judge
from launcher.show_preflight import lines, show_preflight


def healthy(num_hosts: int, ranks_per_host: int = 1, **changes: Any) -> list[Facts]:
    """What ranks of equal nodes tell, at the end."""
    size = num_hosts * ranks_per_host
    made = []
    for rank in range(size):
        host, local = divmod(rank, ranks_per_host)
        own: dict[str, Any] = {
            "import_seconds": 5.0,
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "matmul": 1e12,
            "pairs": {f"n{other + 1}": 1e9 for other in range(num_hosts) if other != host},
            "all_reduce": 1e9,
            "skew_seconds": 0.01,
        }
        if local == 0:
            own |= {
                "shm_bytes": 2**30, "nofile": 2**20, "disk_free": 2**40, "disk": 1e9, "keep": 3,
                "checkpoint_bytes": 2**30, "fingerprint": "ab" * 32, "num_shards": 3,
            }  # fmt: skip
        made.append(Facts(rank, size, f"n{host + 1}", local, "done", **(own | changes)))
    return made


def but(facts: list[Facts], rank: int, **changes: Any) -> list[Facts]:
    """The same, but for one rank."""
    return [replace(one, **changes) if one.rank == rank else one for one in facts]


def test_equal_nodes_are_fit() -> None:
    verdict = judge(healthy(4, 2), size=8)
    assert verdict.is_fit and verdict.findings == () and verdict.exclude == ()
    assert list(lines(verdict, healthy(4, 2))) == [
        "all-reduce over 8 ranks: 1 GB/s per rank", "fit to train",
    ]  # fmt: skip


def test_figures_above_a_thousand_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    facts = but(healthy(1, 1), 0, disk=1.3149e9, num_shards=12_345, matmul=0.0651e12)
    show_preflight(judge(facts, size=1), facts, as_json=False)
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[3] == "0.0651" and row[5] == "1,315" and row[-1] == "12,345"


@pytest.mark.parametrize(
    ("changes", "check", "message"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.12.0"}}, "versions",
         "torch is 2.12.0, and 2.13.0 on most ranks"),
        ({"versions": {"python": "3.11.7"}}, "versions", "torch is none, and 2.13.0 on most ranks"),
        ({"promised_gpus": 8}, "gpus", "0 GPUs are visible, 8 are needed"),
        ({"shm_bytes": 2**20, "uses_shm": True}, "shm",
         "/dev/shm has 1,048,576 bytes free, 1 ranks should have 67,108,864"),
        ({"nofile": 64}, "nofile", "64 files may be open, 3 ranks need about 280"),
        ({"memlock": 65536, "has_rdma": True}, "memlock", "65,536 bytes may be locked, and RDMA"),
        ({"dataset_problem": "DATASET is not a dataset: no such directory"}, "dataset",
         "DATASET is not a dataset: no such directory"),
        ({"fingerprint": "cd" * 32}, "dataset", "the fingerprint is cdcdcdcdcdcdcdcd, and abab"),
        ({"disk_free": 2**29}, "disk", "536,870,912 bytes are free where the run is; a checkpoint "
                                       "takes 1,073,741,824, and 3 are kept"),
        ({"disk_problem": "RUN cannot be written: Read-only file system"}, "disk", "RUN cannot be"),
        ({"matmul": 1e11}, "matmul", "rank 1: 0.1 TFLOP/s, below 33% of the median, 1"),
        ({"disk": 1e8}, "disk", "rank 1: 100 MB/s, below 20% of the median, 1e+03"),
        ({"pairs": {"n1": 1e8, "n3": 1e8}}, "network", "rank 1: 0.1 GB/s, below 50% of the median"),
        ({"skew_seconds": -400.0}, "clock", "its clock differs by -400.0 s from the median"),
    ],
)  # fmt: skip
def test_the_node_that_differs_is_named_and_excluded(
    changes: dict[str, Any], check: str, message: str
) -> None:
    verdict = judge(but(healthy(3), 1, **changes), size=3)
    (finding,) = verdict.findings
    assert (finding.check, finding.hosts) == (check, ("n2",))
    assert finding.message.startswith(message), finding.message
    assert finding.fix and finding.is_fatal and verdict.exclude == ("n2",)
    told = list(lines(verdict, healthy(3)))
    assert told[1] == f"unfit: n2: {check}: {finding.message}; {finding.fix}"
    assert told[-1] == "not fit to train"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shm_bytes": 2**20}, "/dev/shm has 1,048,576 bytes free"),
        ({"core": -1}, "a rank that crashes writes its memory to disk"),
        ({"skew_seconds": 3.0}, "its clock differs by +3.0 s"),
        ({"import_seconds": 60.0}, "importing took 60.0 s, 5.0 s in the median"),
        ({"disk_free": 2**31}, "2,147,483,648 bytes are free"),
    ],
)
def test_what_does_not_keep_from_training_is_a_note(changes: dict[str, Any], message: str) -> None:
    verdict = judge(but(healthy(3), 1, **changes), size=3)
    (finding,) = verdict.findings
    assert finding.message.startswith(message) and finding.hosts == ("n2",)
    assert verdict.is_fit and verdict.exclude == ()


def test_a_first_node_whose_clock_is_wrong_has_no_others_excluded() -> None:
    """Ranks compare their clocks with that of rank 0."""
    facts = [one if one.rank == 0 else replace(one, skew_seconds=-400.0) for one in healthy(3)]
    verdict = judge(facts, size=3)
    (finding,) = verdict.findings
    assert finding.message == "its clock differs by +400.0 s from the median"
    assert verdict.exclude == ("n1",)
    two = judge(but(healthy(2), 1, skew_seconds=-400.0), size=2)
    assert not two.is_fit and two.exclude == ()


def test_a_slow_link_between_two_good_nodes_excludes_neither() -> None:
    facts = but(healthy(4), 1, pairs={"n1": 1e9, "n3": 1e7, "n4": 1e9})
    assert judge(but(facts, 2, pairs={"n1": 1e9, "n2": 1e7, "n4": 1e9}), size=4).is_fit


def test_of_two_that_differ_nobody_can_say_which_is_right() -> None:
    facts = but(healthy(2), 1, versions={"python": "3.11.7", "torch": "2.12.0"})
    verdict = judge(facts, size=2)
    (finding,) = verdict.findings
    assert finding.message == (
        "torch differs: 2.13.0 on rank 0, 2.12.0 on rank 1; nobody can say which is right"
    )
    assert not verdict.is_fit and finding.hosts == ("n1", "n2") and verdict.exclude == ()


def test_a_node_that_never_came_is_named() -> None:
    facts = [replace(one, phase="rendezvous", failure="Timeout") for one in healthy(3)[:2]]
    verdict = judge(facts, size=3, hosts=("n1", "n2", "n3"), failed=True)
    (finding,) = verdict.findings
    assert finding.message == "never came: nothing of it has reached the run's folder"
    assert verdict.exclude == ("n3",)
    # Without Slurm nobody knows its name.
    (finding,) = judge(facts, size=3, failed=True).findings
    assert finding.message == "rank 2 of 3 never came; those that did are on n1, n2"


@pytest.mark.parametrize("phase", PHASES[:-1])
def test_a_rank_that_is_silent_or_behind_is_named(phase: str) -> None:
    gave_up = [replace(one, phase="network", failure="Timeout") for one in healthy(3)]
    silent = but(gave_up, 2, phase=phase, failure="", silent_seconds=30.0)
    verdict = judge(silent, size=3, failed=True)
    (finding,) = verdict.findings
    assert finding.message == f"rank 2 no longer answers at {phase}"
    assert verdict.exclude == ("n3",)
    waiting = judge(but(silent, 2, silent_seconds=0.5), size=3, failed=True)
    # At the same phase it waits like the others.
    assert waiting.exclude == (() if phase == "network" else ("n3",))
    assert not waiting.is_fit


def test_a_broken_network_is_said_as_it_was_told() -> None:
    facts = [replace(one, phase="rendezvous", failure="DistError: no") for one in healthy(2)]
    (finding,) = judge(facts, size=2, hosts=("n1", "n2"), failed=True).findings
    assert finding.message == (
        "the ranks did not come to the end together: DistError: no (rank 0 on n1)"
    )


BREAKS: list[Callable[[Facts], Facts]] = [
    lambda one: replace(one, versions={**one.versions, "torch": "1.0"}),
    lambda one: replace(one, dataset_problem="gone"),
    lambda one: replace(one, disk_problem="gone"),
    lambda one: replace(one, nofile=10),
    lambda one: replace(one, promised_gpus=8),
    lambda one: replace(one, matmul=1e12 * SLOW["matmul on a CPU"] / 2),
    lambda one: replace(one, pairs={other: 1e7 for other in one.pairs}),
]


@given(
    num_hosts=st.integers(3, 12),
    ranks=st.integers(1, 4),
    bad=st.integers(0, 11),
    which=st.sampled_from(BREAKS),
    order=st.randoms(use_true_random=False),
)
def test_one_bad_node_among_others_is_found_wherever_it_is(
    num_hosts: int, ranks: int, bad: int, which: Callable[[Facts], Facts], order: Any
) -> None:
    bad %= num_hosts
    facts = [which(f) if f.host == f"n{bad + 1}" else f for f in healthy(num_hosts, ranks)]
    order.shuffle(facts)
    verdict = judge(facts, size=len(facts))
    assert verdict.exclude == (f"n{bad + 1}",)


@given(num_hosts=st.integers(1, 12), which=st.sampled_from(BREAKS[1:5]))
def test_what_is_wrong_everywhere_excludes_nobody(
    num_hosts: int, which: Callable[[Facts], Facts]
) -> None:
    verdict = judge([which(one) for one in healthy(num_hosts)], size=num_hosts)
    assert not verdict.is_fit and verdict.exclude == ()


@given(
    rates=st.lists(st.floats(0.8, 1.2), min_size=2, max_size=16),
    scale=st.floats(1e9, 1e15),
)
def test_nodes_that_differ_by_a_fifth_are_all_fit_whatever_their_rate(
    rates: list[float], scale: float
) -> None:
    made = healthy(len(rates))
    facts = [replace(f, matmul=r * scale) for f, r in zip(made, rates, strict=True)]
    assert judge(facts, size=len(facts)).is_fit
