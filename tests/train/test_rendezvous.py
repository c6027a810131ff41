"""Ranks that never come to the rendezvous are named by all that did, with real ranks and stores."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
from torch.distributed import HashStore, TCPStore

from tests.ranks import _context, _free_port, start_server
from train.rendezvous import Meeting, RendezvousError, absent, meet

SECONDS, TRIALS, PATIENCE = 3, 80, timedelta(milliseconds=40)
Told = tuple[str, str]
"""Type of what a rank raised, and its message; ("", "met") when it met the others."""


def come(pipe: Connection, environ: Mapping[str, str], expected: Sequence[str]) -> None:
    """Be a rank; what has become of it."""
    from train import rendezvous
    from train.world import join_world

    os.environ.update(environ)
    rendezvous.expected_hosts = lambda: expected
    try:
        with join_world(timeout_seconds=SECONDS) as world:
            pipe.send(("", f"met {world.size}"))
    except Exception as error:
        pipe.send((type(error).__name__, str(error)))


def ranks(
    port: int, size: int, come_from: Mapping[int, str], *expected: str, **more: str
) -> dict[int, Told]:
    """What becomes of these ranks, which come from these hosts."""
    start_server()
    running = {}
    for rank, host in come_from.items():
        receiver, sender = _context.Pipe(duplex=False)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURMD_NODENAME": host}
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": "2",
        }
        process = _context.Process(target=come, args=(sender, place | own | more, expected))
        process.start()
        sender.close()
        running[rank] = process, receiver
    try:
        for _, receiver in running.values():
            assert receiver.poll(60), "it waits for longer than it was told to"
        return {rank: receiver.recv() for rank, (_, receiver) in running.items()}
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


def test_every_rank_that_came_names_the_one_that_did_not() -> None:
    port = _free_port()
    found = ranks(port, 4, {0: "n1", 1: "n1", 3: "n2"}, "n1", "n2")
    assert {kind for kind, _ in found.values()} == {"RendezvousError"}
    (message,) = {message for _, message in found.values()}
    assert message.startswith(
        f"rank 2 on n2 did not come to the rendezvous at 127.0.0.1:{port} within {SECONDS} s; "
        "3 of 4 ranks did, from n1, n2. "
    )
    assert "`headrace preflight`, started as this job was, says what is wrong" in message
    assert message.endswith("run the same command again")


def test_a_host_from_which_nobody_came_is_named() -> None:
    found = ranks(_free_port(), 4, {0: "n1", 1: "n1"}, "n1", "n2")
    for _, message in found.values():
        assert message.startswith("ranks 2, 3 (nothing has come from n2) did not come to the ")
        assert message.endswith("without such a host (--exclude=n2 of Slurm)")


def test_the_rank_that_holds_the_rendezvous_is_named_when_nobody_answers() -> None:
    port = _free_port()
    ((kind, message),) = ranks(port, 2, {1: "n2"}).values()
    assert kind == "RendezvousError"
    where = f"rank 0, which holds the rendezvous at 127.0.0.1:{port} ("
    assert message.startswith(f"rank 1 on n2 waited in vain for {where}")
    assert "headrace preflight" in message


def test_ranks_meet_in_a_store_that_outlives_them_and_later_ones_hear_who_was_missing() -> None:
    port = _free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    # Of an agent's store rank 0 is a client as any other.
    ((_, message),) = ranks(port, 2, {1: "n2"}, **shared).values()
    assert message.startswith("rank 0 on n2 did not come to the rendezvous at ")
    assert ranks(port, 2, {0: "n1"}, **shared) == {0: ("RendezvousError", message)}
    # The next attempt, and one after it that the agent gives no new number.
    shared["TORCHELASTIC_RESTART_COUNT"] = "1"
    for _ in range(2):
        met = ranks(port, 2, {0: "n1", 1: "n2"}, **shared)
        assert met == {0: ("", "met 2"), 1: ("", "met 2")}
    assert store.num_keys() > 0


def attend(rank: int, store: HashStore, delay: float) -> str:
    """Come after so many seconds; what is heard."""
    time.sleep(delay)
    own = replace(MEETING, rank=rank, size=3, holds_store=False, timeout=PATIENCE)
    try:
        meet(own, lambda: store)
    except RendezvousError as error:
        return str(error)
    return "met"


def test_all_ranks_hear_the_same_when_the_last_one_comes_as_patience_ends() -> None:
    met = []
    for trial in range(TRIALS):
        store = HashStore()
        delays = (0.0, 0.0, 2 * PATIENCE.total_seconds() * trial / TRIALS)
        with ThreadPoolExecutor(3) as pool:
            heard = set(pool.map(attend, range(3), [store] * 3, delays))
        assert len(heard) == 1, heard
        met.append(heard == {"met"})
    assert met[0] and not met[-1]


MEETING = Meeting(0, 8, "a", "a:29500", timedelta(seconds=660), "0", True, 4)


@pytest.mark.parametrize(
    ("came", "per_node", "expected", "told"),
    [
        ({r: "ab"[r // 4] for r in range(7)}, 4, (), "rank 7 on b did not come"),
        (
            {r: "ab"[r // 4] for r in (0, 1, 4)},
            4,
            (),
            "ranks 2, 3 on a and ranks 5, 6, 7 on b did not come",
        ),
        ({0: "a", 1: "a"}, 4, (), "ranks 2, 3 on a and ranks 4, 5, 6, 7 did not come"),
        # Dealt out in turn: where a missing rank belongs nobody can tell.
        ({r: "ab"[r % 2] for r in range(7)}, 4, ("a", "b"), "rank 7 did not come"),
        ({r: "ab"[r // 4] for r in range(7)}, 0, (), "rank 7 did not come"),
        (
            {r: "a" for r in range(4)},
            4,
            ("a", "b"),
            "ranks 4, 5, 6, 7 (nothing has come from b) did not come",
        ),
    ],
)
def test_a_missing_rank_has_a_host_where_its_neighbours_came_from_one(
    came: dict[int, str], per_node: int, expected: tuple[str, ...], told: str
) -> None:
    message = absent(replace(MEETING, ranks_per_node=per_node), came, expected)
    assert message.startswith(f"{told} to the rendezvous at a:29500 within 660 s; ")
    assert f"{len(came)} of 8 ranks did" in message


def test_ranks_per_node_are_read_where_they_are_the_same_on_all() -> None:
    def per_node(**more: str) -> int:
        environ = {"MASTER_ADDR": "a", "MASTER_PORT": "1", **more}
        where = {"rank": 1, "size": 8, "host": "a", "timeout": timedelta(seconds=1)}
        return Meeting.of(environ, **where).ranks_per_node

    assert per_node(LOCAL_WORLD_SIZE="4") == 4
    assert per_node(SLURM_STEP_TASKS_PER_NODE="8(x16)") == 8
    assert per_node(SLURM_STEP_TASKS_PER_NODE="8") == 8
    assert per_node(SLURM_STEP_TASKS_PER_NODE="8(x3),4") == 0 == per_node()


def test_who_does_not_know_where_to_meet_is_told_what_to_set() -> None:
    with pytest.raises(RendezvousError, match=re.escape("MASTER_PORT not set; start ranks by ")):
        Meeting.of({"MASTER_ADDR": "a"}, rank=1, size=2, host="a", timeout=timedelta(seconds=1))
