"""Where ranks meet before the first collective, and who has not come when the time is over.

Each rank leaves its host in the store that the process group is made with, and waits until all
have: what torch would say of a rank that never comes is "wait timeout". The first one to lose
patience lists who is missing, and every rank says the same. Costs a few requests per rank, and as
many as there are ranks of the one that lists. No torch here: the store is an argument.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

expected_hosts: Callable[[], Sequence[str]] = tuple
"""Hosts that are to come, where somebody knows; set by the launcher."""
READ_SECONDS = 2.0
"""How long the rank that holds the store stays, for others to read what was found."""
_MET = "met"


class RendezvousError(ValueError):
    """Ranks did not meet; the message names those that are missing."""

    exit_code: ClassVar[int] = 1


class Store(Protocol):
    """What is used of torch's stores; RuntimeError when the time is over or the server is gone."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: datetime.timedelta, /) -> None: ...


S = TypeVar("S", bound=Store)


@dataclass(frozen=True)
class Meeting:
    """A rendezvous as a rank sees it, from its environment."""

    rank: int
    size: int
    host: str
    address: str
    """HOST:PORT of the store."""
    timeout: datetime.timedelta
    attempt: str
    """Of torchrun: the store may outlive the ranks of one."""
    holds_store: bool
    """Whether the store goes with this process."""
    ranks_per_node: int
    """0 where nobody says."""

    @classmethod
    def of(
        cls,
        environ: Mapping[str, str],
        *,
        rank: int,
        size: int,
        host: str,
        timeout: datetime.timedelta,
    ) -> Meeting:
        """RendezvousError when the environment does not say where."""
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if missing:
            raise RendezvousError(
                f"rank {rank} of {size} does not know where to meet the others: "
                f"{' and '.join(missing)} not set; start ranks by torchrun or srun, or export them"
            )
        tasks = environ.get("LOCAL_WORLD_SIZE") or environ.get("SLURM_STEP_TASKS_PER_NODE", "")
        # "8(x16)" is 16 nodes of 8; after a comma others have another number.
        per_node = "" if "," in tasks else tasks.partition("(")[0]
        return cls(
            rank,
            size,
            host,
            f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}",
            timeout,
            environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            int(per_node) if per_node.isdecimal() else 0,
        )


def meet(meeting: Meeting, connect: Callable[[], S]) -> tuple[S, str]:
    """Collective. The store, when every rank has come to it, and what keys of this meeting begin
    with. RendezvousError on every rank that is there, naming those that are not.
    """
    try:
        store = connect()
    except RuntimeError as error:
        if meeting.holds_store:
            raise
        raise RendezvousError(_unreachable(meeting, error)) from error
    count = store.add(f"headrace/{meeting.attempt}/count", 1)
    # A store may outlive its ranks without a new number of the attempt: that is another meeting,
    # where addresses that ranks of the last one left lead nowhere.
    prefix = f"headrace/{meeting.attempt}/{(count - 1) // meeting.size}"
    store.set(f"{prefix}/{meeting.rank}", meeting.host)
    # Set once: all ranks hear the same, also where the last one comes as another loses patience.
    outcome = f"{prefix}/outcome"
    if count % meeting.size == 0:
        store.compare_set(outcome, "", _MET)
    try:
        try:
            store.wait([outcome], meeting.timeout)
        except RuntimeError:
            came = _came(store, prefix, meeting.size)
            if len(came) < meeting.size:
                store.compare_set(outcome, "", absent(meeting, came, expected_hosts()))
        told = store.get(outcome).decode()
    except RuntimeError as error:
        raise RendezvousError(_unreachable(meeting, error)) from error
    if told == _MET:
        return store, prefix
    if meeting.holds_store:
        time.sleep(READ_SECONDS)
    raise RendezvousError(told)


def absent(meeting: Meeting, came: Mapping[int, str], expected: Sequence[str] = ()) -> str:
    """What to say when only these ranks have come, from these hosts."""
    missing = [rank for rank in range(meeting.size) if rank not in came]
    hosts = list(dict.fromkeys(came.values()))
    told = []
    for host in hosts:
        its = [rank for rank in missing if _host_of(rank, meeting, came) == host]
        if its:
            told.append(f"{_ranks(its)} on {host}")
    elsewhere = [rank for rank in missing if _host_of(rank, meeting, came) is None]
    silent = [host for host in expected if host not in hosts]
    if elsewhere:
        where = f" (nothing has come from {', '.join(silent)})" if silent else ""
        told.append(f"{_ranks(elsewhere)}{where}")
    without = f"without such a host (--exclude={','.join(silent)} of Slurm)" if silent else ""
    return (
        f"{' and '.join(told)} did not come to the rendezvous at {meeting.address} within "
        f"{meeting.timeout.total_seconds():,.0f} s; {len(came)} of {meeting.size} ranks did, from "
        f"{', '.join(hosts)}. Look at what is left of the missing in the log, and whether their "
        f"host reaches {meeting.address}: `headrace preflight`, started as this job was, says what "
        f"is wrong with a host. Then run the same command again{', ' * bool(without)}{without}"
    )


def _came(store: Store, prefix: str, size: int) -> dict[int, str]:
    found = {}
    for rank in range(size):
        if store.check([f"{prefix}/{rank}"]):
            found[rank] = store.get(f"{prefix}/{rank}").decode()
    return found


def _unreachable(meeting: Meeting, error: RuntimeError) -> str:
    said = str(error).splitlines()[0]
    return (
        f"rank {meeting.rank} on {meeting.host} waited in vain for rank 0, which holds the "
        f"rendezvous at {meeting.address} ({said}). See in the log what has become of rank 0, and "
        f"whether this host reaches {meeting.address} (`headrace preflight`, started as this job "
        "was, tells), then run the same command again"
    )


def _host_of(rank: int, meeting: Meeting, came: Mapping[int, str]) -> str | None:
    """Where a rank belongs, when others of its node have come; None when nobody can tell."""
    if not meeting.ranks_per_node:
        return None
    first = rank // meeting.ranks_per_node * meeting.ranks_per_node
    node = range(first, first + meeting.ranks_per_node)
    of_node = {came[other] for other in node if other in came}
    others = {host for other, host in came.items() if other not in node}
    # Ranks that were dealt out in another way share hosts with those of other nodes.
    return of_node.pop() if len(of_node) == 1 and not of_node & others else None


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
