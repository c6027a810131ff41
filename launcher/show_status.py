"""How the state of runs looks: a paragraph for one, a table for several, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.queue import jobs
from launcher.status import Status, job_of, statuses
from train.durations import large
from train.ownership import BEAT_SECONDS

if TYPE_CHECKING:
    from rich.console import RenderableType

WATCH_SECONDS = 2.0
ASK_SECONDS = 30.0
"""How often Slurm is asked: its controller has others to serve."""
FILE_WIDTH = 200
LATE_SECONDS = 2 * BEAT_SECONDS


def show_status(runs: Sequence[Path], *, as_json: bool) -> None:
    """Print the state of runs."""
    found = _look(runs)
    if as_json:
        listed = [asdict(status) for status in found]
        print(json.dumps(listed[0] if len(listed) == 1 else listed, indent=2))
    elif len(found) == 1:
        print("\n".join(paragraph(found[0])))
    else:
        from rich.console import Console

        # A file has no width: what is cut there can no longer be read.
        console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
        console.print(_table(found))


def watch_status(runs: Sequence[Path], *, seconds: float = WATCH_SECONDS) -> None:
    """Show the state of runs until Ctrl-C: in place on a terminal, in a file one by one."""
    known, asked = _jobs(runs), time.monotonic()
    with suppress(KeyboardInterrupt), _screen() as show:
        while True:
            show(_look(runs, known))
            time.sleep(seconds)
            if time.monotonic() - asked > ASK_SECONDS:
                known, asked = _jobs(runs), time.monotonic()


@contextmanager
def _screen() -> Iterator[Callable[[Sequence[Status]], None]]:
    """Shows states, each in place of the one before where that is possible."""
    from rich.console import Console
    from rich.live import Live

    if not sys.stdout.isatty():
        # Live would hold everything back until its end.
        console = Console(width=FILE_WIDTH, highlight=False)

        def show(found: Sequence[Status]) -> None:
            console.print(_rendered(found), soft_wrap=len(found) == 1)
            sys.stdout.flush()

        yield show
        return
    with Live(auto_refresh=False) as live:
        yield lambda found: live.update(_rendered(found), refresh=True)


def paragraph(status: Status) -> Iterator[str]:
    """The state of one run, line by line."""
    yield f"{status.run}: {_headline(status)}"
    if status.step is not None:
        yield f"  {_progress(status)}"
    if status.checkpoint_step is not None:
        age = duration(status.checkpoint_age or 0)
        yield (
            f"  checkpoint of step {status.checkpoint_step:,}, {age} old; "
            f"{status.num_checkpoints} kept"
        )
    elif status.attempt is not None:
        yield "  no checkpoint yet"
    for text in (status.reason, status.verdict):
        if text:
            yield f"  {text}"
    if status.start_seconds:
        yield f"  start of attempt {status.attempt}: {_start(status)}"
    for event in status.events:
        yield f"  {duration(event['age'])} ago: {_event(event)}"
    if status.is_held:
        yield f"  {status.run}/STOP keeps the run standing until it is removed"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would choose."""
    return large(seconds) or f"{seconds:,.0f} s"


def _look(runs: Sequence[Path], known: Sequence[Any] | None = None) -> list[Status]:
    known = _jobs(runs) if known is None else known
    return statuses(runs, known)


def _jobs(runs: Sequence[Path]) -> list[Any]:
    return jobs(number for number in map(job_of, runs) if number is not None)


def _rendered(found: Sequence[Status]) -> RenderableType:
    if len(found) > 1:
        return _table(found)
    from rich.text import Text

    return Text("\n".join(paragraph(found[0])))


def _headline(status: Status) -> str:
    parts = [_state(status)]
    if status.attempt is not None:
        ranks = f"{status.ranks:,} rank" + "s" * (status.ranks != 1)
        parts.append(f"attempt {status.attempt} on {ranks}")
        parts.append(status.owner)
    if status.job is not None:
        parts.append(_job(status))
    return ", ".join(parts)


def _state(status: Status) -> str:
    said = "ended without a word" if status.state == "gone" else status.state
    age = status.beat_age
    if age is None or (status.state == "running" and age < LATE_SECONDS):
        return said
    return f"{said}, last heartbeat {duration(age)} ago"


def _job(status: Status) -> str:
    job = status.job
    assert job is not None, "asked only where there is one"
    told = f"job {job.id} {job.state}"
    if job.state == "PENDING":
        return f"{told} ({job.reason})"
    return f"{told} on {job.nodes}, {job.time_left} left" if job.state == "RUNNING" else told


def _progress(status: Status) -> str:
    of = f" of {status.steps:,} ({(status.step or 0) / status.steps:.1%})" if status.steps else ""
    parts = [f"step {status.step:,}{of}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.val_loss is not None:
        parts.append(f"val {status.val_loss:.4f}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.mfu:
        parts.append(f"mfu {status.mfu:.1%}")
    if status.eta_seconds is not None:
        parts.append(f"{duration(status.eta_seconds)} to go")
    if status.row_age is not None:
        parts.append(f"last row {duration(status.row_age)} ago")
    return ", ".join(parts)


def _start(status: Status) -> str:
    down = [] if status.down_seconds is None else [f"{status.down_seconds:.1f} s nobody trained"]
    return ", ".join([*down, *(f"{k} {v:.1f} s" for k, v in status.start_seconds.items())])


def _event(event: Mapping[str, Any]) -> str:
    step = f" at step {event['step']:,}" if isinstance(event.get("step"), int) else ""
    reason = f": {event['reason']}" if event.get("reason") else ""
    return f"{event['event']}{step}{reason}"


def _table(found: Sequence[Status]) -> RenderableType:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("state", "attempt", "step", "loss", "tokens/s", "to go", "checkpoint", "job"):
        table.add_column(name, justify="right", overflow="fold")
    for status in found:
        table.add_row(
            escape(status.run),
            _state(status),
            "-" if status.attempt is None else str(status.attempt),
            "-" if status.step is None else f"{status.step:,}",
            "-" if status.loss is None else f"{status.loss:.4f}",
            "-" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
            "-" if status.eta_seconds is None else duration(status.eta_seconds),
            "-" if status.checkpoint_step is None else f"{status.checkpoint_step:,}",
            "-" if status.job is None else f"{status.job.id} {status.job.state}",
        )
    return table
