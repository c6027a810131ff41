"""Whether ranks, nodes and data are fit for a run, before it begins: what each rank does, and who
judges.

Each rank first writes that it is there, then what it finds out alone, then meets the others and
measures. Rank 0 judges what all have told. When they do not come to the end together, the lowest
rank that notices judges what stands in their files; where no rank can, `--read` does it later.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

from launcher.fitness import Facts, Verdict, judge
from launcher.presence import Presence, folder_of, hosts_that_came, keep_verdict, left_by_ranks
from launcher.rank import place_of
from launcher.show_preflight import show_preflight
from launcher.slurm import hosts_of
from train.config import RunConfig
from train.exclusion import exclude, exclusion_file, host_name
from train.rendezvous import RendezvousError

GRACE_SECONDS = 3.0
"""How long who gives up waits for others that do."""
JUDGE_SECONDS = 10.0
"""How long they wait for the one that judges."""

log = logging.getLogger(__name__)


class PreflightError(ValueError):
    """Something is not fit; the message names it."""

    exit_code: ClassVar[int] = 1


def preflight(config: RunConfig, run: Path, *, seconds: float, as_json: bool) -> str:
    """Collective. Look at this rank and, together, at all; "complete" when training may start.
    PreflightError on one rank when not, and on others when there is no telling.
    """
    presence = _present(run)
    presence.enter("import")
    from launcher import node_facts

    presence.tell(**node_facts.imported(), phase="node")
    if presence.facts.local_rank == 0:
        presence.tell(**node_facts.node(run, os.environ, config), phase="dataset")
        presence.tell(**node_facts.dataset(config, presence.facts.host))
    try:
        facts = _together(presence, run, seconds)
    except (RendezvousError, RuntimeError) as error:
        # Ranks do not come, or, which torch tells, a connection breaks.
        log.debug("preflight", exc_info=error)
        return _alone(presence, run, error, seconds=seconds, as_json=as_json)
    if presence.facts.rank == 0:
        verdict = judge(facts, size=presence.facts.size)
        return _conclude(run, verdict, facts, as_json=as_json)
    return "complete"


def read_preflight(run: Path, *, as_json: bool) -> None:
    """Judge what ranks have left that are no longer there. PreflightError unless all is well."""
    from launcher.node_facts import port_problem

    came = hosts_that_came(run)
    # Without a rank the hosts that ran Python at all are what there is to know.
    facts = left_by_ranks(run) or [Facts(n, len(came), host, 0) for n, host in enumerate(came)]
    if facts and (problem := port_problem(os.environ)):
        facts[0] = replace(facts[0], port_problem=problem)
    hosts = hosts_of(os.environ)
    if not facts and not hosts:
        raise PreflightError(
            f"{folder_of(run)} holds nothing of a preflight; name the --run of one, or leave out "
            "--read to look at the nodes now"
        )
    size = max((one.size for one in facts), default=len(hosts))
    done = len(facts) == size and all(one.phase == "done" for one in facts)
    verdict = judge(facts, size=size, hosts=hosts, failed=not done)
    _conclude(run, verdict, facts, as_json=as_json)


def _present(run: Path) -> Presence:
    rank, size, local_rank = place_of(os.environ)
    if rank == 0:
        (folder_of(run) / "verdict.json").unlink(missing_ok=True)
    return Presence(run, Facts(rank, size, host_name(os.environ), local_rank))


def _together(presence: Presence, run: Path, seconds: float) -> list[Facts]:
    """Collective. Measure, and hear what all ranks have told."""
    from train.preflight import measure
    from train.world import join_world

    presence.enter("rendezvous")
    with join_world(timeout_seconds=seconds) as world:
        found = asdict(measure(world, folder_of(run), presence.enter))
        presence.tell(**found, phase="done")
        return world.gather(presence.facts)


def _alone(
    presence: Presence, run: Path, error: Exception, *, seconds: float, as_json: bool
) -> str:
    """What a rank does that has waited for others in vain."""
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    presence.tell(failure=said)
    time.sleep(GRACE_SECONDS)
    # A network file system lists a folder anew when something was written to it.
    presence.tell()
    # Who began this preflight has given a beat since; what is older is of another one.
    found = left_by_ranks(run, since=presence.began - seconds)
    facts = [one for one in found if one.size == presence.facts.size]
    if presence.facts.rank == min(one.rank for one in facts if one.failure):
        verdict = judge(facts, size=presence.facts.size, hosts=hosts_of(os.environ), failed=True)
        return _conclude(run, verdict, facts, as_json=as_json)
    time.sleep(JUDGE_SECONDS)
    raise PreflightError(f"rank {presence.facts.rank} on {presence.facts.host} gave up: {said}")


def _conclude(run: Path, verdict: Verdict, facts: list[Facts], *, as_json: bool) -> str:
    """Say and keep what has come out; PreflightError unless training may start."""
    exclude(run, verdict.exclude)
    keep_verdict(run, verdict, facts)
    show_preflight(verdict, facts, as_json=as_json)
    if verdict.is_fit:
        return "complete"
    fatal = [finding for finding in verdict.findings if finding.is_fatal]
    checks = ", ".join(dict.fromkeys(finding.check for finding in fatal))
    if verdict.exclude:
        todo = (
            f"{exclusion_file(run)} names {', '.join(verdict.exclude)}: start without "
            f"(--exclude={','.join(verdict.exclude)} of Slurm), or mend what was found, remove the "
            "line there, and run the same command again"
        )
    else:
        todo = "no other node would help: mend what was found, and run the same command again"
    raise PreflightError(f"not fit to train ({checks}); {todo}")
