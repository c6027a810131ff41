"""One pass over the input before anything is written: what it holds, drops and holds out.

Parts are surveyed in any process and any number; the sum does not depend on either. All that would
stop a preparation later (bad lines, no text, nothing to hold out) is found here. Cost: reading,
parsing and one hash, about 1 s per 200 MB and process.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from data.cleaning import Cleaned, Cleaning, read_cleaned
from data.config import DataError, DataUsageError, PrepareConfig
from data.piece_model import SPACE
from data.pool import Pool, Progress
from data.readers import (
    BAD_TEXT,
    MISSING_FIELD,
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
    MAX_MISS,
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
        asked = bool(job.reading.id_field) and file.format != "text"
        self.num_unnamed += asked and not document.id
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


@dataclass(frozen=True)
class Surveyed:
    """The whole input under the split rule that leaves no side empty."""

    rule: SplitRule
    total: Survey
    parts: list[tuple[Part, Survey]]


def survey(
    parts: list[Part],
    config: PrepareConfig,
    pool: Pool,
    sample_bytes: int,
    progress: Progress,
    cleaning: Cleaning | None = None,
) -> Surveyed:
    """Survey all parts, after cleaning; the sample is about `sample_bytes` of the training side.

    Raises DataError for more bad lines than allowed or text that is not UTF-8, DataUsageError for
    input without text or too little to hold some out.
    """
    num_bytes = sum(_size(part) for part in parts)
    kept_bytes = cleaning.kept_bytes if cleaning else num_bytes
    share = min(1.0, sample_bytes / max(1, kept_bytes))
    cleaned = cleaning.cleaned if cleaning else None
    rule: SplitRule | None = SplitRule(config.val_fraction, config.seed)
    while rule is not None:
        surveyed = Surveyed(rule, Survey(), [])
        reading = reading_of(config)
        jobs = [
            SurveyJob(part, reading, rule, share, number, cleaned)
            for number, part in enumerate(parts)
        ]
        done = 0
        for part, found in zip(parts, pool.map(survey_part, jobs), strict=True):
            surveyed.total.add(found)
            surveyed.parts.append((part, replace(found, sample=[], low=[])))
            done += _size(part)
            progress("survey", done, num_bytes)
        _check(surveyed.total, config)
        rule = next_rule(rule, surveyed.total)
    surveyed.total.sample.sort()
    _fit_sample(surveyed, sample_bytes, kept_bytes)
    return surveyed


def _fit_sample(surveyed: Surveyed, sample_bytes: int, kept_bytes: int) -> None:
    """Make the sample what was asked for where packed files held more text than they have bytes."""
    text_bytes = surveyed.total.text_bytes.total()
    if text_bytes > kept_bytes:
        first = surveyed.rule.first_train_hash
        limit = first + min(1.0, sample_bytes / text_bytes) * (HASH_RANGE - first)
        surveyed.total.sample = [piece for piece in surveyed.total.sample if piece[0] < limit]


def _size(part: Part) -> int:
    return sum(extent.stop - extent.start for extent in part)


def survey_part(job: SurveyJob) -> Survey:
    """Read one part and count it."""
    found = Survey()
    for file, document in read_cleaned(job.number, job.part, job.reading, job.cleaned):
        if isinstance(document, Document):
            found.see(file, document, job)
            continue
        (found.bad_lines if document.is_bad else found.dropped)[document.reason] += 1
        if document.is_bad and len(found.examples) < _EXAMPLES:
            found.examples.append(document)
    return found


def _check(found: Survey, config: PrepareConfig) -> None:
    """Raise DataError for more bad lines than allowed, DataUsageError for input without text."""
    if found.bad_lines.total() > config.max_bad_lines:
        raise DataError(_bad_lines(found, config))
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


def share_warnings(rule: SplitRule, found: Survey) -> list[str]:
    """What a person should know of the share that was held out; nothing where it came out."""
    if rule.val_fraction == 0 or _miss(rule, found) <= MAX_MISS:
        return []
    return [
        f"{_share(found):.2%} of the text is held out for validation, not {rule.val_fraction:.2%}: "
        "the input has too few different pieces; give more text, or another --val-fraction"
    ]


def _share(found: Survey) -> float:
    return found.text_bytes["val"] / found.text_bytes.total()


def _miss(rule: SplitRule, found: Survey) -> float:
    return miss(_share(found), rule.val_fraction)


def _bad_lines(found: Survey, config: PrepareConfig) -> str:
    lines = [
        f"{found.bad_lines.total()} {bad_noun(found)} cannot be used ({listed(found.bad_lines)}), "
        f"{config.max_bad_lines} may be skipped; the first:"
    ]
    for bad in found.examples:
        what = f"no field {config.text_field!r}" if bad.reason == MISSING_FIELD else bad.reason
        lines.append(f"  {bad.place}: {what}: {bad.detail}")
    advice = "mend them, or name the field that holds the text with --text-field"
    if found.num_documents:
        advice += f", or skip them with --max-bad-lines {found.bad_lines.total()}"
    lines.append(advice)
    return "\n".join(lines)


def bad_text_warnings(found: Survey) -> list[str]:
    """What the policy for bad text has done; nothing where all text was good."""
    warnings = []
    if found.num_replaced:
        warnings.append(
            f"{found.num_replaced} of {found.num_documents} documents hold U+FFFD in place of "
            "bytes or characters that were no text (--on-bad-text replace)"
        )
    skipped = Counter({key: found.dropped[key] for key in BAD_TEXT if found.dropped[key]})
    if skipped:
        warnings.append(
            f"{skipped.total()} documents or lines were skipped (--on-bad-text skip): "
            f"{listed(skipped)}"
        )
    return warnings


def id_warnings(found: Survey, id_field: str) -> list[str]:
    """What a person should know of ids that were asked for; nothing where all were there."""
    if not found.num_unnamed:
        return []
    return [
        f"{found.num_unnamed} of {found.num_documents} documents have no id {id_field!r} "
        "(--id-field); they are called by their file and the place in it"
    ]


def bad_noun(found: Survey) -> str:
    """What the bad lines are lines of."""
    return "JSON lines" if all(bad.where is None for bad in found.examples) else "records"


def listed(counts: Counter[str]) -> str:
    """Counts in words: "2 blank line, 1 broken JSON"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
