"""Print the chain of a life cycle: stage, job, folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
    told = list(_told(links))
    width = max(map(len, told), default=0)
    for link, words in zip(links, told, strict=True):
        print(f"{link.stage:<9} {words:<{width}}  {link.folder}")


def _told(links: Sequence[Link]) -> Iterator[str]:
    """What became of each stage."""
    before = ""
    for link in links:
        if link.state == "skipped":
            yield "skipped: unchanged"
        elif link.state == "planned":
            yield f"afterok:{before}" if before else "at once"
            before = link.stage
        else:
            yield f"job {link.job}" + (" (in the queue already)" if link.state == "queued" else "")


def _script(link: Link, scripts: Mapping[str, str]) -> dict[str, str]:
    return {"script": scripts[link.stage]} if link.stage in scripts else {}
