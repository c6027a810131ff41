"""The survey as jobs over files, in as many rounds as the split takes.

The first round is all that input of some size needs. Where its split misses (small input), the
survey is made again under another rule, and the rule is part of the name of its folder. What a
round has found of every part is kept in files: counts, the runs of a long text, and the job's share
of the sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data.cleaning import Cleaned, part_bytes, parts_per_job
from data.config import DataError
from data.documents import InputFile, Part, Reading
from data.durable import read_sealed, write_sealed
from data.intake import file_from_json, file_to_json
from data.jobs import Job, files_of, key_of
from data.split import SIDES, Override, Run, Side, SplitRule
from data.survey import Survey, SurveyJob, survey_part


@dataclass(frozen=True)
class Text:
    """All that is to be stored, as survey and encoding read it."""

    parts: Sequence[Part]
    reading: Reading
    cleaned: Cleaned | None
    num_bytes: int
    """Of the text, as near as is known before it is read."""
    skipped: Survey = field(default_factory=Survey)
    """What was met before and is not among the parts."""
    num_documents: int | None = None
    """Of the parts, where a stage before has counted them."""


@dataclass(frozen=True)
class Found:
    """What is stored of a part."""

    documents: dict[Side, int]
    text_bytes: dict[Side, int]
    runs: tuple[Run, ...]
    """Where the part is one text file."""


@dataclass(frozen=True)
class SurveyParts(Job):
    """Consecutive parts to survey."""

    first: int
    """Number of the first part."""
    parts: tuple[Part, ...]
    text: Text
    rule: SplitRule
    sample_share: float

    def sources(self) -> set[InputFile]:
        """Those of its parts."""
        return files_of(self.parts)

    def run(self) -> None:
        total = Survey()
        parts = []
        for number, part in enumerate(self.parts, self.first):
            reading, cleaned = self.text.reading, self.text.cleaned
            look = SurveyJob(part, reading, self.rule, self.sample_share, number, cleaned)
            found = survey_part(look)
            total.add(found)
            counts = [
                [count[side] for side in SIDES] for count in (found.documents, found.text_bytes)
            ]
            parts.append([*counts, [[run.start, run.stop, run.side] for run in found.runs]])
        write_sealed(self.result, {"total": total.to_json(), "parts": parts})

    def found(self) -> Iterator[Found]:
        """What was found of each part."""
        for documents, text_bytes, runs in read_sealed(self.result)["parts"]:
            yield Found(
                dict(zip(SIDES, documents, strict=True)),
                dict(zip(SIDES, text_bytes, strict=True)),
                tuple(Run(*run) for run in runs),
            )


def survey_jobs(
    work: Path, text: Text, rule: SplitRule, sample_bytes: int, key: str
) -> list[SurveyParts]:
    """Every part once, in order. `key` stands for all else that the results depend on."""
    folder = work / f"survey-{key_of(key, sample_bytes, rule_to_json(rule))}"
    share = min(1.0, sample_bytes / max(1, text.num_bytes))
    step = parts_per_job(len(text.parts))
    # A job travels to its process: without the parts of all others.
    bare = replace(text, parts=())
    jobs: list[SurveyParts] = []
    for start in range(0, len(text.parts), step):
        parts = tuple(text.parts[start : start + step])
        size = sum(map(part_bytes, parts))
        jobs.append(SurveyParts(folder, len(jobs), size, start, parts, bare, rule, share))
    return jobs


def survey_total(text: Text, jobs: Sequence[SurveyParts], *, sample_below: int = 0) -> Survey:
    """All jobs together, with the part of the sample whose hashes are below a limit, sorted."""
    total = Survey()
    total.add(text.skipped)
    for job in jobs:
        found = read_sealed(job.result)["total"]
        total.add(Survey.from_json(found, sample_below=sample_below))
    found = total.num_documents
    if text.cleaned is None:
        # An empty text that lies in a bucket is one that was counted.
        found += total.dropped.total() + total.bad_lines.total()
        found -= text.skipped.dropped.total() + text.skipped.bad_lines.total()
    if jobs:
        check_count(text.num_documents, found, "surveyed", jobs[0].folder)
    total.sample.sort()
    return total


def check_count(expected: int | None, found: int, done: str, folder: Path) -> None:
    """DataError when documents were lost or repeated between two stages."""
    if expected is not None and expected != found:
        raise DataError(
            f"{found} documents were {done} where the stage before has left {expected}, so files "
            f"in {folder.parent} were edited; remove it and run the same command again"
        )


def rule_to_json(rule: SplitRule) -> dict[str, Any]:
    """Plain values."""
    values = asdict(rule)
    if rule.override is not None:
        values["override"] = {**vars(rule.override), "file": file_to_json(rule.override.file)}
    return values


def rule_from_json(values: Mapping[str, Any]) -> SplitRule:
    """What `rule_to_json` gave."""
    rule = SplitRule(**{**values, "override": None})
    if (override := values["override"]) is None:
        return rule
    return replace(
        rule, override=Override(**{**override, "file": file_from_json(override["file"])})
    )
