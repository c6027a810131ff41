"""DeepSpeed's JSON is a pure function of the config, and its raw table cannot contradict it."""

from __future__ import annotations

from typing import Any

import pytest

from train.config import ConfigError, JobConfig, RunConfig
from train.decode import load_config
from train.deepspeed_json import UNTESTED, DeepSpeedTableError, deepspeed_json


def job(**tables: Any) -> JobConfig:
    return JobConfig.model_validate({"precision": "bf16", **tables})


def test_the_json_is_what_it_was() -> None:
    config = job(zero={"stage": 2}, optim={"clip_norm": 0.5})
    assert deepspeed_json(config, micro_batch=4, accumulation=3) == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 2, "stage3_param_persistence_threshold": 100_000},
        "steps_per_print": 10**9,
    }


def test_raw_keys_may_add() -> None:
    config = job(deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}})
    merged = deepspeed_json(config, micro_batch=1, accumulation=1)
    assert merged["zero_optimization"]["reduce_bucket_size"] == 1000
    assert merged["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "deepspeed.zero_optimization.stage=3",
            "deepspeed.zero_optimization.stage=3 contradicts 1, which follows from our own keys; "
            "remove it from the [deepspeed] table and set those",
        ),
        (
            'deepspeed.zero_optimization.offload_optimizer={device="cpu"}',
            "deepspeed.zero_optimization.offload_optimizer is refused: no test has saved and "
            "loaded a run with offloading the optimizer; remove it from the [deepspeed] table",
        ),
        ("deepspeed.fp16={enabled=true}", "deepspeed.fp16 is refused"),
    ],
)
def test_a_run_with_a_refused_key_is_refused_when_it_is_configured(
    override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, "", [override])
    assert message in str(caught.value)


def test_the_engine_checks_what_follows_from_the_world_size() -> None:
    config = job(deepspeed={"train_micro_batch_size_per_gpu": 2})
    with pytest.raises(DeepSpeedTableError, match="train_micro_batch_size_per_gpu=2 contradicts 4"):
        deepspeed_json(config, micro_batch=4, accumulation=1)


def test_every_untested_key_is_refused() -> None:
    for name in UNTESTED:
        raw: Any = 1
        for part in reversed(name.split(".")):
            raw = {part: raw}
        with pytest.raises(ValueError, match="no test has saved and loaded"):
            job(deepspeed=raw)
