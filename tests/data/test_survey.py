"""The survey counts everything, refuses early, and leaves no side empty."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import pytest

from data.config import DataError, DataUsageError, PrepareConfig
from data.pool import Pool
from data.readers import Reading, cut_parts, find_files
from data.split import PIECE_BYTES, SplitRule
from data.survey import Survey, SurveyJob, survey, survey_part
from data.survey_words import share_warnings
from tests.data.texts import prose, write_lines


class Looked(NamedTuple):
    rule: SplitRule
    total: Survey


def look(
    path: Path, *, part_bytes: int = 2**20, sample_bytes: int = 2**20, **config: object
) -> Looked:
    parts = cut_parts(find_files([str(path)]), part_bytes)
    settings = PrepareConfig.model_validate(config)
    with Pool(1) as pool:
        return Looked(*survey(parts, settings, pool, sample_bytes))


def test_everything_is_counted_wherever_the_parts_are_cut(tmp_path: Path) -> None:
    texts = [prose(300, seed=seed) for seed in range(40)] + ["", "\u2581\u2581"]
    path = write_lines(tmp_path / "a.jsonl", texts)
    path.write_text(path.read_text() + "\n")
    whole = look(path, val_fraction=0.2)
    for part_bytes in (100, 1000, 7777):
        parts = look(path, val_fraction=0.2, part_bytes=part_bytes)
        assert (parts.rule, parts.total) == (whole.rule, whole.total)
        assert len(cut_parts(find_files([str(path)]), part_bytes)) > 1
    total = whole.total
    assert total.text_bytes.total() == sum(len(text.encode()) for text in texts)
    assert total.num_documents == total.documents.total() == 41
    assert total.dropped == {"blank line": 1, "empty document": 1}
    assert total.num_spaces == 2
    assert total.documents["val"] > 0 and total.documents["train"] > 20


def test_bad_lines_stop_the_survey_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    lines = ['{"text": "good"}', "{oops", '{"body": 1, "title": 2}', '{"text": "\\ud800"}']
    path.write_text("\n".join(lines * 2))
    with pytest.raises(DataError) as refused:
        look(path, part_bytes=10)
    message = str(refused.value)
    assert "6 JSON lines cannot be used (2 broken JSON, 2 lone surrogate, 2 missing field)" in (
        message
    )
    assert f"{path}:2: broken JSON: Expecting property name" in message
    assert f"{path}:3: no field 'text': its keys are 'body', 'title'" in message
    assert f"{path}:4: lone surrogate: \\ud800 is half of a pair" in message
    assert f"{path}:7: no field 'text'" in message
    assert f"{path}:8" not in message, "only the first few are listed"
    assert "--text-field" in message and "--max-bad-lines 6" in message
    path.write_text("{oops\n" * 3)
    with pytest.raises(DataError, match="3 JSON lines") as refused:
        look(path)
    assert "--max-bad-lines" not in str(refused.value), "nothing would be left"


def test_bad_lines_within_the_budget_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "one"}\n{oops\n{"text": "two"}\n')
    total = look(path, max_bad_lines=1).total
    assert (total.num_documents, total.bad_lines) == (2, {"broken JSON": 1})


def test_input_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('\n{"text": ""}\n')
    with pytest.raises(
        DataUsageError,
        match=r"no text \(1 blank line, 1 empty document, 1 empty file\); give files",
    ):
        look(tmp_path)


@pytest.mark.parametrize(("fraction", "empty"), [(1e-9, "val"), (1 - 1e-9, "train")])
def test_a_side_that_stays_empty_gets_the_extreme_hash(
    tmp_path: Path, fraction: float, empty: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [prose(200, seed=seed) for seed in range(20)])
    surveyed = look(path, val_fraction=fraction, part_bytes=500)
    assert surveyed.total.documents[empty] == 1  # type: ignore[index]
    assert surveyed.total.num_documents == 20
    override = surveyed.rule.override
    assert override is not None and override.side == empty
    extreme = surveyed.total.smallest if empty == "val" else surveyed.total.largest
    assert extreme is not None and extreme[2:] == (override.offset, override.start)


def test_equal_documents_do_not_all_change_sides(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["the same text"] * 9)
    surveyed = look(path, val_fraction=0.1)
    assert dict(surveyed.total.documents) == {"train": 8, "val": 1}


def test_one_small_text_is_cut_into_tenths(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(4000))
    surveyed = look(tmp_path / "a.txt")
    size = (tmp_path / "a.txt").stat().st_size
    assert surveyed.rule.piece_bytes == -(-size // 10)
    assert 10 <= surveyed.total.num_pieces <= 20
    assert 0 < surveyed.total.text_bytes["val"] <= size / 10
    assert surveyed.total.text_bytes.total() == size


def test_one_long_text_is_cut_into_pieces_of_64_kib(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(200_000) * 14)
    surveyed = look(tmp_path / "a.txt", part_bytes=1000, val_fraction=0.5)
    assert (surveyed.rule.piece_bytes, surveyed.rule.fitted) == (PIECE_BYTES, None)
    assert surveyed.total.num_pieces == 43
    assert surveyed.total.text_bytes["val"] > 0
    (part,) = cut_parts(find_files([str(tmp_path)]), 1000)
    found = survey_part(SurveyJob(part, Reading(), surveyed.rule, 1.0))
    assert sum(run.stop - run.start for run in found.runs) == found.text_bytes.total()


@pytest.mark.parametrize("fraction", [0.01, 0.05])
@pytest.mark.parametrize("num_bytes", [100_000, 250_000, 640_000, 2_000_000])
def test_the_share_of_one_small_text_comes_out(
    num_bytes: int, fraction: float, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(prose(num_bytes))
    for seed in range(4):
        surveyed = look(tmp_path / "a.txt", val_fraction=fraction, seed=seed)
        share = surveyed.total.text_bytes["val"] / surveyed.total.text_bytes.total()
        assert fraction / 2 < share < 2 * fraction
        assert share_warnings(surveyed.rule, surveyed.total) == []


def test_a_limit_that_was_fitted_does_not_depend_on_the_order(tmp_path: Path) -> None:
    texts = [prose(30_000, seed=seed) for seed in range(5)]
    forward = look(write_lines(tmp_path / "a.jsonl", texts), part_bytes=5000, val_fraction=0.02)
    backward = look(
        write_lines(tmp_path / "b.jsonl", texts[::-1]), part_bytes=900, val_fraction=0.02
    )
    assert forward.rule == backward.rule
    assert forward.rule.fitted is not None
    assert forward.total.text_bytes == backward.total.text_bytes


def test_documents_stay_whole_where_they_are_enough(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [prose(2000, seed=seed) for seed in range(200)])
    surveyed = look(path, val_fraction=0.05)
    assert surveyed.rule.piece_bytes == 2**16
    assert surveyed.total.documents.total() == surveyed.total.num_documents == 200


def test_a_share_that_does_not_come_out_is_told(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [prose(3000)] + ["the same text"] * 9)
    surveyed = look(path, val_fraction=0.0001)
    (warning,) = share_warnings(surveyed.rule, surveyed.total)
    assert "of the text is held out for validation, not 0.01%: the input has too few" in warning
    nothing = look(path, val_fraction=0)
    assert share_warnings(nothing.rule, nothing.total) == []


def test_a_text_that_cannot_be_cut_is_refused_unless_nothing_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataUsageError, match=r"one text of 1 bytes.*or --val-fraction 0"):
        look(tmp_path / "a.txt")
    assert look(tmp_path / "a.txt", val_fraction=0).total.documents == {"train": 1}


def test_the_sample_of_packed_text_is_measured_by_the_text(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "a.jsonl", [prose(200, seed=seed) for seed in range(400)])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    packed = look(tmp_path / "b.jsonl.gz", sample_bytes=20_000).total.sample
    assert 15_000 < sum(len(piece) for _, piece in packed) < 25_000
    assert packed == look(tmp_path / "b.jsonl.gz").total.sample[: len(packed)]


def test_the_sample_is_training_text_in_the_order_of_its_hash(tmp_path: Path) -> None:
    texts = [prose(200, seed=seed) for seed in range(200)]
    forward = look(write_lines(tmp_path / "a.jsonl", texts), val_fraction=0.2)
    backward = look(write_lines(tmp_path / "b.jsonl", texts[::-1]), val_fraction=0.2)
    assert forward.total.sample == backward.total.sample
    sample = [piece.decode() for _, piece in forward.total.sample]
    assert len(sample) == forward.total.documents["train"]
    assert set(sample) < set(texts)
    small = look(tmp_path / "a.jsonl", val_fraction=0.2, sample_bytes=10_000).total.sample
    assert forward.total.sample[: len(small)] == small
    assert 5_000 < sum(len(piece) for _, piece in small) < 15_000
