"""First process of a virtual machine: process 1 of a pid namespace, in network, mount and host name
namespaces of its own.

    python node.py controller FOLDER          the login node: munged, slurmctld, a bridge
    python node.py n1 FOLDER ADDRESS          a compute node: slurmd

Runs with the standard library alone, and stays until it is killed; then the kernel ends everything
below it. Orphans come to it to be waited for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CONTROLLER, BRIDGE = "controller", "br0"
NETWORK = "10.77.0"
HOLD_SECONDS = 3
"""How long a job that is queued again waits. Slurm 22.05 makes it 120 s, and a node refuses one
that comes back within the second.
"""


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    call("hostname", name)
    call("mount", "--make-rprivate", "/")
    call("mount", "-t", "proc", "proc", "/proc")
    call("ip", "link", "set", "lo", "up")
    if name == CONTROLLER:
        start_controller(folder)
    else:
        start_node(name, folder, address=sys.argv[3])
    (folder / "ready" / name).touch()
    seen: dict[str, int] = {}
    while True:
        reap()
        if name == CONTROLLER:
            let_go(seen)
        time.sleep(1)


def start_controller(folder: Path) -> None:
    call("mount", "--bind", str(folder / "etc"), "/etc/slurm")
    for file in ("hosts", "nsswitch.conf"):
        call("mount", "--bind", str(folder / "etc" / file), f"/etc/{file}")
    # Without its delay a bridge drops what comes in the first seconds.
    call("ip", "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0")
    # Else it borrows a node's address, which nobody answers to once that node is gone.
    call("ip", "link", "set", BRIDGE, "address", "02:00:00:00:00:01")
    call("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
    call("ip", "link", "set", BRIDGE, "up")
    call(
        "munged", "--force", f"--key-file={folder / 'etc/munge.key'}",
        f"--socket={folder / 'munge.socket'}", f"--pid-file={folder / 'munged.pid'}",
        f"--log-file={folder / 'log/munged.log'}", f"--seed-file={folder / 'munged.seed'}",
    )  # fmt: skip
    start_daemon(folder, "slurmctld", "-D")


def start_node(name: str, folder: Path, *, address: str) -> None:
    # Shared memory is a machine's own.
    call("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    # The cable is plugged in from outside; /proc tells of this network, /sys of the host's.
    until(lambda: "eth0:" in Path("/proc/net/dev").read_text())
    call("ip", "addr", "add", f"{address}/24", "dev", "eth0")
    call("ip", "link", "set", "eth0", "up")
    start_daemon(folder, "slurmd", "-D", "-N", name, log=f"slurmd-{name}")


def start_daemon(folder: Path, *argv: str, log: str = "") -> None:
    """Start a daemon that stays in the foreground, so that it dies with this machine."""
    with (folder / "log" / f"{log or argv[0]}.out").open("ab") as out:
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def let_go(seen: dict[str, int]) -> None:
    """Start the hold of jobs that were queued again at HOLD_SECONDS."""
    listed = subprocess.run(
        ["squeue", "-h", "-t", "PD", "-O", "JobID: ,Reason: ,RestartCnt:"],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in listed.stdout.splitlines():
        job, reason, count = [*line.split(), "", "", ""][:3]
        if reason == "BeginTime" and count not in ("", "0"):
            key = f"{job}.{count}"
            seen[key] = seen.get(key, 0) + 1
            if seen[key] == HOLD_SECONDS:
                subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=False)


def reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the cable did not come"
        time.sleep(0.02)


def call(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
