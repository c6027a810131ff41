"""The quickstart is made of commands, and a model that did not learn is a failure."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launcher.corpus import Corpus
from launcher.quickstart import Findings, Folders, QuickstartError, _check, _stages
from launcher.recipes import find_recipe
from train.config import FinetuneConfig, RunConfig
from train.decode import load_config

LEARNED = Findings(
    bits_before=4.0,
    bits_after=2.0,
    bits_xz=1.8,
    scores={"f1_macro": 0.6},
    baseline={"f1_macro": 0.03, "accuracy": 0.15},
    sample="",
)


@pytest.mark.parametrize(("share", "precision"), [(2.0, "bf16"), (0.1, "fp32")])
def test_every_stage_is_a_valid_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, precision: str
) -> None:
    monkeypatch.setattr("train.ceiling.bf16_share", lambda device: share)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    corpus = Corpus(tmp_path / "text", tmp_path / "windows", tmp_path / "val")
    stages = list(_stages(Folders(tmp_path), corpus))
    assert [stage[0] for stage in stages] == ["prepare", "pretrain", "export", "finetune"]
    for argv in (stages[1], stages[3]):
        recipe = find_recipe(argv[1], argv[0])  # type: ignore[arg-type]
        kind = RunConfig if argv[0] == "pretrain" else FinetuneConfig
        config = load_config(kind, recipe.text, [word for word in argv[2:] if "=" in word])
        assert (config.zero.stage, config.precision) == (2, precision)
        assert argv[argv.index("--nproc") + 1] == "2"


def test_a_model_that_learned_passes() -> None:
    _check(LEARNED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bits_after": 2.41},
            r"did not learn: 2\.41 bits per byte after training, at most 2\.40 were expected",
        ),
        ({"bits_after": float("nan")}, "did not learn: nan bits per byte"),
        (
            {"scores": {"f1_macro": 0.22}},
            r"fine-tuning did not learn: macro-F1 0\.22, at least 0\.23 was expected",
        ),
    ],
)
def test_a_model_that_did_not_learn_is_a_failure(changes: dict[str, object], message: str) -> None:
    with pytest.raises(QuickstartError, match=message) as raised:
        _check(dataclasses.replace(LEARNED, **changes))  # type: ignore[arg-type]
    assert raised.value.exit_code == 1
