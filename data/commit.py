"""The two points at which a preparation becomes final: its lock, with the tokenizer, and its
manifest.

Nothing is written into a dataset before its input was surveyed and its tokenizer trained; the
manifest is written last, and only while every file of the input is as it was planned. Memory: the
sample for the tokenizer, twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data import vocabulary
from data.claim import another_command, read_claim, write_claim
from data.config import DataUsageError
from data.durable import file_sha256, write_sealed
from data.jobs import Job, Report, alone, do
from data.manifest import MANIFEST, write_manifest
from data.pool import Pool
from data.rounds import rule_to_json, survey_total
from data.selection import unmet
from data.split import SIDES, SplitRule
from data.survey import Survey, sample_limit, settle
from data.survey_words import (
    bad_noun,
    bad_text_warnings,
    id_warnings,
    listed,
    share_warnings,
    unknown_warnings,
)
from data.tokenizer import load_tokenizer, special_ids, tokenizer_file
from data.tokenizer_json import MODEL_FILE
from data.work import Work

KIND = "dataset"


def check_same(output: Path, claim: Mapping[str, Any], work: Work) -> None:
    """Refuse to continue another command, with the difference."""
    found = work.request.differences(claim)
    then, now = claim["inputs"], work.command["inputs"]
    if len(then) != len(now):
        found.append(f"input files: was {len(then)}, is {len(now)}")
    changed = [
        f"{new['name']}: was {old['bytes']} bytes with hash {old['xxh3'][:8]}, "
        f"is {new['bytes']} bytes with hash {new['xxh3'][:8]}"
        for old, new in zip(then, now, strict=False)
        if (old["bytes"], old["xxh3"]) != (new["bytes"], new["xxh3"])
    ]
    refuse(output, found + changed[:3])


def refuse(output: Path, found: Sequence[str]) -> None:
    """Refuse where a dataset that was begun differs from what is asked for."""
    if found:
        raise another_command(
            f"{output} was begun",
            found,
            "give the same input and settings to continue it, or name another output",
        )


def tokenize(work: Work, jobs: Sequence[Job], pool: Pool, report: Report) -> None:
    """Settle the split, train or take the tokenizer, and begin the dataset."""
    for job in jobs:
        with alone(job):
            _tokenize(work, job, pool)
        report(job.num_bytes)


def _tokenize(work: Work, job: Job, pool: Pool) -> None:
    def look(rule: SplitRule) -> Survey:
        # All rounds but the first are of small input, or of one whose side would stay empty.
        jobs = work.survey_jobs(rule)
        for _ in pool.map(do, [job for job in jobs if not job.is_done()]):
            pass
        return survey_total(work.text, jobs)

    rule, total = settle(look, work.request.config)
    limit = sample_limit(rule, total, work.sample_bytes, work.text.num_bytes)
    found = survey_total(work.text, work.survey_jobs(rule), sample_below=limit)
    output, brought = work.request.output, work.request.tokenizer
    model = brought or _train(work, found)
    _begin(work, {**work.command, "tokenizer_sha256": _sha256(model)})
    file = vocabulary.place(model, output)
    fit = vocabulary.coverage(file, found, is_trained=brought is None)
    total.low = []
    content = {
        "rule": rule_to_json(rule),
        "total": total.to_json(),
        "tokenizer": fit.report,
        "warnings": list(fit.warnings),
    }
    write_sealed(job.result, content)


def _sha256(model: bytes | Path) -> str:
    return file_sha256(model) if isinstance(model, Path) else hashlib.sha256(model).hexdigest()


def _train(work: Work, found: Survey) -> bytes:
    """The trained tokenizer; one that an interrupted call has left is taken as it is."""
    claim, left = read_claim(work.request.output, KIND), work.request.output / MODEL_FILE
    if claim is not None and left.is_file() and file_sha256(left) == claim["tokenizer_sha256"]:
        return left.read_bytes()
    return vocabulary.train(found, work.request.config)


def _begin(work: Work, content: Mapping[str, Any]) -> None:
    """Write the lock, or check it again: another process may have begun the directory since."""
    output = work.request.output
    claim = read_claim(output, KIND)
    if claim is None:
        write_claim(output, KIND, content)
        return
    check_same(output, claim, work)
    if claim["tokenizer_sha256"] != content["tokenizer_sha256"]:
        raise DataUsageError(
            f"{output} was begun with a tokenizer that this machine's sentencepiece does not train "
            "again; continue where it was begun, or name another output"
        )


@dataclass(frozen=True)
class CommitJob(Job):
    """The manifest with the account of what came in, was dropped and is stored."""

    work: Work

    @property
    def result(self) -> Path:
        return self.work.request.output / MANIFEST

    def run(self) -> None:
        """Raises DataError when the input is no longer what was planned."""
        work = self.work
        output, total, rule = work.request.output, work.total, work.rule
        work.check_unchanged()
        warnings = [*work.settled["warnings"], *share_warnings(rule, total)]
        if total.bad_lines:
            what = f"{total.bad_lines.total()} {bad_noun(total)}"
            warnings.append(f"{what} were skipped: {listed(total.bad_lines)}")
        warnings += bad_text_warnings(total)
        warnings += id_warnings(total, work.request.config.id_field)
        warnings += unmet(work.left_out)
        num_unknown = sum(job.num_unknown() for job in work.shard_jobs)
        warnings += unknown_warnings(num_unknown)
        file = tokenizer_file(output)
        tokenizer = load_tokenizer(file)
        inputs = work.command["inputs"]
        content = "".join(digest["xxh3"] for digest in inputs)
        write_manifest(
            output,
            [job.entry() for job in work.shard_jobs],
            tokenizer=file,
            vocab_size=tokenizer.vocab_size,
            special_ids=special_ids(tokenizer),
            preparation={
                "config": work.command["config"],
                "input_xxh3": xxhash.xxh3_128_hexdigest(content.encode()),
                "dropped": dict(sorted(total.dropped.items())),
                "bad_lines": dict(sorted(total.bad_lines.items())),
                "tokenizer": work.settled["tokenizer"],
                "warnings": warnings,
                **({"left_out": work.left_out} if work.left_out else {}),
                **({"unknown_tokens": num_unknown} if num_unknown else {}),
                **({"clean": work.cleaning["report"]} if work.cleaning else {}),
            },
            split_rule=rule.describe(),
            counts=_counts(work),
        )


def _counts(work: Work) -> dict[str, int]:
    total, inputs = work.total, work.command["inputs"]
    counts = {
        "files": len(inputs),
        "input_bytes": sum(file["bytes"] for file in inputs),
        "documents": total.num_documents,
        "dropped": total.dropped.total(),
        "bad_lines": total.bad_lines.total(),
    }
    entries = [job.entry() for job in work.shard_jobs]
    for side in SIDES:
        counts[f"documents_{side}"] = total.documents[side]
        counts[f"text_bytes_{side}"] = total.text_bytes[side]
        counts[f"tokens_{side}"] = sum(entry.tokens for entry in entries if entry.split == side)
    return counts
