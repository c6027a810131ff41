"""The whole input through all stages of cleaning, before anything else sees it.

One pass cleans every document and counts; then duplicates are found over all parts. The result is
one list per part of the documents that are dropped, which survey and encoding skip, and the account
for the manifest. Since duplicates are gone before text is held out, no two documents that the
search calls alike are on both sides of the split. Every part's result is a file in OUTPUT/WORK, so
a call after a kill continues there, and a finished preparation removes the folder.
Cost: reading once more, and what the stages say. Memory: 4 bytes for each dropped document, and in
a worker the text of a part.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.claim import LOCK, WORK, write_claim
from data.clean import STAGES, Account, Cleaner, StageCount, merge
from data.config import CleanConfig, DataUsageError, PrepareConfig
from data.decontaminate import load_evaluation
from data.dedup import repeated_rows, save, write_signatures
from data.documents import Document, Dropped, InputFile, Part, Reading
from data.durable import read_sealed, write_sealed
from data.minhash import METHODS
from data.pool import Pool, Progress
from data.readers import read_extent, reading_of

KIND = "cleaning"


@dataclass(frozen=True)
class Cleaned:
    """What is left of the input: how text changes, and which documents are skipped."""

    cleaner: Cleaner
    folder: Path
    """Where the lists of dropped documents are."""

    def read(self, number: int, part: Part, reading: Reading) -> Iterator[Read]:
        """What is left of a part, and the lines that yield nothing."""
        dropped = set(_drops(self.folder, number).tolist())
        changes = self.cleaner.config.changes_text
        place = -1
        for file, document in read_part(part, reading):
            if isinstance(document, Document):
                place += 1
                if place in dropped:
                    continue
                if changes:
                    document = replace(document, text=self.cleaner.changed(document.text))
            yield file, document


Read = tuple[InputFile, Document | Dropped]


@dataclass(frozen=True)
class Cleaning:
    """The input after cleaning, and the account of it."""

    cleaned: Cleaned
    kept_bytes: int
    report: dict[str, Any]
    """For the manifest: counts in and out of every stage, with reasons."""


def read_cleaned(
    number: int, part: Part, reading: Reading, cleaned: Cleaned | None
) -> Iterator[Read]:
    """The documents of part `number` that are to be stored, and what yields none."""
    return cleaned.read(number, part, reading) if cleaned else read_part(part, reading)


def read_part(part: Part, reading: Reading) -> Iterator[Read]:
    """Every document of a part with its file, and what yields none."""
    for extent in part:
        for document in read_extent(extent, reading):
            yield extent.file, document


@dataclass(frozen=True)
class CleanJob:
    """A part to clean; the results go into `folder`."""

    number: int
    part: Part
    reading: Reading
    cleaner: Cleaner
    folder: Path


def clean_input(
    output: Path,
    parts: Sequence[Part],
    config: PrepareConfig,
    cleaner: Cleaner,
    command: Mapping[str, Any],
    pool: Pool,
    progress: Progress,
) -> Cleaning:
    """Clean the whole input. The caller holds `output`.

    `command` is that of the preparation; what one has left that cleans or reads otherwise is
    removed. Raises DataUsageError when nothing is left of the input.
    """
    versions = cleaner.check()
    reading = reading_of(config)
    folder = _begin(output / WORK, _depends_on(cleaner, config, command, versions))
    jobs = [CleanJob(n, part, reading, cleaner, folder) for n, part in enumerate(parts)]
    num_bytes = sum(extent.stop - extent.start for part in parts for extent in part)
    account: Account = {}
    done = 0
    for part, found in zip(parts, pool.map(clean_part, jobs), strict=True):
        merge(account, found)
        done += sum(extent.stop - extent.start for extent in part)
        progress("clean", done, num_bytes)
    if cleaner.config.dedup != "off":
        account["dedup"] = _drop_duplicates(folder, len(parts), cleaner.config, pool, progress)
    counts = list(account.values()) or [StageCount()]
    if counts[0].documents_in and not counts[-1].documents_out:
        raise DataUsageError(_nothing_left(counts))
    report = _report(cleaner, account, versions)
    return Cleaning(Cleaned(cleaner, folder), counts[-1].bytes_out, report)


def _nothing_left(counts: list[StageCount]) -> str:
    reasons = sum((count.dropped for count in counts), Counter[str]())
    listed = ", ".join(f"{times} {reason}" for reason, times in sorted(reasons.items()))
    return (
        f"cleaning drops all {counts[0].documents_in} documents ({listed}); leave out the option "
        "that drops them: --filter, --filter-datatrove, --language, --dedup or --decontaminate"
    )


def remove_work(output: Path) -> None:
    """Remove what cleaning has left in a dataset that no longer needs it."""
    shutil.rmtree(output / WORK, ignore_errors=True)


def clean_part(job: CleanJob) -> Account:
    """Clean the documents of a part; what an interrupted call has finished is not done again."""
    path = job.folder / f"{job.number:06d}.json"
    if not path.exists():
        _clean_part(job, path)
    return {stage: StageCount.from_json(v) for stage, v in read_sealed(path)["stages"].items()}


def _clean_part(job: CleanJob, path: Path) -> None:
    account: Account = {}
    texts: list[str] = []
    kept: list[tuple[int, int]] = []
    dropped: list[int] = []
    documents = (d for _, d in read_part(job.part, job.reading) if isinstance(d, Document))
    signs = job.cleaner.config.dedup != "off"
    for place, document in enumerate(documents):
        text = job.cleaner.clean(document.text, account)
        if text is None:
            dropped.append(place)
            continue
        if signs:
            texts.append(text)
            kept.append((place, len(text.encode())))
    if job.cleaner.config.dedup != "off":
        write_signatures(job.folder, job.number, job.cleaner.config.dedup, texts)
        save(_kept_file(job.folder, job.number), np.array(kept, np.int64).reshape(-1, 2))
    save(_drops_file(job.folder, job.number), np.array(dropped, np.uint32))
    # Last: it says that the others are there.
    stages = {stage: count.to_json() for stage, count in account.items()}
    write_sealed(path, {"stages": stages, "kept": len(kept)})


def _drop_duplicates(
    folder: Path, num_parts: int, config: CleanConfig, pool: Pool, progress: Progress
) -> StageCount:
    """Write the final lists of dropped documents; they replace those of the first pass."""
    assert config.dedup != "off"
    num_kept = [read_sealed(folder / f"{n:06d}.json")["kept"] for n in range(num_parts)]
    repeated = repeated_rows(folder, config.dedup, num_kept, pool, progress)
    count = StageCount()
    for number, rows in enumerate(repeated):
        kept = np.load(_kept_file(folder, number))
        duplicates = kept[rows]
        count.documents_in += len(kept)
        count.bytes_in += int(kept[:, 1].sum())
        count.documents_out += len(kept) - len(rows)
        count.bytes_out += int(kept[:, 1].sum() - duplicates[:, 1].sum())
        if len(rows):
            count.dropped[f"{config.dedup} duplicate"] += len(rows)
        dropped = np.union1d(_drops(folder, number), duplicates[:, 0]).astype(np.uint32)
        save(_drops_file(folder, number), dropped)
    return count


def _depends_on(
    cleaner: Cleaner, config: PrepareConfig, command: Mapping[str, Any], versions: dict[str, str]
) -> dict[str, Any]:
    """What the results of cleaning depend on."""
    keys = {"clean", "text_field", "on_bad_text", "part_bytes"}
    return {
        "inputs": command["inputs"],
        "config": config.model_dump(mode="json", include=keys),
        "decontaminate": [[file.path.name, file.xxh3] for file in cleaner.evaluation],
        **({"versions": versions} if versions else {}),
    }


def _begin(folder: Path, command: Mapping[str, Any]) -> Path:
    """The work folder of this command; another command's is removed."""
    if (folder / LOCK).is_file():
        left = read_sealed(folder / LOCK)
        if {key: left.get(key) for key in command} == dict(command):
            return folder
    shutil.rmtree(folder, ignore_errors=True)
    write_claim(folder, KIND, command)
    return folder


def _report(cleaner: Cleaner, account: Account, versions: dict[str, str]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "stages": [
            {"stage": stage, **account[stage].to_json()} for stage in STAGES if stage in account
        ]
    }
    if versions:
        report["versions"] = versions
    if cleaner.config.dedup != "off":
        report["dedup"] = METHODS[cleaner.config.dedup].description
    if cleaner.evaluation:
        report["evaluation"] = list(load_evaluation(cleaner.evaluation).report)
    return report


def _drops(folder: Path, number: int) -> NDArray[np.uint32]:
    found: NDArray[np.uint32] = np.load(_drops_file(folder, number))
    return found


def _drops_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.drops.npy"


def _kept_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.kept.npy"
