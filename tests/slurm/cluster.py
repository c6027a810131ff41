"""A real Slurm cluster of virtual machines on this one: a login node that is the controller, and
compute nodes, each with its own processes, network address, host name and /dev/shm.

Everything lives below one process, which the kernel ends with all that belongs to it when this one
ends. Nothing outside the cluster's folder is written, and the host's network stays as it is. Needs
root, Linux and Debian's slurm-wlm, munge and iproute2; tests are skipped without, unless CI says
that they must not be. Slurm sees no cgroups here: memory is not confined.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from launcher.rank import follow_parent
from tests.slurm import node
from tests.slurm.node import BRIDGE, CONTROLLER, NETWORK
from tests.slurm.processes import below, command_of

TOOLS = ("unshare", "nsenter", "ip", "munged", "slurmctld", "slurmd", "sbatch")
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge iproute2"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ROOT = Path(__file__).resolve().parent.parent.parent


def missing() -> str:
    """Why there can be no cluster here; empty when there can."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: {INSTALL}"
    if os.geteuid() != 0:
        return "virtual machines need root"
    tried = subprocess.run(
        [
            "unshare",
            "--mount",
            "--net",
            "--pid",
            "--uts",
            "--fork",
            "mount",
            "--make-rprivate",
            "/",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def cluster(folder: Path, *, nodes: int, cpus: int = 2) -> Iterator[Cluster]:
    """A cluster for the length of a test; skips where there can be none."""
    reason = missing()
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no Slurm cluster: {reason}")
    made = Cluster(folder, nodes=nodes, cpus=cpus)
    try:
        made.up()
        yield made
    finally:
        made.down()


class Cluster:
    """See above."""

    def __init__(self, folder: Path, *, nodes: int, cpus: int) -> None:
        self.folder = folder
        self.nodes = tuple(f"n{number}" for number in range(1, nodes + 1))
        self._cpus = cpus
        self._machines: dict[str, subprocess.Popen[bytes]] = {}
        """What each was started by, on the host."""

    def up(self) -> None:
        """Start everything; returns when all nodes are idle."""
        for name in ("etc", "log", "state", "spool", "ready"):
            (self.folder / name).mkdir(parents=True)
        for name, content in self._files().items():
            (self.folder / "etc" / name).write_text(content)
        key = self.folder / "etc" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self._start([], CONTROLLER)
        self._until(lambda: (self.folder / "ready" / CONTROLLER).exists(), 20, "a controller")
        for name in self.nodes:
            self.power_on(name)
        self._until(lambda: set(self.states().values()) == {"idle"}, 40, "idle nodes")

    def down(self) -> None:
        """End everything."""
        if self._find(CONTROLLER) is not None:
            os.kill(self._init(), signal.SIGKILL)
        for machine in self._machines.values():
            machine.wait(20)
        self._machines.clear()

    def run(self, *argv: object, **variables: str) -> str:
        """Run a command on the login node; what it printed. CalledProcessError when it fails."""
        done = self.call(*argv, **variables)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def call(self, *argv: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, however it ends."""
        return subprocess.run(
            [*self._enter(), *map(str, argv)],
            env=self._environ(variables),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def states(self) -> dict[str, str]:
        """State of every node, as sinfo writes it."""
        listed = self.call("sinfo", "-h", "-N", "-o", "%N %t").stdout.splitlines()
        return dict(line.split() for line in listed if len(line.split()) == 2)

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        told = self.run("scontrol", "-o", "show", "job", job)
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def until(self, condition: Callable[[], bool], what: str, *, seconds: float = 180) -> None:
        """Wait for something; TimeoutError with the logs when it does not come."""
        self._until(condition, seconds, what)

    def wait(self, job: str, *states: str, seconds: float = 180) -> str:
        """Wait until a job is in one of these states, ended by default; returns which."""
        wanted = states or ENDED
        self._until(lambda: self.job(job)["JobState"] in wanted, seconds, f"job {job} {wanted}")
        return self.job(job)["JobState"]

    def power_off(self, name: str) -> None:
        """Cut a node's cable, then kill all that runs on it: nobody is told."""
        self._ip("link", "del", f"v{name}")
        os.kill(self._init(name), signal.SIGKILL)
        self._machines.pop(name).wait(20)

    def power_on(self, name: str) -> None:
        """Start a node."""
        (self.folder / "ready" / name).unlink(missing_ok=True)
        address = f"{NETWORK}.{10 + int(name[1:])}"
        self._start(self._enter(), name, address)
        self._until(lambda: self._find(name) is not None, 20, f"process 1 of {name}")
        self._ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0",
                 "netns", str(self._init(name)))  # fmt: skip
        self._ip("link", "set", f"v{name}", "master", BRIDGE, "up")
        self._until(lambda: (self.folder / "ready" / name).exists(), 20, f"slurmd of {name}")

    def hang(self, name: str) -> None:
        """Stop every process of a node, as a machine does whose kernel hangs."""
        for pid in self.processes(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def stop_ranks(self, name: str, command: str) -> int:
        """Stop the processes of a node whose command is this one of ours, as a machine does whose
        GPU hangs; how many there were.
        """
        words = f"-m launcher {command} "
        ranks = [pid for pid in self.processes(name) if words in " ".join(command_of(pid))]
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        return len(ranks)

    @contextmanager
    def covered(self, name: str, path: Path, by: Path) -> Iterator[None]:
        """Inside, a node finds another file or folder at this path."""
        # umount asks /proc, which is the node's own.
        enter = ["nsenter", "-t", str(self._init(name)), "-m", "-p"]
        subprocess.run([*enter, "mount", "--bind", str(by), str(path)], check=True)
        try:
            yield
        finally:
            subprocess.run([*enter, "umount", "--lazy", str(path)], check=True)

    def restart_controller(self) -> None:
        """kill -9 slurmctld, and start it again."""
        for pid in below(self._init()):
            if command_of(pid)[:1] == ["slurmctld"]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        with (self.folder / "log" / "slurmctld.out").open("ab") as out:
            self._machines["slurmctld"] = subprocess.Popen(
                [*self._enter(), "slurmctld", "-D"],
                env=self._environ({}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        known = {"idle", "mix", "alloc"}
        self._until(lambda: set(self.states().values()) <= known, 30, "slurmctld again")

    def processes(self, name: str) -> list[int]:
        """Every process of a node, by its number on the host."""
        return [self._init(name), *below(self._init(name))]

    def commands(self) -> list[str]:
        """Command lines of all that jobs have left running on the nodes."""
        daemons = ("slurmd", "sleep")
        found = [command_of(p) for name in self.nodes for p in self.processes(name)[1:]]
        return [" ".join(words) for words in found if words and words[0] not in daemons]

    def _start(self, enter: list[str], name: str, *argv: str) -> None:
        """Start a virtual machine; in the controller's namespaces, unless it is that."""
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._machines[name] = subprocess.Popen(
                [
                    *enter,
                    *("unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child"),
                    *(sys.executable, node.__file__, name, str(self.folder), *argv),
                ],
                env=self._environ({}),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                # Tests that are killed leave no cluster behind.
                preexec_fn=lambda: follow_parent(signal.SIGKILL),
            )

    def _enter(self) -> list[str]:
        return ["nsenter", "-t", str(self._init()), "-m", "-u", "-n", "-p", f"--wd={self.folder}"]

    def _ip(self, *argv: str) -> None:
        # In the controller's network, but with process numbers of the host.
        enter = ["nsenter", "-t", str(self._init()), "-n"]
        subprocess.run([*enter, "ip", *argv], check=True, env=self._environ({}))

    def _init(self, name: str = CONTROLLER) -> int:
        found = self._find(name)
        assert found is not None, f"{name} is off"
        return found

    def _find(self, name: str) -> int | None:
        """Process 1 of a machine, by its number on the host."""
        if name not in self._machines:
            return None
        marked = [node.__file__, name, str(self.folder)]
        started = self._machines[name].pid
        # unshare has the same words, but later ones.
        return next((pid for pid in below(started) if command_of(pid)[1:4] == marked), None)

    def _until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = [
                    f"{p.name}: {p.read_text()[-800:]}" for p in (self.folder / "log").iterdir()
                ]
                raise TimeoutError(f"no {what} after {seconds} s\n" + "\n".join(logs))
            time.sleep(0.2)

    def _environ(self, variables: Mapping[str, str]) -> dict[str, str]:
        # Slurm settings and Python paths of the caller must not leak in.
        own = {"PATH": PATH, "HOME": str(self.folder), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        return own | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"} | dict(variables)

    def _files(self) -> dict[str, str]:
        addresses = {CONTROLLER: 1} | {name: 10 + int(name[1:]) for name in self.nodes}
        hosts = "".join(f"{NETWORK}.{last} {name}\n" for name, last in addresses.items())
        lines = [f"{key}={value}" for key, value in self._settings().items()]
        for name in self.nodes:
            lines.append(
                f"NodeName={name} NodeAddr={NETWORK}.{addresses[name]} CPUs={self._cpus} Boards=1 "
                f"SocketsPerBoard=1 CoresPerSocket={self._cpus} ThreadsPerCore=1 RealMemory=16000 "
                "State=UNKNOWN"
            )
        nodes = ",".join(self.nodes)
        lines += [
            f"PartitionName=batch Nodes={nodes} Default=YES MaxTime=INFINITE PriorityTier=1 "
            "PreemptMode=REQUEUE GraceTime=30 State=UP",
            f"PartitionName=high Nodes={nodes} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF "
            "State=UP",
        ]
        return {
            "slurm.conf": "\n".join(lines) + "\n",
            "gres.conf": "AutoDetect=off\n",
            "plugstack.conf": "",
            "hosts": f"127.0.0.1 localhost\n{hosts}",
            # A name server is out of reach, and each question to one takes seconds.
            "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "ClusterName": "tests",
            "SlurmctldHost": f"{CONTROLLER}({NETWORK}.1)",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder / 'munge.socket'}",
            "CredType": "cred/munge",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool" / "%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "spool" / "%n.pid",
            "SlurmctldLogFile": self.folder / "log" / "slurmctld.log",
            "SlurmdLogFile": self.folder / "log" / "slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SwitchType": "switch/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            # Processors and memory are as written here, whatever this machine has.
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 2,
            "SlurmdTimeout": 6,
            "BatchStartTimeout": 20,
            "MessageTimeout": 5,
            "TCPTimeout": 2,
            "KillWait": 10,
            "UnkillableStepTimeout": 20,
            "MinJobAge": 3600,
            "CompleteWait": 0,
            "JobRequeue": 1,
            # Ports and file names differ from one cluster to the next.
            "FirstJobId": int(time.time()) % 900_000 + 1000,
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,sched_min_interval=0,"
            "bf_interval=1,bf_continue",
            "PriorityType": "priority/basic",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmctldParameters": "preempt_send_user_signal",
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "JobCompType": "jobcomp/filetxt",
            "JobCompLoc": self.folder / "log" / "jobcomp.txt",
            "PropagateResourceLimits": "NONE",
        }
