"""Whatever happens to files of a preparation's work between stages is named, or harmless."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from data import shuffle
from data.claim import WORK
from data.config import DataError, PrepareConfig
from data.prepare import STAGES, prepare, prepare_task
from tests.data.prepared import tree
from tests.data.texts import prose, write_lines

CONFIG = PrepareConfig.model_validate(
    {
        "vocab_size": 400,
        "val_fraction": 0,
        "part_bytes": 9_000,
        "shuffle": True,
        "clean": {"dedup": "near", "normalize": True},
    }
)
OVER = STAGES.index("encode")


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "BUCKET_BYTES", 20_000)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [prose(300, seed=seed) for seed in range(90)]
    path = tmp_path_factory.mktemp("input") / "a.jsonl"
    return write_lines(path, texts + [f"{text} more" for text in texts[:20]])


@pytest.fixture(scope="module")
def expected(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The dataset."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "BUCKET_BYTES", 20_000)
        output = tmp_path_factory.mktemp("expected") / "out"
        prepare([str(path)], output, CONFIG, workers=1)
        return tree(output)


@pytest.fixture(scope="module")
def stages(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every stage has left of an output."""
    folder = tmp_path_factory.mktemp("stages")
    output = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "BUCKET_BYTES", 20_000)
        for stage in STAGES[:OVER]:
            prepare_task([str(path)], output, CONFIG, stage=stage, workers=1)
            shutil.copytree(output, folder / stage)
    return folder


def go_on(path: Path, output: Path, after: str) -> None:
    for stage in STAGES[STAGES.index(after) + 1 :]:
        prepare_task([str(path)], output, CONFIG, stage=stage, workers=1)


def after_stage(stages: Path, stage: str) -> Path:
    """The output as a stage has left it, where it was: its place is part of what keys are of."""
    shutil.rmtree(stages / "out", ignore_errors=True)
    shutil.copytree(stages / stage, stages / "out")
    return stages / "out"


@pytest.mark.parametrize("after", ["clean", "dedup", "drop", "scatter", "shuffle", "survey"])
def test_a_flipped_bit_is_named_or_harmless(
    path: Path, stages: Path, expected: dict[str, str], after: str
) -> None:
    rng, num_named = random.Random(after), 0
    work = after_stage(stages, after) / WORK
    names = sorted(str(p.relative_to(work)) for p in work.glob(f"{after}-*/*") if p.stat().st_size)
    for name in rng.sample(names, min(8, len(names))):
        work = after_stage(stages, after) / WORK
        raw = bytearray((work / name).read_bytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (work / name).write_bytes(raw)
        try:
            go_on(path, stages / "out", after)
        except DataError as error:
            num_named += 1
            assert Path(name).name in str(error) and "is damaged" in str(error)
        else:
            assert tree(stages / "out") == expected
    assert num_named >= min(2, len(names))


@pytest.mark.parametrize("after", ["shuffle", "survey"])
def test_a_bucket_that_was_edited_or_cut_is_named(path: Path, stages: Path, after: str) -> None:
    for edit in (
        lambda raw: raw.replace(b"wheel", b"whael"),
        lambda raw: b"".join(raw.splitlines(keepends=True)[:20]),
        lambda raw: raw + raw.splitlines(keepends=True)[0],
    ):
        bucket = next(after_stage(stages, after).glob("*/shuffle-*/000000.jsonl"))
        bucket.write_bytes(edit(bucket.read_bytes()))
        with pytest.raises(DataError, match=r"000000\.jsonl is damaged or was edited.*; remove "):
            go_on(path, stages / "out", after)
        shutil.rmtree(bucket.parent)
        with pytest.raises(DataError, match="stage shuffle is not complete"):
            go_on(path, stages / "out", "shuffle")
    bucket = next(after_stage(stages, after).glob("*/shuffle-*/000000.jsonl"))
    bucket.unlink()
    with pytest.raises(DataError, match=r"000000\.jsonl is damaged or was edited.*; remove "):
        go_on(path, stages / "out", after)
