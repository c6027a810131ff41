"""DeepSpeed's JSON of a run: one pure function of our config, without DeepSpeed.

The raw [deepspeed] table adds what has no key of ours. A key there that contradicts ours, or that
moves state to where no save and load test has followed it, is refused when the run is configured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from train.config import JobConfig

UNTESTED = {
    "optimizer": "optimizers of DeepSpeed's own",
    "scheduler": "schedules of DeepSpeed's own",
    "fp16": "DeepSpeed's loss scaler",
    "amp": "apex",
    "pipeline": "pipeline parallelism",
    "compression_training": "compression",
    "sparse_attention": "sparse attention",
    "tensor_parallel": "tensor parallelism",
    "managed_gradient_accumulation": "accumulation that its caller manages",
    "bf16.bf16_master_weights_and_grads": "masters in bf16",
    "bf16.bf16_optimizer_states": "moments in bf16",
    "zero_optimization.zenflow": "ZenFlow",
    "zero_optimization.offload_optimizer": "offloading the optimizer",
    "zero_optimization.offload_param": "offloading parameters",
    "zero_optimization.cpu_offload": "offloading",
    "zero_optimization.zero_hpz_partition_size": "secondary shards (hpZ)",
    "zero_optimization.mics_shard_size": "MiCS shards",
    "zero_optimization.zero_quantized_weights": "quantized weights",
    "zero_optimization.zero_quantized_gradients": "quantized gradients",
}
"""Keys that change where a run's state lies or when it is updated, and what they stand for."""


class DeepSpeedTableError(ValueError):
    """A raw [deepspeed] table that is refused."""

    exit_code: ClassVar[int] = 2


def deepspeed_json(config: JobConfig, *, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a layout; DeepSpeedTableError when the raw table contradicts it."""
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip_norm,
        # A skipped step relies on the check.
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": config.zero.stage,
            "stage3_param_persistence_threshold": config.zero.persistence_threshold,
        },
        "steps_per_print": 10**9,
    }
    return _merge(ours, config.deepspeed, "")


def _merge(ours: dict[str, Any], raw: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in raw.items():
        name = f"{path}{key}"
        if name in UNTESTED:
            raise DeepSpeedTableError(
                f"deepspeed.{name} is refused: no test has saved and loaded a run with "
                f"{UNTESTED[name]}; remove it from the [deepspeed] table"
            )
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merge(ours[key], value, f"{name}.")
        elif key in ours and ours[key] != value:
            raise DeepSpeedTableError(
                f"deepspeed.{name}={value!r} contradicts {ours[key]!r}, which follows from our own "
                "keys; remove it from the [deepspeed] table and set those"
            )
        else:
            merged[key] = value
    return merged
