"""Files that come from elsewhere have a name of their own until they are whole, in a folder beside
what they become: two that fetch the same at once never write one file.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.durable import publish, remove_leftovers, writing

_FOLDER = ".drafts"


@contextmanager
def draft(path: Path, folder: Path) -> Iterator[Path]:
    """Where to write what becomes `path`, somewhere below `folder`, when the block ends well; it
    has to be synced. After an error nothing is left.
    """
    drafts = folder / _FOLDER
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        drafts.mkdir(parents=True, exist_ok=True)
    temporary = drafts / f"{secrets.token_hex(8)}-{path.name[-100:]}"
    try:
        yield temporary
        publish(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            drafts.rmdir()


def remove_drafts(folder: Path) -> None:
    """Remove what a kill has left; nobody else may be writing there."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)
    remove_leftovers(*folder.glob("*/"))
