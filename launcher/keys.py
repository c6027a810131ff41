"""What a stage of a life cycle was made from, as one hash: settings, input files, earlier stages.

    OUTPUT.stage/KEY.json        what was submitted; the job's script copies it, at its end, to
    OUTPUT.stage/complete.json   what OUTPUT was made from
    OUTPUT.stage/KEY.job         the job that is making it

Files count by their content, not by their dates, so that every submission reads the inputs once, at
the speed of the disk. What only says where and how fast (Slurm, the outputs' names) does not count.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data.durable import write_durably


@dataclass(frozen=True)
class Origin:
    """All that decides what a stage makes."""

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Path -> hash of its content."""
    upstream: Mapping[str, str] = field(default_factory=dict)
    """Stage -> its key."""

    @property
    def key(self) -> str:
        """One hash of it all."""
        content = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(content.encode())

    def differences(self, made: Mapping[str, Any]) -> list[str]:
        """What differs from the origin that `complete_origin` has read."""
        found = []
        for part in ("settings", "inputs", "upstream"):
            before, now = made.get(part, {}), getattr(self, part)
            for name in sorted(before.keys() | now.keys()):
                if before.get(name) == now.get(name):
                    continue
                if part == "settings":
                    found.append(f"{name}: {before.get(name)!r} -> {now.get(name)!r}")
                else:
                    kind = "stage" if part == "upstream" else "file"
                    found.append(f"{kind} {name} is another one")
        return found


def folder_of(output: Path) -> Path:
    """Where the scripts, logs and keys of a stage lie."""
    return output.with_name(f"{output.name}.stage")


def record_of(output: Path, origin: Origin) -> Path:
    """The file that a job copies when it is done."""
    return folder_of(output) / f"{origin.key}.json"


def write_record(output: Path, origin: Origin) -> None:
    """Write down what a job is submitted to make."""
    path = record_of(output, origin)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"key": origin.key, **asdict(origin)}
    write_durably(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def complete_origin(output: Path) -> dict[str, Any] | None:
    """What an output was made from; None where no stage has completed it."""
    try:
        found = json.loads((folder_of(output) / "complete.json").read_bytes())
    except (OSError, ValueError):
        return None
    parts = ("settings", "inputs", "upstream")
    is_record = isinstance(found, dict) and all(isinstance(found.get(p), dict) for p in parts)
    return found if is_record else None


def contents(words: Iterable[str]) -> dict[str, str]:
    """Path -> hash of its content, for each word that names a file or folder, or a file behind an
    equals sign (--tokenizer=FILE, data.val=FILE).
    """
    found = {}
    for word in words:
        value = word.partition("=")[2]
        if _is_there(word):
            found[word] = content_hash(Path(word))
        elif _is_there(value) and Path(value).is_file():
            found[value] = content_hash(Path(value))
    return found


def _is_there(word: str) -> bool:
    if not word:
        return False
    try:
        return Path(word).exists()
    except OSError as error:
        # An expression, perhaps, that is longer than a name may be.
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def content_hash(path: Path) -> str:
    """Hash of a file, or of all files below a folder with their names; of a dataset, of its
    manifest, which holds the hashes of the rest.
    """
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
    if (path / "manifest.json").is_file():
        return content_hash(path / "manifest.json")
    digest = xxhash.xxh3_128()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path).as_posix()}\0{content_hash(file)}\n".encode())
    return digest.hexdigest()
