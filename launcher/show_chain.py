"""Print the chain of a life cycle: stage, job, folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from launcher.chain import Link


def show_chain(links: Sequence[Link], scripts: Mapping[str, str], as_json: bool) -> None:
    """Print every script that there is, and then a line per stage."""
    if as_json:
        rows = [asdict(link) | _script(link, scripts) for link in links]
        print(json.dumps(rows, indent=2))
        return
    for link in links:
        if link.stage in scripts:
            print(f"##### {link.stage} #####\n{scripts[link.stage]}")
    before = ""
    for link in links:
        if link.state == "skipped":
            told = "skipped: unchanged"
        elif link.state == "planned":
            told = f"afterok:{before}" if before else "at once"
            before = link.stage
        else:
            told = f"job {link.job}" + (" (in the queue already)" if link.state == "queued" else "")
        print(f"{link.stage:<9} {told:<18} {link.folder}")


def _script(link: Link, scripts: Mapping[str, str]) -> dict[str, str]:
    return {"script": scripts[link.stage]} if link.stage in scripts else {}
