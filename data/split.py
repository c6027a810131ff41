"""Which text is validation: long documents are cut into pieces, and the hash of a piece decides.

The rule sees content and seed alone, never order or path, and equal pieces stay on one side. Pieces
have 64 KiB, and text that is added later does not move what is there. Small input can have too few
of them for its share to come out: where it misses by more than a factor of 2, the size of pieces
follows from the size of the input, and where that is not enough the limit for hashes from the
hashes, so there more text can move some. Pieces serve the split only; neighbours on the same side
are joined again, so a document is stored in as few runs as its sides allow.
Cost: one blake2b of the text, about 1 s per GB.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from data.readers import Document, InputFile

Side = Literal["train", "val"]
SIDES: tuple[Side, Side] = ("train", "val")
PIECE_BYTES = 2**16
MIN_PIECE_BYTES = 2**10
VAL_PIECES = 20
"""Pieces that should be held out: their number is random, and 20 are rarely 10 or 40."""
MIN_PIECES = 10
CLOSE_ENOUGH = 2.0
MAX_MISS = 3.0
"""Factors between the share that is held out and the one that was asked for: what needs no fitting,
and what a person is told of."""
HASH_RANGE = 2**64


@dataclass(frozen=True)
class Piece:
    """The bytes [start, stop) of a document; `hash` is uniform in [0, HASH_RANGE)."""

    start: int
    stop: int
    hash: int


@dataclass(frozen=True)
class Run:
    """The bytes [start, stop) of a document that are stored together, on one side."""

    start: int
    stop: int
    side: Side


@dataclass(frozen=True)
class Override:
    """The one piece that goes to `side` whatever its hash: a side must not stay empty."""

    file: InputFile
    offset: int
    """Where the piece's document starts: a byte of the file, or the document's number in it."""
    start: int
    """Byte of the document where the piece starts."""
    side: Side


@dataclass(frozen=True)
class SplitRule:
    """A piece is validation when its hash is below `first_train_hash`: `val_fraction` of the hash's
    range, or what was fitted to small input.
    """

    val_fraction: float
    seed: int
    piece_bytes: int = PIECE_BYTES
    override: Override | None = None
    fitted: int | None = None

    @property
    def first_train_hash(self) -> int:
        return int(self.val_fraction * HASH_RANGE) if self.fitted is None else self.fitted

    @property
    def is_small(self) -> bool:
        """Whether the rule may be fitted, because the input holds few pieces."""
        return self.piece_bytes < PIECE_BYTES

    def pieces(self, document: Document) -> Iterator[Piece]:
        """The document cut into pieces of at most `piece_bytes` bytes; they tile its text."""
        start = 0
        while start < len(document.text):
            stop = _cut(document.text, start, start + self.piece_bytes)
            yield Piece(start, stop, piece_hash(document.text[start:stop], self.seed))
            start = stop

    def side(self, file: InputFile, document: Document, piece: Piece) -> Side:
        override = self.override
        if (
            override is not None
            and (override.offset, override.start) == (document.offset, piece.start)
            and override.file == file
        ):
            return override.side
        return "val" if piece.hash < self.first_train_hash else "train"

    def sides(self, file: InputFile, document: Document) -> list[tuple[Piece, Side]]:
        """Every piece of the document with its side."""
        return [(piece, self.side(file, document, piece)) for piece in self.pieces(document)]

    def runs(self, file: InputFile, document: Document) -> list[Run]:
        """The document as it is stored."""
        return join(self.sides(file, document))

    def describe(self) -> str:
        """The rule in words, for the manifest."""
        limit = f"{self.val_fraction!r} * 2^64"
        if self.fitted is not None:
            limit = (
                f"{self.fitted}, fitted to this small input for a share of {self.val_fraction!r}"
            )
        words = (
            f"documents over {self.piece_bytes} bytes of UTF-8 are cut before every "
            f"{self.piece_bytes} bytes after the last blank line, else newline, else space, else "
            "character; a piece is validation when blake2b (digest_size 8, person "
            f"'headrace split', salt seed {self.seed} as <u8) of its bytes, read as <u8, is below "
            f"{limit}; neighbours on one side are joined again"
        )
        if self.override is None:
            return words
        which = "smallest" if self.override.side == "val" else "largest"
        return f"{words}; {self.override.side} would be empty and got the {which} hash"


def piece_bytes_for(num_bytes: int, val_fraction: float) -> int:
    """The size of pieces in an input of `num_bytes`: the largest power of two up to 64 KiB of which
    VAL_PIECES are expected on the validation side; at least 1 KiB, or a tenth of smaller input.
    """
    size = PIECE_BYTES
    while size > MIN_PIECE_BYTES and num_bytes * val_fraction < VAL_PIECES * size:
        size //= 2
    if val_fraction == 0:
        return PIECE_BYTES
    return min(size, max(1, -(-num_bytes // MIN_PIECES)))


def fit(rule: SplitRule, low: Iterable[tuple[int, int]], num_bytes: int) -> int | None:
    """The limit for hashes under which the validation share comes closest to what was asked for.

    `low` are (hash, bytes) of the pieces with small hashes, `num_bytes` the bytes of all pieces.
    None when no limit brings it within MAX_MISS: equal pieces have one hash.
    """
    sizes: dict[int, int] = {}
    for hashed, size in low:
        sizes[hashed] = sizes.get(hashed, 0) + size
    best, held_out, limit = MAX_MISS, 0, None
    for hashed in sorted(sizes):
        held_out += sizes[hashed]
        if (missed := miss(held_out / num_bytes, rule.val_fraction)) < best:
            best, limit = missed, hashed + 1
    return limit


def miss(share: float, asked: float) -> float:
    """By what factor a share is larger or smaller than what was asked for."""
    return max(share / asked, asked / share) if share else math.inf


def join(sides: Iterable[tuple[Piece, Side]]) -> list[Run]:
    """Maximal runs of pieces on one side, in order."""
    runs: list[Run] = []
    for piece, side in sides:
        start = runs.pop().start if runs and runs[-1].side == side else piece.start
        runs.append(Run(start, piece.stop, side))
    return runs


def piece_hash(piece: bytes, seed: int) -> int:
    """A number in [0, HASH_RANGE) that depends on the bytes and the seed alone."""
    salt = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(piece, digest_size=8, person=b"headrace split", salt=salt).digest()
    return int.from_bytes(digest, "little")


def _cut(text: bytes, start: int, limit: int) -> int:
    """Where the piece that begins at `start` ends: by `limit`, but for one long character."""
    if len(text) <= limit:
        return len(text)
    for marks in ((b"\n\n", b"\n\r\n"), (b"\n",)):
        found = [(text.rfind(mark, start, limit), len(mark)) for mark in marks]
        if max(found)[0] >= 0:
            return sum(max(found))
    stop = text.rfind(b" ", start + 1, limit)
    if stop > start:
        return stop
    stop = limit
    while stop > start and text[stop] & 0xC0 == 0x80:
        stop -= 1
    if stop > start:
        return stop
    stop = limit
    while stop < len(text) and text[stop] & 0xC0 == 0x80:
        stop += 1
    return stop
