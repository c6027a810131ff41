"""The whole input through all stages of cleaning, before anything else sees it.

One pass cleans every document and counts; then duplicates are found over all parts. The result is
one list per job of the documents that are dropped, which survey and encoding skip, and the account
for the manifest. Since duplicates are gone before text is held out, no two documents that the
search calls alike are on both sides of the split.
Cost: reading once more, and what the stages say. Memory: in a worker the text of a part, the
signatures of a job's documents (480 bytes each), and 8 bytes for each dropped one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.clean import STAGES, Account, Cleaner, StageCount, merge
from data.config import DataUsageError, PrepareConfig
from data.decontaminate import load_evaluation
from data.dedup import Signed, join_clusters, repeated_rows, sign, write_signatures
from data.documents import Document, Dropped, InputFile, Part, Reading
from data.durable import read_sealed, write_sealed
from data.jobs import MAX_JOBS, Job, files_of
from data.minhash import METHODS
from data.readers import read_extent, reading_of
from data.sealed_arrays import SealedArray, load, save
from data.stamps import unchanged

_PLACE_BITS = 32
"""A document of a job is its part within the job and its place in the part, in one number."""


@dataclass(frozen=True)
class Cleaned:
    """What is left of the input: how text changes, and which documents are skipped."""

    cleaner: Cleaner
    folder: Path
    """Where the lists of dropped documents are."""
    job_parts: int
    """Parts of a job, and so of a list."""

    def read(self, number: int, part: Part, reading: Reading) -> Iterator[Read]:
        """What is left of a part, and the lines that yield nothing."""
        dropped = set(self._dropped(number).tolist())
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

    def _dropped(self, number: int) -> NDArray[np.uint64]:
        """Places of dropped documents of a part."""
        job, part = divmod(number, self.job_parts)
        drops = SealedArray(drops_file(self.folder, job))
        of_part = drops.between(part << _PLACE_BITS, ((part + 1) << _PLACE_BITS) - 1)
        places: NDArray[np.uint64] = of_part & np.uint64((1 << _PLACE_BITS) - 1)
        return places


Read = tuple[InputFile, Document | Dropped]


def read_cleaned(
    number: int, part: Part, reading: Reading, cleaned: Cleaned | None
) -> Iterator[Read]:
    """The documents of part `number` that are to be stored, and what yields none."""
    return cleaned.read(number, part, reading) if cleaned else read_part(part, reading)


def read_part(part: Part, reading: Reading) -> Iterator[Read]:
    """Every document of a part with its file, and what yields none. InputChanged when a file does
    not stay what it was planned as until its last document was handed on.
    """
    for extent in part:
        with unchanged(extent.file.path, extent.file.stamp):
            for document in read_extent(extent, reading):
                yield extent.file, document


def parts_per_job(num_parts: int) -> int:
    """How many consecutive parts make a job of a stage that goes over all of them."""
    return max(1, -(-num_parts // MAX_JOBS))


def part_bytes(part: Part) -> int:
    """Bytes of input that a part stands for."""
    return sum(extent.stop - extent.start for extent in part)


@dataclass(frozen=True)
class CleanJob(Job):
    """Parts to clean."""

    parts: tuple[Part, ...]
    reading: Reading
    cleaner: Cleaner

    def sources(self) -> set[InputFile]:
        """Those of its parts."""
        return files_of(self.parts)

    def run(self) -> None:
        """Write the first list of dropped documents, and what duplicates are found by."""
        kind = self.cleaner.config.dedup
        account: Account = {}
        kept: list[tuple[int, int]] = []
        dropped: list[int] = []
        signed: list[Signed] = []
        for number, part in enumerate(self.parts):
            texts: list[str] = []
            documents = (d for _, d in read_part(part, self.reading) if isinstance(d, Document))
            for place, document in enumerate(documents, number << _PLACE_BITS):
                text = self.cleaner.clean(document.text, account)
                if text is None:
                    dropped.append(place)
                elif kind != "off":
                    texts.append(text)
                    kept.append((place, len(text.encode())))
            if kind != "off":
                signed.append(sign(kind, texts))
        if kind != "off":
            write_signatures(self.folder, self.number, kind, signed)
            save(_kept_file(self.folder, self.number), np.array(kept, np.int64).reshape(-1, 2))
        save(drops_file(self.folder, self.number), np.array(dropped, np.uint64))
        # Last: it says that the others are there.
        stages = {stage: count.to_json() for stage, count in account.items()}
        write_sealed(self.result, {"stages": stages, "kept": len(kept)})


def clean_jobs(
    folder: Path, parts: Sequence[Part], config: PrepareConfig, cleaner: Cleaner
) -> list[CleanJob]:
    """Every part once, in order."""
    step, reading = parts_per_job(len(parts)), reading_of(config)
    groups = [tuple(parts[start : start + step]) for start in range(0, len(parts), step)]
    return [
        CleanJob(folder, number, sum(map(part_bytes, group)), group, reading, cleaner)
        for number, group in enumerate(groups)
    ]


def num_kept(jobs: Sequence[CleanJob]) -> list[int]:
    """For each job the documents among which duplicates are looked for."""
    return [read_sealed(job.result)["kept"] for job in jobs]


@dataclass(frozen=True)
class DropJob(Job):
    """All that cleaning has found, put together: final lists of dropped documents, the account."""

    cleaned: tuple[CleanJob, ...]
    links: tuple[Path, ...]
    """Files of the search for duplicates; none where there was none."""

    def run(self) -> None:
        """Raises DataUsageError when nothing is left of the input."""
        cleaner = self.cleaned[0].cleaner
        account: Account = {}
        for job in self.cleaned:
            stages = read_sealed(job.result)["stages"]
            merge(account, {stage: StageCount.from_json(v) for stage, v in stages.items()})
        if cleaner.config.dedup != "off":
            account["dedup"] = self._drop_duplicates(f"{cleaner.config.dedup} duplicate")
        counts = list(account.values()) or [StageCount()]
        if counts[0].documents_in and not counts[-1].documents_out:
            raise DataUsageError(_nothing_left(counts))
        report = _report(cleaner, account, cleaner.check())
        kept = {"kept_bytes": counts[-1].bytes_out, "kept_documents": counts[-1].documents_out}
        write_sealed(self.result, {**kept, "report": report})

    def _drop_duplicates(self, reason: str) -> StageCount:
        labels = self.folder / "labels"
        sizes = num_kept(self.cleaned)
        join_clusters(labels, sum(sizes), (load(path) for path in self.links))
        count = StageCount()
        for job, rows in zip(self.cleaned, repeated_rows(labels, sizes), strict=True):
            kept = load(_kept_file(job.folder, job.number))
            duplicates = kept[rows]
            count.documents_in += len(kept)
            count.bytes_in += int(kept[:, 1].sum())
            count.documents_out += len(kept) - len(rows)
            count.bytes_out += int(kept[:, 1].sum() - duplicates[:, 1].sum())
            if len(rows):
                count.dropped[reason] += len(rows)
            first = load(drops_file(job.folder, job.number))
            dropped = np.union1d(first, duplicates[:, 0].astype(np.uint64))
            save(drops_file(self.folder, job.number), dropped)
        labels.unlink(missing_ok=True)
        return count


def drops_file(folder: Path, number: int) -> Path:
    """The list of dropped documents of a job."""
    return folder / f"{number:06d}.drops.npy"


def _kept_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.kept.npy"


def _nothing_left(counts: list[StageCount]) -> str:
    reasons = sum((count.dropped for count in counts), Counter[str]())
    listed = ", ".join(f"{times} {reason}" for reason, times in sorted(reasons.items()))
    return (
        f"cleaning drops all {counts[0].documents_in} documents ({listed}); leave out the option "
        "that drops them: --filter, --filter-datatrove, --language, --dedup or --decontaminate"
    )


def depends_on(
    cleaner: Cleaner, config: PrepareConfig, digests: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the results of cleaning depend on."""
    keys = {"clean", "text_field", "on_bad_text", "part_bytes"}
    versions = cleaner.check()
    return {
        "inputs": list(digests),
        "config": config.model_dump(mode="json", include=keys),
        "decontaminate": [[file.path.name, file.xxh3] for file in cleaner.evaluation],
        **({"versions": versions} if versions else {}),
    }


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
