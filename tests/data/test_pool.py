"""Workers: results in order, bounded look-ahead, clear deaths, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from data.config import DataError, DataUsageError
from data.pool import Pool


def slow_square(number: int) -> int:
    time.sleep(0.02 * (number % 3))
    return number * number


def refuse(number: int) -> int:
    raise DataError(f"number {number} is refused")


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def own_pid(number: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_errors_arrive(workers: int) -> None:
    with Pool(workers) as pool:
        assert list(pool.map(slow_square, range(9))) == [n * n for n in range(9)]
        with pytest.raises(DataError, match="number 3 is refused"):
            list(pool.map(refuse, [3]))
        assert (set(pool.map(own_pid, range(4))) == {os.getpid()}) == (workers == 1)


def test_items_are_taken_only_shortly_before_they_are_needed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with Pool(2) as pool:
        results = pool.map(slow_square, items())
        next(results)
        assert len(taken) <= 6


def test_a_dead_worker_is_explained() -> None:
    with Pool(2) as pool, pytest.raises(DataError, match=r"a worker process died.*it continues"):
        list(pool.map(die, range(4)))


def test_no_worker_is_refused() -> None:
    with pytest.raises(DataUsageError, match="--workers 0: at least one process"):
        Pool(0)


ORPHANS = """
import sys, time
from data.pool import Pool
from tests.data.test_pool import own_pid
if __name__ == "__main__":
    with Pool(2) as pool:
        print(*set(pool.map(own_pid, range(20))), flush=True)
        time.sleep(60)
"""


def test_workers_leave_when_their_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert workers and all(alive(pid) for pid in workers)
        parent.kill()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
