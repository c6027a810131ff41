"""What the README says of the data that code decides: the order of cleaning, a mixture's table."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from data.clean import STAGES
from data.config import DataConfig

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_stages_of_cleaning_are_listed_as_they_run() -> None:
    (told,) = re.findall(r"Cleaning has one order(.*?)Then comes", README, re.DOTALL)
    options = ["on-bad-text", *(stage.replace("_", "-") for stage in STAGES)]
    assert re.findall(r"`--([a-z-]+)`", told) == options


def test_the_sample_of_a_mixture_is_a_recipe() -> None:
    (sample,) = re.findall(r"```toml\n(\[\[data\.sources.*?)```", README, re.DOTALL)
    config = DataConfig.model_validate(tomllib.loads(sample)["data"])
    assert [(s.name, s.path, s.weight) for s in config.sources] == [
        ("web", "WEB", 7),
        ("code", "CODE", 3),
    ]
