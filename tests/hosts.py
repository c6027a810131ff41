"""Hosts on this machine without Slurm, each with its own network, name, processes and /dev/shm.

    with hosts(2) as (first, second):
        process = second.start(["python", ...])

All stand on one Ethernet, with the addresses 10.78.0.1, 10.78.0.2 and so on. They live below
processes that the kernel ends when this one ends. Needs root, Linux and Debian's iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.rank import follow_parent

NETWORK = "10.78.0"
ROOT = Path(__file__).resolve().parent.parent
# Process 1 of a host: what is left on it comes here to be waited for.
INIT = """
set -e
hostname "$0"
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
echo up
while :; do sleep 1; done
"""


@dataclass(frozen=True)
class Host:
    """One of them."""

    name: str
    address: str
    starter: subprocess.Popen[str]
    init: int
    """Its process 1, by its number here."""

    def start(self, argv: Sequence[object], **variables: str) -> subprocess.Popen[str]:
        """Start a command there; stdout and stderr are kept together for `communicate`."""
        enter = ["nsenter", "-t", str(self.init), "-m", "-u", "-n", "-p", f"--wd={ROOT}"]
        path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
        # A terminal's settings must not leak in.
        own = {"PATH": f"{path}:/sbin:/bin", "HOME": "/root", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*enter, *map(str, argv)],
            env=own | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"} | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def power_off(self) -> None:
        """Kill all that runs there at once; nobody is told."""
        with suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self.starter.wait(20)


@contextmanager
def hosts(count: int) -> Iterator[tuple[Host, ...]]:
    """So many hosts; skips where there can be none, unless CI says that there must be."""
    absent = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if absent or os.geteuid() != 0:
        reason = f"no {', '.join(absent)}" if absent else "not root"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"no hosts: {reason}; as root: apt-get install iproute2 util-linux"
        )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-hosts-")))
        # gloo listens on loopback where the host's own name leads nowhere, and waits for ever.
        names = "".join(f"{NETWORK}.{n} host{n}\n" for n in range(1, count + 1))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        made = tuple(_host(number, folder, stack) for number in range(1, count + 1))
        _connect(made)
        yield made


def _host(number: int, folder: Path, stack: ExitStack) -> Host:
    name = f"host{number}"
    starter = subprocess.Popen(
        ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "sh", "-c",
         INIT, name, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: follow_parent(signal.SIGKILL),
    )  # fmt: skip
    assert starter.stdout is not None
    with starter.stdout as out:
        assert out.readline() == "up\n"
    children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()
    made = Host(name, f"{NETWORK}.{number}", starter, int(children[0]))
    stack.callback(made.power_off)
    return made


def _connect(made: Sequence[Host]) -> None:
    """The first host has the switch; every other one a cable to it."""
    first = made[0]
    _ip(first, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
    # Else it borrows a host's address, which nobody answers to once that host is gone.
    _ip(first, "link", "set", "br0", "address", "02:00:00:00:00:01")
    _ip(first, "addr", "add", f"{first.address}/24", "dev", "br0")
    _ip(first, "link", "set", "br0", "up")
    for host in made[1:]:
        _ip(first, "link", "add", f"v{host.name}", "type", "veth", "peer", "name", "eth0",
            "netns", str(host.init))  # fmt: skip
        _ip(first, "link", "set", f"v{host.name}", "master", "br0", "up")
        _ip(host, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip(host, "link", "set", "eth0", "up")
    time.sleep(0.2)


def _ip(host: Host, *argv: str) -> None:
    # In the host's network, but with process numbers of this machine.
    subprocess.run(["nsenter", "-t", str(host.init), "-n", "ip", *argv], check=True)
