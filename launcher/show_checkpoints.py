"""How checkpoints look: tables for people on stdout, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from train.compare import Comparison, Difference
from train.listing import Listed, Listing, Verification
from train.pruning import Pruned

MAX_ROWS = 20
"""Parameters that are shown; --json has all."""
MAX_VALUE = 60
"""Characters of a value that are shown."""
FILE_WIDTH = 200


def show_list(run: Path, found: Listing, *, as_json: bool) -> None:
    """Print one line per checkpoint, newest first, and what is wrong below."""
    if as_json:
        _print_json({"run": str(run), **asdict(found)})
        return
    rows = found.checkpoints
    if rows:
        _show_rows(rows)
    else:
        print(f"{run} has no checkpoint yet")
    if found.mirror_problem:
        print(f"nothing is told of the mirror: {found.mirror_problem}")


def show_verification(found: Verification, *, as_json: bool) -> None:
    """Print every damage, and which checkpoint a resume takes."""
    if as_json:
        _print_json(found.to_json())
        return
    for damage in found.damages:
        print(f"damaged: step {damage.step}: {damage.message}")
    bad = {damage.step for damage in found.damages}
    intact = [str(step) for step in found.steps if step not in bad]
    print(
        f"{found.run}: {found.bytes_read:,} bytes of {len(found.steps)} checkpoints read; intact: "
        f"{', '.join(intact) or 'none'}"
    )
    for passed in found.choice.passed_over:
        print(f"a resume passes over step {passed.step}: {passed.reason}")
    if found.mirror_problem:
        print(f"the mirror was not asked, which a resume does: {found.mirror_problem}")
    taken = found.choice.taken
    where = f" from the mirror {found.mirror}" if found.mirror else ""
    print(f"a resume takes step {taken.step}{where}" if taken else "a resume finds none to take")


def show_comparison(found: Comparison, *, as_json: bool) -> None:
    """Print what differs; parameters the farthest apart first."""
    if as_json:
        _print_json(found.to_json())
        return
    print(f"1: {found.first}\n2: {found.second}")
    for name, rows in (
        ("manifest", found.manifest),
        ("state", found.state),
        ("config", found.config),
    ):
        _show_values(name, rows)
    differing = found.parameters
    print(f"parameters: {len(differing)} of {found.num_parameters} differ")
    if differing:
        table = _table("parameter", "largest difference", "elements that differ", "elements")
        for row in differing[:MAX_ROWS]:
            numbers = (f"{row.num_different:,}", f"{row.size:,}")
            table.add_row(escape(row.name), f"{row.max_abs:.3e}", *numbers)
        _print(table)
    if len(differing) > MAX_ROWS:
        print(f"and {len(differing) - MAX_ROWS} more, which --json has")


def show_pruned(run: Path, done: Pruned, *, as_json: bool) -> None:
    """Print what went, or would go, and what stays."""
    if as_json:
        _print_json({"run": str(run), **done.to_json()})
        return
    for folder in done.removed:
        print(f"{'would remove' if done.dry_run else 'removed'} {folder}")
    print(
        f"{run}: {len(done.removed)} folders with {done.bytes:,} bytes "
        f"{'would go' if done.dry_run else 'went'}; steps that stay: "
        f"{', '.join(map(str, done.kept)) or 'none'}"
    )


def _show_rows(rows: Sequence[Listed]) -> None:
    has_mirror = any(row.mirror for row in rows)
    where = ["where"] * has_mirror
    table = _table(
        "step", "committed", "bytes", "files", "ranks", "stage", "tokens", "sizes", *where
    )
    for row in rows:
        when = None if row.time is None else datetime.fromtimestamp(row.time)
        table.add_row(
            f"{row.step:,}",
            f"{when:%Y-%m-%d %H:%M:%S}" if when else "-",
            *(
                _number(value)
                for value in (row.bytes, row.files, row.world_size, row.zero_stage, row.tokens)
            ),
            "fit" if row.problem is None else "see below",
            *[("mirror" if row.mirror else "run")] * has_mirror,
        )
    _print(table)
    if has_mirror:
        print(f"mirror: {next(row.mirror for row in rows if row.mirror)}")
    for row in rows:
        if row.problem is not None:
            print(f"step {row.step}: {row.problem}")


def _show_values(name: str, rows: Iterable[Difference]) -> None:
    found = list(rows)
    print(f"{name}: {f'{len(found)} values differ' if found else 'the same'}")
    if not found:
        return
    table = _table("key", "1", "2")
    for row in found:
        table.add_row(escape(row.key), _short(row.first), _short(row.second))
    _print(table)


def _table(first: str, *rest: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in rest:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _print(table: Table) -> None:
    # A file has no width: what is cut or folded there can no longer be read.
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table)


def _short(value: Any) -> str:
    text = str(value)
    return escape(text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "...")


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _print_json(result: Any) -> None:
    print(json.dumps(result, indent=2))
