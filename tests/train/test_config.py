"""Recipes, overrides, and errors that teach."""

import pytest

from train.config import ConfigError, FinetuneConfig, RunConfig
from train.decode import OTHER_NAMES, known_keys, load_config


def test_overrides_win_and_are_typed() -> None:
    recipe = "steps = 10\nseq_len = 32\nbatch_tokens = 64\n[optim]\nlr = 1e-3\n"
    config = load_config(RunConfig, recipe, ["optim.lr=3e-4", "data=some/where", "zero.stage=2"])
    assert (config.steps, config.optim.lr, config.zero.stage) == (10, 3e-4, 2)
    assert config.data.path == "some/where"
    assert config.batch_samples == 2


def test_unknown_key_suggests_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'optim\.l_r'; did you mean 'optim\.lr'\?"):
        load_config(RunConfig, "", ["optim.l_r=1.0"])


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lr", "did you mean 'optim.lr'?"),
        ("optim.learning_rate", "did you mean 'optim.lr'?"),
        ("learning_rate", "did you mean 'optim.lr'?"),
        ("every", "did you mean 'checkpoint.every' or 'eval.every'?"),
        ("batch_size", "did you mean 'batch_tokens'?"),
        ("n_layers", "did you mean 'model.num_layers'?"),
        ("model.num_hidden_layers", "did you mean 'model.num_layers'?"),
        ("max_steps", "did you mean 'steps'?"),
        ("stepz", "did you mean 'steps'?"),
        ("qqqq", "`headrace recipes NAME` lists the keys of a recipe"),
    ],
)
def test_an_unknown_key_leads_to_the_one_that_was_meant(key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, "", [f"{key}=1"])
    assert str(caught.value) == f"recipe: unknown key {key!r}; {hint}"


def test_other_names_are_those_of_keys_that_are_there() -> None:
    assert OTHER_NAMES.keys() <= {*known_keys(RunConfig), *known_keys(FinetuneConfig)}


def test_every_bad_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, "stepz = 3", ["optim.lr=fast"], name="my.toml")
    text = str(caught.value)
    assert "my.toml: unknown key 'stepz'; did you mean 'steps'?" in text
    assert "my.toml: optim.lr = 'fast':" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["seq_len=100", "batch_tokens=250"],
            "batch_tokens=250 is no multiple of seq_len=100; the nearest are 200 and 300",
        ),
        (["precision=bf16", "zero.stage=0"], "precision='bf16' with zero.stage=0 is refused"),
        (
            ["schedule.warmup_steps=10", "steps=10"],
            "schedule.warmup_steps=10 must be shorter than the run",
        ),
        (["steps"], "is not of the form key=value"),
        (["optim.lr=inf"], "optim.lr = inf: Input should be a finite number"),
    ],
)
def test_refusals_say_what_to_write(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, "", overrides)
    assert message in str(caught.value)


def test_finetune_shortcuts_name_folders() -> None:
    config = load_config(FinetuneConfig, 'task = "classify"', ["model=out", "data=rows.csv"])
    assert (config.model.path, config.data.path) == ("out", "rows.csv")


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (RunConfig, "checkpoint.mirror"),
        (FinetuneConfig, "data.path"),
        (FinetuneConfig, "model.path"),
    ],
)
def test_no_place_is_named_with_a_secret(
    kind: type[RunConfig] | type[FinetuneConfig], key: str
) -> None:
    recipe = 'task = "classify"' if kind is FinetuneConfig else ""
    for place in ("s3://user:c4n4ry@host/x", "s3://bucket/x?token=c4n4ry"):
        with pytest.raises(ConfigError, match="is named with a password, a query or a") as caught:
            load_config(kind, recipe, [f"{key}={place}"])
        assert "c4n4ry" not in str(caught.value)
    load_config(kind, recipe, [f"{key}=s3://bucket/x"])
