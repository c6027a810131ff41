"""Raw text to a dataset: survey, train the tokenizer, encode, write shards, commit.

The bytes that are written depend on the input, the configuration and the tokenizer alone, never on
`workers` or on how often the work was interrupted. Nothing is written before the input was surveyed
and the tokenizer trained; manifest.json is written last. After a kill the same call continues with
the first shard that is not finished. Memory: the sample for the tokenizer (twice), a few parts per
worker, and about 6 times the longest document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data import vocabulary
from data.claim import differences, holding, read_claim, write_claim
from data.clean import Cleaner
from data.cleaning import Cleaning, clean_input, remove_work
from data.config import DataError, DataUsageError, PrepareConfig
from data.decontaminate import evaluation_files
from data.encode import write_shards
from data.manifest import MANIFEST, Manifest, ShardEntry, read_manifest, write_manifest
from data.pool import Pool, Progress
from data.ranges import cut_long
from data.readers import InputFile, cut_parts, find_files, reading_of
from data.split import SIDES
from data.survey import (
    Survey,
    Surveyed,
    bad_noun,
    bad_text_warnings,
    id_warnings,
    listed,
    share_warnings,
    survey,
)
from data.tokenizer import load_tokenizer
from data.tokenizer_json import MODEL_FILE

KIND = "dataset"
_READ_BYTES = 2**23


@dataclass(frozen=True)
class Summary:
    """What `prepare` left in `output`."""

    output: Path
    manifest: Manifest
    was_complete: bool
    """The same command had finished before; nothing was written."""
    warnings: tuple[str, ...]


def prepare(
    inputs: Sequence[str],
    output: Path,
    config: PrepareConfig,
    *,
    workers: int,
    tokenizer: Path | None = None,
    decontaminate: Sequence[Path] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Summary:
    """Write the dataset `output` from the files, folders and patterns in `inputs`.

    `tokenizer` is a sentencepiece model or a tokenizer.json; without it one is trained on the part
    of the text that is not held out. Documents that overlap with the files in `decontaminate` are
    dropped. The stages that `progress` hears of are "read", "clean", "dedup", "survey", "tokenizer"
    and "encode", where there is something to do. Raises DataUsageError for a request that cannot
    be met and for an `output` that another command began, DataError for text that cannot be read.
    """
    cleaner = Cleaner(config.clean, evaluation_files(tuple(decontaminate)))
    given = tokenizer and vocabulary.tokenizer_identity(tokenizer, config)
    files = find_files(inputs, output.with_name(f"{output.name}.inputs"))
    _check_apart(inputs, output)
    claim = read_claim(output, KIND)
    stamps = _stamps(files)
    parts = cut_long(cut_parts(files, config.part_bytes), reading_of(config), workers)
    with Pool(min(workers, len(parts))) as pool, ExitStack() as held:
        digests = _digests(files, pool, progress)
        command = {"config": config.model_dump(mode="json"), "tokenizer": given, "inputs": digests}
        if decontaminate:
            command["decontaminate"] = {file.path.name: file.xxh3 for file in cleaner.evaluation}
        if claim is not None:
            _check_same(output, claim, command)
            if (output / MANIFEST).is_file():
                return Summary(output, read_manifest(output), True, ())
        sample_bytes = vocabulary.CHECKED_BYTES if tokenizer else config.tokenizer_bytes
        cleaning = None
        if cleaner.is_on:
            held.enter_context(holding(output))
            cleaning = clean_input(output, parts, config, cleaner, command, pool, progress)
        surveyed = survey(parts, config, pool, sample_bytes, progress, cleaning)
        model = tokenizer or _train(output, claim, surveyed.total, config, progress)
        if not cleaner.is_on:
            held.enter_context(holding(output))
        _begin(output, {**command, "tokenizer_sha256": _sha256(model)}, command)
        file = vocabulary.place(model, output)
        cleaned = cleaning.cleaned if cleaning else None
        shards = write_shards(output, surveyed, config, file, pool, progress, cleaned)
        if _stamps(files) != stamps:
            raise DataError(
                "the input changed while it was being prepared, so what was written may hold "
                f"old and new text; remove {output} and run the command again"
            )
        remove_work(output)
        return _commit(output, surveyed, shards, file, command, cleaning)


def _check_apart(inputs: Sequence[str], output: Path) -> None:
    for named in inputs:
        if Path(named).is_dir() and output.resolve().is_relative_to(Path(named).resolve()):
            raise DataUsageError(
                f"the output {output} lies inside the input {named}, whose files are all read; "
                "name an output outside of it"
            )


def _stamps(files: Sequence[InputFile]) -> list[tuple[int, int]]:
    stats = [file.path.stat() for file in files]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _digests(files: list[InputFile], pool: Pool, progress: Progress) -> list[dict[str, Any]]:
    """Name, size and content hash of every file: how the input is recognised again."""
    total = sum(file.num_bytes for file in files)
    digests: list[dict[str, Any]] = []
    done = 0
    for file, digest in zip(files, pool.map(_digest, files), strict=True):
        digests.append({"name": file.name, "bytes": file.num_bytes, "xxh3": digest})
        done += file.num_bytes
        progress("read", done, total)
    return digests


def _digest(file: InputFile) -> str:
    digest = xxhash.xxh3_128()
    with open(file.path, "rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _check_same(output: Path, claim: Mapping[str, Any], command: Mapping[str, Any]) -> None:
    """Refuse to continue another command, with the difference."""
    found = differences(claim["config"], command["config"])
    found += differences(claim["tokenizer"] or {}, command["tokenizer"] or {})
    found += differences(claim.get("decontaminate", {}), command.get("decontaminate", {}))
    then, now = claim["inputs"], command["inputs"]
    if len(then) != len(now):
        found.append(f"input files: {len(then)} then, {len(now)} now")
    changed = [
        f"{new['name']}: {old['bytes']} bytes with hash {old['xxh3'][:8]} then, "
        f"{new['bytes']} bytes with hash {new['xxh3'][:8]} now"
        for old, new in zip(then, now, strict=False)
        if (old["bytes"], old["xxh3"]) != (new["bytes"], new["xxh3"])
    ]
    found += changed[:3]
    if found:
        raise DataUsageError(
            f"{output} was begun by another command ({'; '.join(found)}); give the same input and "
            "settings to continue it, or name another output"
        )


def _train(
    output: Path,
    claim: Mapping[str, Any] | None,
    found: Survey,
    config: PrepareConfig,
    progress: Progress,
) -> bytes:
    """The trained tokenizer; one that an interrupted call has left is taken as it is."""
    left = output / MODEL_FILE
    if claim is not None and left.is_file() and _sha256(left) == claim["tokenizer_sha256"]:
        return left.read_bytes()
    size = sum(len(piece) for _, piece in found.sample)
    progress("tokenizer", 0, size)
    model = vocabulary.train(found, config)
    progress("tokenizer", size, size)
    return model


def _begin(output: Path, content: Mapping[str, Any], command: Mapping[str, Any]) -> None:
    """Write the lock, or check it again: another process may have begun the directory since."""
    claim = read_claim(output, KIND)
    if claim is None:
        write_claim(output, KIND, content)
        return
    _check_same(output, claim, command)
    if claim["tokenizer_sha256"] != content["tokenizer_sha256"]:
        raise DataUsageError(
            f"{output} was begun with a tokenizer that this machine's sentencepiece does not train "
            "again; continue where it was begun, or name another output"
        )


def _commit(
    output: Path,
    surveyed: Surveyed,
    shards: list[ShardEntry],
    file: Path,
    command: Mapping[str, Any],
    cleaning: Cleaning | None,
) -> Summary:
    """Write the manifest with the account of what came in, was dropped and is stored."""
    total, tokenizer = surveyed.total, load_tokenizer(file)
    fit = vocabulary.coverage(file, total, is_trained=command["tokenizer"] is None)
    warnings = [*fit.warnings, *share_warnings(surveyed.rule, total)]
    if total.bad_lines:
        warnings.append(
            f"{total.bad_lines.total()} {bad_noun(total)} were skipped: {listed(total.bad_lines)}"
        )
    warnings += bad_text_warnings(total) + id_warnings(total, command["config"].get("id_field", ""))
    counts = {
        "files": len(command["inputs"]),
        "input_bytes": sum(file["bytes"] for file in command["inputs"]),
        "documents": total.num_documents,
        "dropped": total.dropped.total(),
        "bad_lines": total.bad_lines.total(),
    }
    for side in SIDES:
        counts[f"documents_{side}"] = total.documents[side]
        counts[f"text_bytes_{side}"] = total.text_bytes[side]
        counts[f"tokens_{side}"] = sum(entry.tokens for entry in shards if entry.split == side)
    content = "".join(file["xxh3"] for file in command["inputs"])
    special = {"unk": tokenizer.unk_id, "bos": tokenizer.bos_id}
    special |= {"eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    manifest = write_manifest(
        output,
        shards,
        tokenizer=file,
        vocab_size=tokenizer.vocab_size,
        special_ids={name: id_ for name, id_ in special.items() if id_ is not None},
        preparation={
            "config": command["config"],
            "input_xxh3": xxhash.xxh3_128_hexdigest(content.encode()),
            "dropped": dict(sorted(total.dropped.items())),
            "bad_lines": dict(sorted(total.bad_lines.items())),
            "tokenizer": fit.report,
            "warnings": warnings,
            **({"clean": cleaning.report} if cleaning else {}),
        },
        split_rule=surveyed.rule.describe(),
        counts=counts,
    )
    return Summary(output, manifest, False, tuple(warnings))


def _sha256(content: bytes | Path) -> str:
    raw = content.read_bytes() if isinstance(content, Path) else content
    return hashlib.sha256(raw).hexdigest()
