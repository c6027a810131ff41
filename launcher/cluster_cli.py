"""The commands for runs on other machines: `headrace status`.

What a command needs is imported inside it, as in launcher/cli.py.
"""

from __future__ import annotations

import typer

from launcher import options


def status(
    runs: options.Runs, watch: options.Watch = False, as_json: options.AsJson = False
) -> None:
    """Say how runs are doing: attempt, step, loss, speed, last checkpoint, job, events."""
    from launcher.show_status import show_status, watch_status

    if watch and as_json:
        raise typer.BadParameter("--watch is for people; ask for --json as often as you like")
    if watch:
        watch_status(runs)
    else:
        show_status(runs, as_json=as_json)
