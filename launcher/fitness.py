"""From what every rank has found out to what is wrong, on which node, and what mends it.

Pure: no process, no file, no clock. What is slow is told by comparing with the median of all; the
share of it that is too little stands in SLOW. A node is excluded for what it has and others have
not: what is wrong everywhere, or on either of two nodes that differ, is hardly a node's fault.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

PHASES = (
    "start", "import", "node", "dataset", "rendezvous", "matmul", "disk", "network", "done",
)  # fmt: skip
"""What a rank does, in this order."""
SLOW = {"matmul": 0.7, "matmul on a CPU": 0.33, "disk": 0.2, "network": 0.5}
"""Below this share of the median a node is slow. GPUs of a kind differ by a tenth; CPUs and disks
are shared with others.
"""
SILENT_SECONDS = 10.0
"""A rank whose last beat is so much older than the newest of all no longer answers."""
SHM_BYTES = 2**26
"""Of /dev/shm per rank: NCCL and loader processes pass data through it; a container's default is
so much for all."""
NUM_FILES = 256
"""Open files of a rank, besides FILES_PER_RANK for each rank that it talks to."""
FILES_PER_RANK = 8
SKEW_SECONDS, REFUSED_SKEW_SECONDS = 1.0, 60.0
"""Clocks that differ so much confuse whoever reads logs; so much more, and credentials expire."""
SLOW_IMPORT, SLOW_IMPORT_SECONDS = 3.0, 10.0
"""An import that takes so many times the median, and so much longer."""


@dataclass(frozen=True)
class Facts:
    """What a rank has found out about itself and its node; a node's own by its first rank alone.
    What is None was not measured, or not yet.
    """

    rank: int
    size: int
    host: str
    local_rank: int
    phase: str = "start"
    failure: str = ""
    """Why it gave up."""
    silent_seconds: float = 0.0
    """By how much its last beat is older than the newest of all."""
    import_seconds: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    num_gpus: int = 0
    promised_gpus: int = 0
    """GPUs that Slurm has given to the node."""
    shm_bytes: int | None = None
    """Free in /dev/shm."""
    uses_shm: bool = False
    """Whether GPUs or loader processes need it."""
    nofile: int = -1
    """Limits in force; -1 is none."""
    memlock: int = -1
    core: int = 0
    has_rdma: bool = False
    port_problem: str = ""
    disk_free: int | None = None
    """Bytes where the run is."""
    checkpoint_bytes: int = 0
    keep: int = 0
    dataset_problem: str = ""
    fingerprint: str = ""
    num_shards: int | None = None
    disk_problem: str = ""
    matmul: float | None = None
    """FLOP/s."""
    disk: float | None = None
    """Bytes/s written and synced where the run is."""
    skew_seconds: float | None = None
    """By how much its clock is ahead of rank 0's."""
    pairs: Mapping[str, float] = field(default_factory=dict)
    """Bytes/s of an all-reduce with each other node that this one was tried with."""
    all_reduce: float | None = None
    """Bytes/s of an all-reduce over all ranks."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    check: str
    hosts: tuple[str, ...]
    """Where; empty when nobody can say."""
    message: str
    fix: str
    is_fatal: bool = True
    """Whether training there would fail, or go at the pace of the slow one."""


@dataclass(frozen=True)
class Verdict:
    """What has come out."""

    findings: tuple[Finding, ...]
    exclude: tuple[str, ...]
    """Hosts that others can replace."""

    @property
    def is_fit(self) -> bool:
        """Whether training may start."""
        return not any(finding.is_fatal for finding in self.findings)


def judge(
    facts: Sequence[Facts], *, size: int, hosts: Sequence[str] = (), failed: bool = False
) -> Verdict:
    """The verdict on what `size` ranks have told; `hosts` are those that were asked to come, where
    somebody knows. `failed`: the ranks did not come to the end together.
    """
    came = list(dict.fromkeys([*hosts, *(one.host for one in facts)]))
    findings = [*_absent(facts, size, hosts), *(_stuck(facts) if failed else ())]
    for check in (_versions, _gpus, _limits, _dataset, _space, _slow, _clocks, _imports):
        findings += check(facts)
    if failed and not any(finding.is_fatal for finding in findings):
        findings.append(_unexplained(facts))
    by_check: dict[str, set[str]] = defaultdict(set)
    for finding in findings:
        if finding.is_fatal:
            by_check[finding.check].update(finding.hosts)
    bad = {host for found in by_check.values() if not set(came) <= found for host in found}
    return Verdict(tuple(findings), tuple(sorted(bad)))


def nodes_of(facts: Iterable[Facts]) -> dict[str, list[Facts]]:
    """The ranks of each host, in order of their first rank."""
    nodes: dict[str, list[Facts]] = defaultdict(list)
    for one in sorted(facts, key=lambda one: one.rank):
        nodes[one.host].append(one)
    return dict(nodes)


def _absent(facts: Sequence[Facts], size: int, hosts: Sequence[str]) -> Iterator[Finding]:
    came = {one.host for one in facts}
    if absent := tuple(host for host in hosts if host not in came):
        yield Finding(
            "presence", absent, "never came: nothing of it has reached the run's folder",
            "see whether it answers (`scontrol show node`), mounts that folder, and starts Python",
        )  # fmt: skip
        return
    if missing := sorted(set(range(size)) - {one.rank for one in facts}):
        yield Finding(
            "presence", (),
            f"rank {', '.join(map(str, missing))} of {size} never came; those that did are on "
            f"{', '.join(sorted(came)) or 'no host'}",
            "look at the log of the host that is not among them",
        )  # fmt: skip


def _stuck(facts: Sequence[Facts]) -> Iterator[Finding]:
    """Ranks that no longer answer, else those that are behind all who gave up waiting."""
    open_ones = [one for one in facts if one.phase != "done" and not one.failure]
    silent = [one for one in open_ones if one.silent_seconds > SILENT_SECONDS]
    furthest = max((_order(one) for one in facts if one.failure), default=0)
    behind = [one for one in open_ones if _order(one) < furthest]
    for one in silent or behind:
        how = "no longer answers" if silent else "stands still"
        yield Finding(
            "presence", (one.host,), f"rank {one.rank} {how} at {one.phase}",
            "look at that process and at `dmesg` there; what it waits for is named by its phase",
        )  # fmt: skip


def _unexplained(facts: Sequence[Facts]) -> Finding:
    told = next((one for one in facts if one.failure), None)
    said = f"{told.failure} (rank {told.rank} on {told.host})" if told else "no rank says why"
    return Finding(
        "network", (), f"the ranks did not come to the end together: {said}",
        "see that the hosts reach each other (firewall, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), "
        "and the logs of the ranks",
    )  # fmt: skip


def _versions(facts: Sequence[Facts]) -> Iterator[Finding]:
    names = sorted({name for one in facts for name in one.versions})
    for name in names:
        found = {one.rank: one.versions.get(name, "none") for one in facts if one.versions}
        yield from _odd(facts, found, "versions", name, "install the same on every node")


def _odd(
    facts: Sequence[Facts], found: Mapping[int, str], check: str, name: str, fix: str
) -> Iterator[Finding]:
    """Ranks whose value is not that of most; all of them where no value has the most."""
    counts = Counter(found.values()).most_common()
    if len(counts) < 2:
        return
    usual = counts[0][0] if counts[0][1] > counts[1][1] else None
    if usual is None:
        hosts = _hosts(one for one in facts if one.rank in found)
        told = ", ".join(f"{value} on rank {rank}" for rank, value in sorted(found.items())[:4])
        yield Finding(check, hosts, f"{name} differs: {told}; nobody can say which is right", fix)
        return
    for value, _ in counts:
        hosts = _hosts(one for one in facts if found.get(one.rank) == value)
        if value != usual:
            yield Finding(check, hosts, f"{name} is {value}, and {usual} on most ranks", fix)


def _gpus(facts: Sequence[Facts]) -> Iterator[Finding]:
    has_gpus = any(one.num_gpus for one in facts)
    for host, ranks in nodes_of(facts).items():
        needed = max(len(ranks) if has_gpus else 0, ranks[0].promised_gpus)
        known = [one.num_gpus for one in ranks if one.import_seconds is not None]
        if known and min(known) < needed:
            yield Finding(
                "gpus", (host,), f"{min(known)} GPUs are visible, {needed} are needed",
                "see `nvidia-smi` and CUDA_VISIBLE_DEVICES there, and that torch is a CUDA build",
            )  # fmt: skip


def _limits(facts: Sequence[Facts]) -> Iterator[Finding]:
    several = len({one.host for one in facts}) > 1
    for host, ranks in nodes_of(facts).items():
        first, shm = ranks[0], SHM_BYTES * len(ranks)
        if first.shm_bytes is not None and first.shm_bytes < shm:
            yield Finding(
                "shm", (host,), f"/dev/shm has {first.shm_bytes:,} bytes free, {len(ranks)} ranks "
                f"should have {shm:,}", "remove what others left there, or give it more: "
                "`mount -o remount,size=SIZE /dev/shm`, --shm-size of a container",
                is_fatal=any(one.uses_shm for one in ranks),
            )  # fmt: skip
        files = NUM_FILES + FILES_PER_RANK * first.size
        if 0 <= first.nofile < files:
            yield Finding(
                "nofile", (host,), f"{first.nofile:,} files may be open, {first.size} ranks need "
                f"about {files:,}", f"`ulimit -n {files}` before the ranks start, or limits.conf",
            )  # fmt: skip
        if several and first.has_rdma and first.memlock >= 0:
            yield Finding(
                "memlock", (host,), f"{first.memlock:,} bytes may be locked, and RDMA needs more",
                "`ulimit -l unlimited` (LimitMEMLOCK=infinity of slurmd)",
            )  # fmt: skip
        if first.core != 0:
            yield Finding(
                "core", (host,), "a rank that crashes writes its memory to disk",
                "`ulimit -c 0` before the ranks start", is_fatal=False,
            )  # fmt: skip
        if first.port_problem:
            yield Finding(
                "port", (), f"{host}: {first.port_problem}",
                "see who listens there (`ss -ltnp`), or export MASTER_PORT=ANOTHER",
            )  # fmt: skip


def _dataset(facts: Sequence[Facts]) -> Iterator[Finding]:
    for one in facts:
        if one.dataset_problem:
            yield Finding(
                "dataset", (one.host,), one.dataset_problem,
                "see that the node mounts it, and reads what the others read",
            )  # fmt: skip
    found = {one.rank: one.fingerprint for one in facts if one.fingerprint}
    fix = "have all nodes read the same copy"
    short = {rank: value[:16] for rank, value in found.items()}
    yield from _odd(facts, short, "dataset", "the fingerprint", fix)


def _space(facts: Sequence[Facts]) -> Iterator[Finding]:
    for one in facts:
        if one.disk_problem:
            yield Finding("disk", (one.host,), one.disk_problem, "mend that disk, or its mount")
        elif one.disk_free is not None and one.disk_free < one.checkpoint_bytes * (one.keep + 1):
            yield Finding(
                "disk", (one.host,), f"{one.disk_free:,} bytes are free where the run is; a "
                f"checkpoint takes {one.checkpoint_bytes:,}, and {one.keep} are kept",
                "make room, lower checkpoint.keep, or put the run on another disk",
                is_fatal=one.disk_free < one.checkpoint_bytes,
            )  # fmt: skip


def _slow(facts: Sequence[Facts]) -> Iterator[Finding]:
    units = {"matmul": (1e12, "TFLOP/s"), "disk": (1e6, "MB/s"), "network": (1e9, "GB/s")}
    fixes = {
        "matmul": "see clocks, temperature and other processes there (`nvidia-smi -q`, `top`)",
        "disk": "see its mount and who else writes from there",
        "network": "see its cables and interfaces (`ibstat`, `ethtool`), NCCL_DEBUG=INFO",
    }
    for check, rates in (
        ("matmul", {one.rank: one.matmul for one in facts}),
        ("disk", {one.rank: one.disk for one in facts}),
        # A node that is slow is slow with every other one.
        ("network", {one.rank: max(one.pairs.values(), default=None) for one in facts}),
    ):
        known = {rank: rate for rank, rate in rates.items() if rate is not None}
        if len(known) < 2:
            continue
        on_cpu = check == "matmul" and not any(one.num_gpus for one in facts)
        share = SLOW["matmul on a CPU" if on_cpu else check]
        usual, (unit, name) = median(known.values()), units[check]
        for one in facts:
            rate = known.get(one.rank)
            if rate is not None and rate < share * usual:
                yield Finding(
                    check, (one.host,), f"rank {one.rank}: {rate / unit:,.3g} {name}, below "
                    f"{share:.0%} of the median, {usual / unit:,.3g}", fixes[check],
                )  # fmt: skip


def _clocks(facts: Sequence[Facts]) -> Iterator[Finding]:
    known = {one.host: one.skew_seconds for one in facts if one.skew_seconds is not None}
    # It may be rank 0's own clock that is wrong; of two that differ nobody can say which.
    usual = median(known.values()) if known else 0.0
    for host, skew in known.items():
        if abs(skew - usual) > SKEW_SECONDS:
            yield Finding(
                "clock", (host,), f"its clock differs by {skew - usual:+,.1f} s from the median",
                "start chronyd or systemd-timesyncd there",
                is_fatal=abs(skew - usual) > REFUSED_SKEW_SECONDS,
            )  # fmt: skip


def _imports(facts: Sequence[Facts]) -> Iterator[Finding]:
    known = {o.host: o.import_seconds for o in facts if o.import_seconds is not None}
    usual = median(known.values()) if known else 0.0
    for host, seconds in known.items():
        if seconds > SLOW_IMPORT * usual and seconds > usual + SLOW_IMPORT_SECONDS:
            yield Finding(
                "import", (host,), f"importing took {seconds:.1f} s, {usual:.1f} s in the median",
                "see its mount of the Python environment", is_fatal=False,
            )  # fmt: skip


def _hosts(facts: Iterable[Facts]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.host for one in facts))


def _order(one: Facts) -> int:
    return PHASES.index(one.phase)
