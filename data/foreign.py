"""Tars of integer arrays that others wrote, copied into a dataset: text, image or audio tokens.

Each array is a document; EOS is appended where it does not end in one already. The tars are copied
into token shards, because only these carry the hashes that every reader checks. Documents keep the
order of tars and members; a share is held out by the hash of their tokens, so copies of a document
are on one side. The bytes depend on the tars, the tokenizer and the settings alone. Nothing is
written before every member was read and found good; after a kill the same command begins again.
Cost: one pass to check and one per side. Memory: a chunk and a tar's list of keys.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.claim import another_command, differences, holding, read_claim, write_claim
from data.config import DataError, DataUsageError, PrepareConfig
from data.durable import file_sha256
from data.foreign_tar import TYPES, Array, read_arrays
from data.manifest import MANIFEST, Manifest, ShardEntry, dtype_for, read_manifest, write_manifest
from data.shards import write_shard
from data.tokenizer import (
    Tokenizer,
    copy_tokenizer,
    load_tokenizer,
    special_ids,
    tokenizer_file,
)
from data.vocabulary import tokenizer_identity

KIND = "dataset"
SHARD_TOKENS = 2**29
"""Tokens after which the next shard begins."""
MAX_DOCUMENT = 2**32 - 1


@dataclass(frozen=True)
class Indexed:
    """What `index` left in `output`."""

    output: Path
    manifest: Manifest
    was_complete: bool
    """The same command had finished before; nothing was written."""
    eos_appended: int
    """Documents that did not end in EOS."""
    eos_inside: int
    """Documents that hold EOS before their end, too."""
    ignored: dict[str, int]
    """Ending -> members that were left alone."""


@dataclass
class _Found:
    """Counts over all documents."""

    documents: int = 0
    held_out: int = 0
    with_bos: int = 0
    eos_appended: int = 0
    eos_inside: int = 0
    ignored: Counter[str] = field(default_factory=Counter)


def index(
    tars: Sequence[Path],
    output: Path,
    *,
    tokenizer: Path,
    dtype: str | None = None,
    val_fraction: float = 0.0,
    source: str = "main",
) -> Indexed:
    """Write the dataset `output` from the arrays in `tars`; `dtype` is that of raw .bin members.

    DataUsageError for what cannot be training data and for an `output` that another command began,
    DataError for a tar that is damaged.
    """
    _check_request(tars, dtype, val_fraction, source)
    tokenizer = tokenizer_file(tokenizer) if tokenizer.is_dir() else tokenizer
    identity = tokenizer_identity(tokenizer, PrepareConfig())
    config = {"dtype": dtype, "val_fraction": val_fraction, "source": source, "kind": "index"}
    inputs = _inputs(tars)
    command: dict[str, Any] = {"config": config, "tokenizer": identity, "inputs": inputs}
    if _is_complete(output, command):
        return _indexed(output, read_manifest(output), was_complete=True)
    loaded = load_tokenizer(tokenizer)
    found = _survey(tars, loaded, dtype, val_fraction)
    with holding(output):
        # Asked again: another command may have begun or finished there since.
        if _is_complete(output, command):
            return _indexed(output, read_manifest(output), was_complete=True)
        if read_claim(output, KIND) is None:
            write_claim(output, KIND, command)
        file = copy_tokenizer(tokenizer, output)
        entries: list[ShardEntry] = []
        for side in ("train", "val"):
            texts = _documents(tars, loaded, dtype, _Found())
            own = (ids for ids in texts if _is_held_out(ids, val_fraction) == (side == "val"))
            if side == "train" or found.held_out:
                entries += _write(output / side / source, own, loaded.vocab_size)
        if _inputs(tars) != inputs:
            raise DataError(
                f"a tar changed while it was copied; remove {output} and run the command again"
            )
        return _commit(output, file, loaded, entries, found, command)


def _inputs(tars: Sequence[Path]) -> list[dict[str, Any]]:
    return [{"name": t.name, "bytes": t.stat().st_size, "sha256": file_sha256(t)} for t in tars]


def _survey(
    tars: Sequence[Path], tokenizer: Tokenizer, dtype: str | None, val_fraction: float
) -> _Found:
    """Read everything once, so that what is refused is refused before anything is written."""
    found = _Found()
    for ids in _documents(tars, tokenizer, dtype, found):
        found.held_out += _is_held_out(ids, val_fraction)
    if found.held_out == found.documents:
        raise DataUsageError(
            f"--val-fraction {val_fraction} holds out all {found.documents} documents; lower it"
        )
    return found


def _check_request(
    tars: Sequence[Path], dtype: str | None, val_fraction: float, source: str
) -> None:
    if not tars:
        raise DataUsageError("no tar is named")
    if dtype is not None and dtype not in TYPES:
        raise DataUsageError(f"--dtype {dtype!r} is none of {' '.join(TYPES)}")
    if not 0 <= val_fraction < 1:
        raise DataUsageError(f"--val-fraction {val_fraction} is no share; name one from 0 to 1")
    if not source or source.startswith(".") or "/" in source or "\0" in source:
        raise DataUsageError(f"--source {source!r} cannot name a folder; use letters and digits")
    seen: set[Path] = set()
    for tar in tars:
        if not tar.is_file():
            raise DataUsageError(f"{tar}: no such file; name .tar files")
        if tar.resolve() in seen:
            raise DataUsageError(f"{tar} is named twice; its documents would be trained on twice")
        seen.add(tar.resolve())


def _documents(
    tars: Sequence[Path], tokenizer: Tokenizer, dtype: str | None, found: _Found
) -> Iterator[NDArray[Any]]:
    """Every document of every tar, checked and with EOS at its end."""
    for tar in tars:
        for array in read_arrays(tar, dtype=dtype, ignored=found.ignored):
            _check_ids(array, tokenizer.vocab_size)
            ids, eos = array.ids, tokenizer.eos_id
            found.documents += 1
            found.with_bos += int(ids[0]) == tokenizer.bos_id
            found.eos_inside += bool(np.any(ids[:-1] == eos))
            if int(ids[-1]) != eos:
                found.eos_appended += 1
                ids = np.append(ids.astype("<i8"), eos)
            yield ids.astype("<u4")


def _check_ids(array: Array, vocab_size: int) -> None:
    low, high = int(array.ids.min()), int(array.ids.max())
    if low < 0:
        raise DataUsageError(
            f"{array.where}: id {low} at place {int(array.ids.argmin())} is negative; "
            "padding and masks are no tokens, leave them out"
        )
    if high >= vocab_size:
        raise DataUsageError(
            f"{array.where}: id {high} at place {int(array.ids.argmax())} is outside the "
            f"vocabulary of {vocab_size} ids; name the --tokenizer that the tokens were made with"
        )
    if len(array.ids) >= MAX_DOCUMENT:
        raise DataUsageError(f"{array.where} has {len(array.ids)} tokens; cut it into documents")


def _is_held_out(ids: NDArray[Any], val_fraction: float) -> bool:
    if not val_fraction:
        return False
    digest = hashlib.blake2b(ids.tobytes(), digest_size=8, person=b"headrace split").digest()
    return int.from_bytes(digest, "little") < int(val_fraction * 2**64)


def _write(
    folder: Path, documents: Iterator[NDArray[Any]], vocab_size: int
) -> Iterator[ShardEntry]:
    """Shards of whole documents."""
    for number, first in enumerate(documents):
        path = folder / f"shard-{number:06d}.tar"
        yield write_shard(path, _up_to(first, documents), dtype_for(vocab_size))


def _up_to(first: NDArray[Any], rest: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    size = 0
    for ids in chain([first], rest):
        yield ids
        size += len(ids)
        if size >= SHARD_TOKENS:
            return


def _commit(
    output: Path,
    file: Path,
    tokenizer: Tokenizer,
    entries: Sequence[ShardEntry],
    found: _Found,
    command: Mapping[str, Any],
) -> Indexed:
    counts = {"files": len(command["inputs"]), "documents": found.documents}
    for side in ("train", "val"):
        counts[f"documents_{side}"] = sum(e.documents for e in entries if e.split == side)
        counts[f"tokens_{side}"] = sum(e.tokens for e in entries if e.split == side)
    told = {
        "eos_appended": found.eos_appended,
        "eos_inside": found.eos_inside,
        "ignored": dict(sorted(found.ignored.items())),
    }
    bos = found.with_bos == found.documents
    manifest = write_manifest(
        output,
        entries,
        tokenizer=file,
        vocab_size=tokenizer.vocab_size,
        special_ids=special_ids(tokenizer),
        preparation={
            "config": {**command["config"], "bos": bos},
            "inputs": command["inputs"],
            "found": told,
        },
        split_rule=f"a document is held out when the hash of its tokens is below "
        f"{command['config']['val_fraction']} of all hashes",
        counts=counts,
    )
    return _indexed(output, manifest, was_complete=False)


def _indexed(output: Path, manifest: Manifest, *, was_complete: bool) -> Indexed:
    return Indexed(output, manifest, was_complete, **manifest.preparation["found"])


def _is_complete(output: Path, command: Mapping[str, Any]) -> bool:
    """Whether this command has finished there. DataUsageError where another one has begun."""
    claim = read_claim(output, KIND)
    if claim is not None:
        _check_same(output, claim, command)
    return claim is not None and (output / MANIFEST).is_file()


def _check_same(output: Path, claim: Mapping[str, Any], command: Mapping[str, Any]) -> None:
    """Refuse to continue another command, with the difference."""
    if "kind" in claim["config"]:
        found = differences(claim["config"], command["config"])
        if claim["tokenizer"] != command["tokenizer"]:
            found.append("--tokenizer: another one")
        if claim["inputs"] != command["inputs"]:
            found.append("other tars, or other content")
    else:
        found = ["it was made by `headrace prepare`"]
    if found:
        raise another_command(
            f"{output} was begun",
            found,
            "give the same tars and settings to continue it, or name another output",
        )
