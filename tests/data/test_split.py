"""The split sees content and seed alone; pieces tile a document and runs join them again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.readers import Document, InputFile
from data.split import HASH_RANGE, Override, SplitRule, fit, piece_bytes_for, piece_hash
from tests.data.texts import prose

FILE = InputFile(Path("a.txt"), "a.txt", 1)
RULE = SplitRule(val_fraction=0.3, seed=0)


def cut(text: bytes, piece_bytes: int) -> list[bytes]:
    rule = SplitRule(0.3, 0, piece_bytes)
    return [text[piece.start : piece.stop] for piece in rule.pieces(Document(0, text))]


@given(
    text=st.text(alphabet="ab \n\r\u00e9\u4e2d\U0001f600", max_size=200), size=st.integers(1, 40)
)
@settings(max_examples=200)
def test_pieces_tile_the_text_and_keep_characters_whole(text: str, size: int) -> None:
    pieces = cut(text.encode(), size)
    assert b"".join(pieces) == text.encode()
    assert all(piece for piece in pieces)
    for piece in pieces:
        assert len(piece) <= size or len(piece.decode()) == 1
        piece.decode()


def test_the_last_blank_line_wins_then_newline_space_character() -> None:
    assert cut(b"a\n\nb\n\nc d\ne f", 11) == [b"a\n\nb\n\n", b"c d\ne f"]
    assert cut(b"a\r\n\r\nb\r\nc d", 9) == [b"a\r\n\r\n", b"b\r\nc d"]
    assert cut(b"a b\nc d e", 7) == [b"a b\n", b"c d e"]
    assert cut(b"ab cd ef", 7) == [b"ab cd", b" ef"]
    assert cut("ab\u4e2d\u4e2d".encode(), 6) == ["ab\u4e2d".encode(), "\u4e2d".encode()]
    assert cut(b"short", 5) == [b"short"]


@given(text=st.text(alphabet="ab \n", min_size=1, max_size=300), seed=st.integers(0, 9))
def test_runs_tile_the_document_and_alternate(text: str, seed: int) -> None:
    rule = SplitRule(0.5, seed, piece_bytes=10)
    runs = rule.runs(FILE, Document(0, text.encode()))
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == len(text)
    assert all(one.side != two.side for one, two in pairwise(runs))


def test_the_hash_is_fixed_and_depends_on_the_seed() -> None:
    assert piece_hash(b"headrace", 0) == 1459620273522421843
    assert piece_hash(b"headrace", 1) == 8675407693988639010


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5])
def test_the_held_out_share_is_the_fraction(fraction: float) -> None:
    rule = SplitRule(fraction, 0)
    held_out = sum(piece_hash(b"%d" % i, 0) < rule.first_train_hash for i in range(20_000))
    assert held_out == pytest.approx(20_000 * fraction, abs=4 * (20_000 * fraction) ** 0.5)


def test_the_side_does_not_depend_on_neighbours_or_place() -> None:
    one, two = prose(3000, seed=1).encode(), prose(3000, seed=2).encode()
    other = InputFile(Path("b.txt"), "b.txt", 2)
    for text in (one, two):
        assert RULE.runs(FILE, Document(0, text)) == RULE.runs(other, Document(77, text))


def test_an_override_moves_exactly_one_piece() -> None:
    text = prose(400).encode()
    rule = SplitRule(0.0, 0, piece_bytes=50)
    pieces = list(rule.pieces(Document(1000, text)))
    chosen = Override(FILE, 1000, pieces[2].start, "val")
    moved = SplitRule(0.0, 0, piece_bytes=50, override=chosen)
    sides = [side for _, side in moved.sides(FILE, Document(1000, text))]
    assert sides == ["val" if i == 2 else "train" for i in range(len(pieces))]
    other = InputFile(Path("b.txt"), "b.txt", 2)
    assert {side for _, side in moved.sides(other, Document(1000, text))} == {"train"}


def test_nothing_is_held_out_at_fraction_zero() -> None:
    assert SplitRule(0.0, 0).first_train_hash == 0
    assert SplitRule(0.5, 0).first_train_hash == HASH_RANGE // 2


@pytest.mark.parametrize(
    ("num_bytes", "fraction", "expected"),
    [
        (2**40, 0.01, 2**16),
        (2**16 * 2000, 0.01, 2**16),
        (2**16 * 2000 - 1, 0.01, 2**15),
        (2_000_000, 0.05, 2**12),
        (100_000, 0.01, 2**10),
        (5_000, 0.01, 500),
        (1, 0.01, 1),
        (100_000, 0.0, 2**16),
    ],
)
def test_small_input_has_small_pieces(num_bytes: int, fraction: float, expected: int) -> None:
    assert piece_bytes_for(num_bytes, fraction) == expected


def test_the_limit_is_fitted_to_the_nearest_share() -> None:
    rule = SplitRule(0.1, 0, piece_bytes=2**10)
    assert fit(rule, [(30, 50), (10, 60), (20, 50)], 1000) == 21
    assert fit(rule, [(7, 500), (7, 500)], 1000) is None, "equal pieces stay together"
    assert fit(rule, [], 1000) is None
    fitted = SplitRule(0.1, 0, 2**10, fitted=21)
    assert fitted.first_train_hash == 21
    assert "is below 21, fitted to this small input for a share of 0.1;" in fitted.describe()


def test_the_rule_is_described_with_its_numbers() -> None:
    words = SplitRule(0.25, 7, 100, Override(FILE, 0, 0, "train")).describe()
    for part in ("100 bytes", "seed 7", "0.25 * 2^64", "train would be empty", "largest hash"):
        assert part in words
