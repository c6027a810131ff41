"""What a sentencepiece model file says about itself: pieces, special ids, how it treats spaces.

Read from the file's bytes (a protocol buffer) because the library does not tell all of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class PieceModel:
    """What a sentencepiece model file says about itself."""

    pieces: tuple[tuple[str, float, int], ...]
    """Piece, score and type (NORMAL ...), by id."""
    model_type: str
    has_byte_fallback: bool
    rewrites_text: bool
    """Text is normalised or loses spaces before it is cut, so decoding cannot give it back."""
    adds_prefix: bool
    """A space is put in front of every text."""
    escapes_whitespace: bool
    space_is_suffix: bool
    special: dict[str, int]
    """Ids of those of unk, bos, eos and pad that exist."""

    @property
    def byte_ids(self) -> set[int]:
        """Ids of the 256 bytes that stand for characters without a piece."""
        return {id_ for id_, (_, _, type_) in enumerate(self.pieces) if type_ == BYTE}

    @property
    def splits_at_space(self) -> bool:
        """Ids do not change when a text is cut before a space that follows no space."""
        return (
            self.model_type == "bpe"
            and self.escapes_whitespace
            and not (self.rewrites_text or self.adds_prefix)
            and not any(
                type_ in (USER_DEFINED, UNUSED)
                or (type_ == NORMAL and SPACE in piece.lstrip(SPACE))
                or (type_ == NORMAL and piece.startswith(SPACE * 2) and piece.strip(SPACE))
                for piece, _, type_ in self.pieces
            )
        )


def read_piece_model(model: bytes) -> PieceModel:
    """Parse the bytes of a model file. Raises ValueError when they are not one."""
    try:
        return _parse(model)
    except (struct.error, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its bytes make no sense ({error})") from error


def _parse(model: bytes) -> PieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(model):
        if field == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    # Field numbers and defaults: unk_id, bos_id, eos_id, pad_id of TrainerSpec; -1 means absent.
    wanted = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, 2**64 - 1)}
    special = {name: trainer.get(field, default) for name, (field, default) in wanted.items()}
    return PieceModel(
        pieces=tuple(pieces),
        model_type=_MODEL_TYPES.get(trainer.get(3, 1), "unknown"),
        has_byte_fallback=bool(trainer.get(35, 0)),
        rewrites_text=bool(normalizer.get(2, b"")) or bool(normalizer.get(4, 1)),
        adds_prefix=bool(normalizer.get(3, 1)),
        escapes_whitespace=bool(normalizer.get(5, 1)),
        space_is_suffix=bool(trainer.get(24, 0)),
        special={name: id_ for name, id_ in special.items() if id_ < len(pieces)},
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of one protocol buffer message: ints, or bytes for the rest."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"field of {size} bytes at byte {at} runs past the end")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
