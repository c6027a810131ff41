"""The one typed config of a run: recipe, then dotted overrides, then nothing else.

`RunConfig` (pretraining) and `FinetuneConfig` are frozen and made by `train/decode.py`. A run
resolves its config once and writes it into the run directory; DeepSpeed's own JSON is derived from
it by one pure function (`train/deepspeed_json.py`). Imports neither torch nor deepspeed, so that
commands on a login node answer at once.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from data.config import DataConfig, accumulation
from model.config import ModelConfig
from train.deepspeed_json import deepspeed_json
from train.settings import (
    CheckpointConfig,
    EvalConfig,
    GuardConfig,
    LogConfig,
    OptimConfig,
    ScheduleConfig,
    Table,
    TrainConfig,
    ZeroConfig,
)

Precision = Literal["fp32", "bf16", "fp16"]


class ConfigError(ValueError):
    """A configuration that is refused; the message names the key and what to write instead."""

    exit_code: ClassVar[int] = 2


class JobConfig(Table):
    """What pretraining and fine-tuning have in common."""

    seed: NonNegativeInt = 0
    """Seeds the initial weights and the order of samples."""
    micro_batch: NonNegativeInt = 0
    """Sequences per rank and forward pass; 0 takes the rank's whole share of the batch at once."""
    precision: Precision = "bf16"
    """bf16 and fp16 keep fp32 master weights; gradients are reduced and accumulated in fp32."""
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    stall_seconds: PositiveFloat = 600
    """A rank that makes no progress for so long ends the run, with the stacks of all ranks in one
    report; a step, a validation batch or a save must take less.
    """
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed keys, for what has no key here; one that contradicts ours is refused."""

    def layout(self, batch_samples: int, *, num_ranks: int) -> tuple[int, int]:
        """(sequences per rank and forward pass, forward passes per step) of a global batch."""
        micro_batch = self.micro_batch or accumulation(batch_samples, num_ranks, 1)
        return micro_batch, accumulation(batch_samples, num_ranks, micro_batch)

    @model_validator(mode="after")
    def _raw_table_fits(self) -> Self:
        layout = {"micro_batch": self.deepspeed.get("train_micro_batch_size_per_gpu", 1)}
        layout["accumulation"] = self.deepspeed.get("gradient_accumulation_steps", 1)
        # Both follow from the world size, so that the engine checks them.
        deepspeed_json(self, **layout)
        return self

    @model_validator(mode="after")
    def _precision_fits_stage(self) -> Self:
        is_ours = self.train.reproducible == "across_world_sizes"
        if self.precision == "bf16" and self.zero.stage == 0 and not is_ours:
            raise ValueError(
                "precision='bf16' with zero.stage=0 is refused: DeepSpeed's bf16 stage 0 takes "
                "one optimizer step "
                "too many; write zero.stage=1 (same memory per rank or less) or precision=fp32"
            )
        return self

    @model_validator(mode="after")
    def _reproducible_fits(self) -> Self:
        if self.train.reproducible != "across_world_sizes":
            return self
        asked = "train.reproducible='across_world_sizes'"
        if self.zero.stage != 0:
            raise ValueError(
                f"{asked} with zero.stage={self.zero.stage} is refused: DeepSpeed adds up "
                "gradients in an order that follows the ranks; write zero.stage=0, with all state "
                "on every rank, or leave train.reproducible out"
            )
        if self.micro_batch == 0:
            raise ValueError(
                f"{asked} needs the same sequences in every forward pass, at any number of ranks; "
                "write micro_batch=N, such that N times every number of ranks divides the batch"
            )
        if self.deepspeed:
            raise ValueError(
                f"{asked} trains without DeepSpeed, but [deepspeed] holds "
                f"{', '.join(self.deepspeed)}; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _rollback_has_checkpoints(self) -> Self:
        if self.guard.rollback and not self.checkpoint.every:
            raise ValueError(
                f"guard.rollback={self.guard.rollback} has nothing to go back to with "
                "checkpoint.every=0; write checkpoint.every=N, in steps"
            )
        return self


class RunConfig(JobConfig):
    """A pretraining run."""

    steps: PositiveInt = 1000
    """Optimizer steps of the whole run; the learning-rate schedule spans them."""
    seq_len: PositiveInt = 1024
    """Tokens per training sequence."""
    batch_tokens: PositiveInt = 65_536
    """Tokens per optimizer step over all ranks; a multiple of seq_len."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()

    @property
    def batch_samples(self) -> int:
        """Sequences per optimizer step over all ranks."""
        return self.batch_tokens // self.seq_len

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_tokens % self.seq_len:
            low = max(self.batch_tokens // self.seq_len, 1) * self.seq_len
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is no multiple of seq_len={self.seq_len}; "
                f"the nearest are {low} and {low + self.seq_len}"
            )
        if self.model.max_seq_len and self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"seq_len={self.seq_len} is longer than "
                f"model.max_seq_len={self.model.max_seq_len}; "
                "raise model.max_seq_len, or set it to 0 to follow seq_len"
            )
        if self.optim.lr == 0:
            raise ValueError("optim.lr=0 trains nothing; write a peak learning rate, such as 3e-4")
        _check_warmup(self.schedule.warmup_steps, self.steps)
        return self


class ModelSource(Table):
    """The model that fine-tuning starts from."""

    path: str = ""
    """A Hugging Face folder: config.json, safetensors, tokenizer."""


class FinetuneData(Table):
    """Examples for fine-tuning, one per line of a .jsonl or row of a .csv file."""

    path: str = ""
    """Training examples."""
    val: str = ""
    """Validation examples; empty holds out 10 % of `path` by hash of the text."""
    text_column: str = "text"
    """classify: the column with the text."""
    label_column: str = "label"
    """classify: the column with the label."""
    prompt_column: str = "prompt"
    """instruct: the column with the prompt."""
    response_column: str = "response"
    """instruct: the column with the response."""


class FinetuneConfig(JobConfig):
    """A fine-tuning run on one node."""

    task: Literal["instruct", "classify"]
    """instruct trains on responses, classify on labels."""
    epochs: PositiveInt = 3
    """Passes over the training examples, when `steps` is 0."""
    steps: NonNegativeInt = 0
    """Optimizer steps; 0 means that `epochs` decides."""
    seq_len: PositiveInt = 512
    """Tokens per example at most; longer ones are cut and counted."""
    batch_size: PositiveInt = 32
    """Examples per optimizer step over all ranks."""
    model: ModelSource = ModelSource()
    data: FinetuneData = FinetuneData()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps:
            _check_warmup(self.schedule.warmup_steps, self.steps)
        return self


def _check_warmup(warmup_steps: int, steps: int) -> None:
    if warmup_steps >= steps:
        raise ValueError(
            f"schedule.warmup_steps={warmup_steps} must be shorter than the run (steps={steps}); "
            f"write schedule.warmup_steps={steps // 10} or more steps"
        )


def require_data(config: RunConfig) -> None:
    """ConfigError when no dataset is named."""
    if not config.data.paths:
        raise ConfigError(
            "no dataset is named; write data=DATASET, a directory made by `headrace prepare`"
        )
