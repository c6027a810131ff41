"""One pass over the input before anything is written: what it holds, drops and holds out.

Parts are surveyed in any process and any number; the sum does not depend on either. All that would
stop a preparation later (bad lines, no text, nothing to hold out) is found here. Cost: reading,
parsing and one hash, about 1 s per 200 MB and process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.cleaning import Cleaned, read_cleaned
from data.config import DataError, DataUsageError, PrepareConfig
from data.intake import file_from_json, file_to_json
from data.piece_model import SPACE
from data.pool import Pool
from data.readers import (
    Document,
    Dropped,
    InputFile,
    Part,
    Reading,
    reading_of,
)
from data.split import (
    CLOSE_ENOUGH,
    HASH_RANGE,
    PIECE_BYTES,
    SIDES,
    Override,
    Run,
    Side,
    SplitRule,
    fit,
    join,
    miss,
    piece_bytes_for,
)
from data.survey_words import bad_lines_refused, listed, share_held_out

_EXAMPLES = 5
_LOW = 4
"""Small input may be fitted with a limit up to this many times the expected one."""
_SPACE_BYTES = SPACE.encode()

Place = tuple[int, InputFile, int, int]
"""A piece: its hash, its file, the offset of its document, its start in the document."""


@dataclass(frozen=True)
class SurveyJob:
    """A part and how to look at it."""

    part: Part
    reading: Reading
    rule: SplitRule
    sample_share: float
    """Share of the training text that goes into the sample, by hash."""
    number: int = 0
    """Of the part among all parts."""
    cleaned: Cleaned | None = None

    @property
    def is_one_text(self) -> bool:
        """A part that is one text file may be long: its runs are listed, to be encoded apart."""
        changes = self.cleaned is not None and self.cleaned.cleaner.config.changes_text
        is_stored_as_it_is = self.reading.on_bad_text == "strict" and not changes
        return len(self.part) == 1 and self.part[0].file.has_byte_places and is_stored_as_it_is


@dataclass
class Survey:
    """What one or many parts hold. Text is counted in bytes of UTF-8."""

    documents: Counter[Side] = field(default_factory=Counter)
    """Stored runs by side."""
    text_bytes: Counter[Side] = field(default_factory=Counter)
    num_documents: int = 0
    num_pieces: int = 0
    num_spaces: int = 0
    """Characters U+2581, which sentencepiece gives back as spaces."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Files, lines and documents without any text, by reason."""
    bad_lines: Counter[str] = field(default_factory=Counter)
    """Lines whose text could not be had, by reason."""
    examples: list[Dropped] = field(default_factory=list)
    """The first bad lines."""
    num_replaced: int = 0
    """Documents in which the policy for bad text has put other characters."""
    num_unnamed: int = 0
    """Records without the id that was asked for."""
    smallest: Place | None = None
    """The piece with the smallest hash; the first one of equals."""
    largest: Place | None = None
    low: list[tuple[int, int]] = field(default_factory=list)
    """Hash and bytes of the pieces of small input among which the limit for hashes may lie."""
    sample: list[tuple[int, bytes]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    """The stored runs of a part that is one text file, by their bytes in the file."""

    def add(self, other: Survey) -> None:
        """Take in the survey of a later part."""
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.num_documents += other.num_documents
        self.num_pieces += other.num_pieces
        self.num_spaces += other.num_spaces
        self.num_replaced += other.num_replaced
        self.num_unnamed += other.num_unnamed
        self.dropped += other.dropped
        self.bad_lines += other.bad_lines
        self.examples = (self.examples + other.examples)[:_EXAMPLES]
        self.low += other.low
        self.sample += other.sample
        self._extremes(other.smallest, other.largest)

    def skip(self, dropped: Dropped) -> None:
        """Count what yields no text."""
        (self.bad_lines if dropped.is_bad else self.dropped)[dropped.reason] += 1
        if dropped.is_bad and len(self.examples) < _EXAMPLES:
            self.examples.append(dropped)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the runs of a part are not among them."""
        values = {key: value for key, value in vars(self).items() if key != "runs"}
        for key in ("smallest", "largest"):
            if (place := values[key]) is not None:
                values[key] = [place[0], file_to_json(place[1]), *place[2:]]
        values["examples"] = [
            {**vars(bad), "file": file_to_json(bad.file)} for bad in self.examples
        ]
        values["sample"] = [(piece_hash, piece.decode()) for piece_hash, piece in self.sample]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, sample_below: int = HASH_RANGE) -> Survey:
        """What `to_json` gave, with the part of the sample whose hashes are below a limit."""
        more = dict(values)
        for key in ("documents", "text_bytes", "dropped", "bad_lines"):
            more[key] = Counter(values[key])
        for key in ("smallest", "largest"):
            if (place := values[key]) is not None:
                more[key] = (place[0], file_from_json(place[1]), *place[2:])
        more["examples"] = [
            Dropped(**{**bad, "file": file_from_json(bad["file"])}) for bad in values["examples"]
        ]
        more["low"] = [tuple(pair) for pair in values["low"]]
        sample = values["sample"]
        more["sample"] = [
            (hash_, piece.encode()) for hash_, piece in sample if hash_ < sample_below
        ]
        return cls(**more)

    def _extremes(
        self,
        smallest: Place | None,
        largest: Place | None,
    ) -> None:
        if smallest and (self.smallest is None or smallest[0] < self.smallest[0]):
            self.smallest = smallest
        if largest and (self.largest is None or largest[0] > self.largest[0]):
            self.largest = largest

    def see(self, file: InputFile, document: Document, job: SurveyJob) -> None:
        """Count one document."""
        rule = job.rule
        self.num_documents += 1
        self.num_spaces += document.text.count(_SPACE_BYTES)
        self.num_replaced += document.replaced > 0
        self.num_unnamed += job.reading.lacks_id(file, document)
        lowest = _LOW * rule.val_fraction * HASH_RANGE if rule.is_small else 0
        sampled = rule.first_train_hash + job.sample_share * (HASH_RANGE - rule.first_train_hash)
        sides = rule.sides(file, document)
        for piece, side in sides:
            place = (piece.hash, file, document.offset, piece.start)
            self._extremes(place, place)
            if piece.hash < lowest:
                self.low.append((piece.hash, piece.stop - piece.start))
            if side == "train" and piece.hash < sampled:
                self.sample.append((piece.hash, document.text[piece.start : piece.stop]))
        self.num_pieces += len(sides)
        for run in join(sides):
            self.documents[run.side] += 1
            self.text_bytes[run.side] += run.stop - run.start
            if job.is_one_text:
                at = document.offset
                self.runs.append(Run(at + run.start, at + run.stop, run.side))


def survey(
    parts: Sequence[Part], config: PrepareConfig, pool: Pool, sample_bytes: int
) -> tuple[SplitRule, Survey]:
    """Survey parts that nothing will be written of; the sample is about `sample_bytes` of the
    training side. Refuses as `settle` does.
    """
    num_bytes = sum(extent.stop - extent.start for part in parts for extent in part)
    share = min(1.0, sample_bytes / max(1, num_bytes))
    reading = reading_of(config)

    def look(rule: SplitRule) -> Survey:
        total = Survey()
        for found in pool.map(survey_part, (SurveyJob(p, reading, rule, share) for p in parts)):
            total.add(found)
        return total

    rule, total = settle(look, config)
    total.sample.sort()
    limit = sample_limit(rule, total, sample_bytes, num_bytes)
    total.sample = [piece for piece in total.sample if piece[0] < limit]
    return rule, total


def settle(look: Callable[[SplitRule], Survey], config: PrepareConfig) -> tuple[SplitRule, Survey]:
    """The rule that leaves no side empty, and what `look` has found under it.

    Raises DataError for more bad lines than allowed or text that is not UTF-8, DataUsageError for
    input without text or too little to hold some out.
    """
    rule: SplitRule | None = first_rule(config)
    while rule is not None:
        settled, total = rule, look(rule)
        _check(total, config)
        rule = next_rule(settled, total)
    return settled, total


def first_rule(config: PrepareConfig) -> SplitRule:
    """The rule that most input is split by."""
    return SplitRule(config.val_fraction, config.seed)


def sample_limit(rule: SplitRule, found: Survey, sample_bytes: int, num_bytes: int) -> int:
    """The hash at which the sample ends: what was asked for, even where packed files held more
    text than they have bytes.
    """
    text_bytes = found.text_bytes.total()
    first = rule.first_train_hash
    if text_bytes <= num_bytes:
        return HASH_RANGE
    return int(first + min(1.0, sample_bytes / text_bytes) * (HASH_RANGE - first))


def survey_part(job: SurveyJob) -> Survey:
    """Read one part and count it."""
    found = Survey()
    for file, document in read_cleaned(job.number, job.part, job.reading, job.cleaned):
        if isinstance(document, Document):
            found.see(file, document, job)
        else:
            found.skip(document)
    return found


def _check(found: Survey, config: PrepareConfig) -> None:
    """Raise DataError for more bad lines than allowed, DataUsageError for input without text."""
    if found.bad_lines.total() > config.max_bad_lines:
        raise DataError(bad_lines_refused(found, config))
    if found.num_documents == 0:
        counts = listed(found.dropped + found.bad_lines)
        raise DataUsageError(f"the input holds no text ({counts}); give files that hold some")


def next_rule(rule: SplitRule, found: Survey) -> SplitRule | None:
    """The rule to survey with again when this one misses its share, or a side stays empty."""
    if rule.val_fraction == 0:
        return None
    total = found.text_bytes.total()
    if rule.piece_bytes == PIECE_BYTES and _miss(rule, found) > CLOSE_ENOUGH:
        finer = piece_bytes_for(total, rule.val_fraction)
        # Short documents stay whole: to cut them would make few more pieces.
        if finer < PIECE_BYTES and total > 2 * finer * found.num_documents:
            return replace(rule, piece_bytes=finer)
    if rule.is_small and rule.fitted is None and _miss(rule, found) > CLOSE_ENOUGH:
        fitted = fit(rule, found.low, total)
        if fitted is not None:
            return replace(rule, fitted=fitted)
    if all(found.documents[side] for side in SIDES):
        return None
    if found.num_pieces > 1:
        side: Side = "train" if found.documents["val"] else "val"
        chosen = found.smallest if side == "val" else found.largest
        assert chosen is not None and rule.override is None
        return replace(rule, override=Override(*chosen[1:], side))
    # A corpus of a single piece is cut into tenths, so that it too has something to hold out.
    tenth = -(-found.text_bytes.total() // 10)
    if tenth >= rule.piece_bytes:
        raise DataUsageError(
            f"the input is one text of {found.text_bytes.total()} bytes, too small to hold some "
            "out for validation; give more text, or --val-fraction 0"
        )
    return replace(rule, piece_bytes=tenth)


def _miss(rule: SplitRule, found: Survey) -> float:
    return miss(share_held_out(found), rule.val_fraction)
