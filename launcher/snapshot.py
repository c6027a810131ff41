"""The code and the recipe of a job as they were when it was submitted.

    RUN/code/HASH/launcher, train, model, data    the packages
    RUN/code/HASH/recipe/NAME.toml                the recipe, where it is somebody's own file

The job runs from there: editing the clone while it waits, or between two attempts, does not change
the run. HASH is that of the content, and a folder is written once, so that an earlier job keeps
its own. About 1.5 MB each.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data.durable import write_durably, writing
from train.code import digest, sources


@dataclass(frozen=True)
class Snapshot:
    """Files by their relative paths, and the folder that holds them, or will."""

    folder: Path
    files: Mapping[str, bytes]
    recipe: str = ""
    """Relative path of the recipe."""

    @property
    def recipe_path(self) -> Path | None:
        """The recipe, where it was taken along."""
        return self.folder / self.recipe if self.recipe else None

    def write(self) -> None:
        """Write the folder: whole, or not at all. In one that is there, what somebody has removed
        or edited since is put back.
        """
        if self.folder.exists():
            self._mend()
            return
        temporary = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.tmp")
        try:
            with writing(temporary):
                for name, content in self.files.items():
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    (temporary / name).write_bytes(content)
            write_durably(temporary / "complete", b"")
            temporary.rename(self.folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            # Unless another submission was faster, with the same content.
            if not (isinstance(error, OSError) and self.folder.exists()):
                raise

    def _mend(self) -> None:
        # Scratch disks lose files that are old, and edits would train what no name tells.
        for name, content in self.files.items():
            path = self.folder / name
            if not path.is_file() or path.read_bytes() != content:
                with writing(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                write_durably(path, content)


def take(folder: Path, recipe: Path | None = None) -> Snapshot:
    """The sources that run here, for a folder FOLDER/HASH; nothing is written yet."""
    files = sources()
    name = f"recipe/{recipe.name}" if recipe is not None else ""
    if recipe is not None:
        files[name] = recipe.read_bytes()
    return Snapshot(folder / digest(files), files, name)
