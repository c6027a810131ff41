"""How a preflight looks: a row for each node, a line for each finding, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from launcher.fitness import Facts, Verdict, nodes_of
from launcher.presence import as_json as json_of

if TYPE_CHECKING:
    from rich.table import Table

FILE_WIDTH = 200


def show_preflight(verdict: Verdict, facts: Sequence[Facts], *, as_json: bool) -> None:
    """Print what a preflight has found."""
    if as_json:
        print(json.dumps(json_of(verdict, facts), indent=2))
        return
    from rich.console import Console

    # A file has no width: what is cut there can no longer be read.
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(_table(facts))
    for line in lines(verdict, facts):
        print(line)
    sys.stdout.flush()


def lines(verdict: Verdict, facts: Sequence[Facts]) -> Iterator[str]:
    """What a person reads below the table."""
    rate = min((o.all_reduce for o in facts if o.all_reduce is not None), default=None)
    if rate is not None:
        yield f"all-reduce over {len(facts)} ranks: {rate / 1e9:,.3g} GB/s per rank"
    for finding in verdict.findings:
        where = ", ".join(finding.hosts) or "the run"
        mark = "unfit" if finding.is_fatal else "note"
        yield f"{mark}: {where}: {finding.check}: {finding.message}; {finding.fix}"
    yield "fit to train" if verdict.is_fit else "not fit to train"


def _table(facts: Sequence[Facts]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("node", overflow="fold")
    for name in (
        "ranks", "GPUs", "matmul TFLOP/s", "pair GB/s", "disk MB/s", "free GB", "shm GB", "nofile",
        "clock s", "import s", "chunks",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for host, ranks in nodes_of(facts).items():
        first = ranks[0]
        table.add_row(
            escape(host),
            str(len(ranks)),
            str(first.num_gpus),
            _shown(_least(one.matmul for one in ranks), 1e12),
            _shown(_least(rate for one in ranks for rate in one.pairs.values()), 1e9),
            _shown(first.disk, 1e6),
            _shown(first.disk_free, 1e9),
            _shown(first.shm_bytes, 1e9),
            "no limit" if first.nofile < 0 else f"{first.nofile:,}",
            "-" if first.skew_seconds is None else f"{first.skew_seconds:+.3f}",
            _shown(max((one.import_seconds or 0.0 for one in ranks), default=0.0), 1),
            "unreadable" if first.dataset_problem else _shown(first.num_shards, 1),
        )
    return table


def _least(rates: Iterable[float | None]) -> float | None:
    return min((rate for rate in rates if rate is not None), default=None)


def _shown(value: float | None, unit: float) -> str:
    if value is None:
        return "-"
    scaled = value / unit
    # g would write a thousand as 1e+03.
    return f"{scaled:,.0f}" if scaled >= 999.5 else f"{scaled:.3g}"
