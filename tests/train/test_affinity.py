"""Ranks run on the cores next to their GPU, as far as whoever started them allows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from train.affinity import cores_near

BOUND = """
import os, sys, threading
from train.affinity import bind
wait = threading.Event()
old = threading.Thread(target=wait.wait)
old.start()
os.sched_setaffinity(0, eval(sys.argv[1]))
told = bind(frozenset(eval(sys.argv[2])))
seen = []
new = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
new.start(); new.join()
found = (told, os.sched_getaffinity(0), seen[0], os.sched_getaffinity(old.native_id))
print([sorted(cores) for cores in found])
wait.set()
"""


@pytest.mark.parametrize(
    ("told", "cores"),
    [("0-3,8-9\n", {0, 1, 2, 3, 8, 9}), ("5\n", {5}), ("\n", set()), (None, set())],
)
def test_cores_are_those_that_linux_tells_of_the_device(
    tmp_path: Path, told: str | None, cores: set[int]
) -> None:
    device = tmp_path / "bus" / "pci" / "devices" / "0000:3b:00.0"
    device.mkdir(parents=True)
    if told is not None:
        (device / "local_cpulist").write_text(told)
    assert cores_near("0000:3b:00.0", sysfs=tmp_path) == cores


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
@pytest.mark.parametrize(
    ("allowed", "near", "expected"),
    [
        ("{0, 1}", "{1, 2, 3}", [[1], [1], [1], [1]]),
        # Bound elsewhere by whoever started it: left so, and its older thread, too.
        ("{0}", "{1}", [[0], [0], [0], [0, 1]]),
        ("{0, 1}", "set()", [[0, 1], [0, 1], [0, 1], [0, 1]]),
    ],
)
def test_every_thread_is_bound(allowed: str, near: str, expected: list[list[int]]) -> None:
    # On two cores whatever the machine has.
    argv = [sys.executable, "-c", BOUND, allowed, near]
    done = subprocess.run(["taskset", "-c", "0,1", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == expected
