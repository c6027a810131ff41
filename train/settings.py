"""The tables of a recipe that pretraining and fine-tuning have in common: what each key means.

Immutable, closed to keys that they do not know, and free of torch, for commands on a login node.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from data.config import check_public
from train.retention import Retention


class Table(
    BaseModel,
    frozen=True,
    extra="forbid",
    use_attribute_docstrings=True,
    allow_inf_nan=False,
    # A column can be called 1.
    coerce_numbers_to_str=True,
):
    """A table of a recipe: immutable, and closed to keys that it does not know."""

    @model_validator(mode="after")
    def _without_secrets(self) -> Self:
        """Whatever names a place: it is written into the run, into scripts and into messages."""
        for key, value in self:
            if isinstance(value, str):
                check_public(value, key)
        return self


class OptimConfig(Table):
    """AdamW. Matrices decay; norms and biases do not."""

    lr: NonNegativeFloat = 3e-4
    """Peak learning rate; 0, in fine-tuning only, takes it from the model's size."""
    min_lr_ratio: NonNegativeFloat = 0.1
    """Final learning rate as a fraction of `lr`."""
    beta1: NonNegativeFloat = 0.9
    """Decay of the first moment."""
    beta2: NonNegativeFloat = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices, per unit of learning rate."""
    clip_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""


class ScheduleConfig(Table):
    """Linear warm-up, then a cosine to `optim.min_lr_ratio`."""

    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of the linear ramp from zero; must be shorter than the run."""


class ZeroConfig(Table):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is sharded: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    persistence_threshold: NonNegativeInt = 100_000
    """Stage 3: parameters with fewer elements stay whole on every rank."""


class CheckpointConfig(Table):
    """When to save, and how many to keep."""

    every: NonNegativeInt | Literal["auto"] = 0
    """Optimizer steps between checkpoints; 0 saves only at the end and at a planned stop, "auto"
    chooses by what a save costs and how often the run has failed.
    """
    keep: PositiveInt = 3
    """Newest checkpoints kept; older ones are removed after a newer one is committed."""
    keep_every_steps: NonNegativeInt = 0
    """Checkpoints whose step is a multiple stay, too; 0 for none."""
    keep_every_hours: NonNegativeFloat = 0.0
    """The first checkpoint of every so many hours stays, too; 0 for none."""
    background: bool = True
    """Training goes on while a checkpoint is written, for one more copy of the state in host
    memory.
    """

    mirror: str = ""
    """Folder or URL (s3://, gs:// or what else fsspec can write to) that committed checkpoints are
    copied to beside the training, into a folder with the run's name; empty for none.
    """

    def retention(self) -> Retention:
        """Which checkpoints stay, in the run and in the mirror."""
        return Retention(self.keep, self.keep_every_steps, self.keep_every_hours)


class TrainConfig(Table):
    """What the bits of the numbers may depend on. The samples and their order depend on neither."""

    reproducible: Literal["same_layout", "across_world_sizes"] = "same_layout"
    """across_world_sizes: the same bits at any number of ranks, for a fixed micro_batch, with every
    rank holding all state (train/exact.py); same_layout: at the same ranks, zero and micro_batch.
    """
    deterministic: bool = False
    """GPUs: only kernels that repeat themselves, and one way of adding up over ranks; slower. CPUs
    repeat themselves without it.
    """

    @property
    def repeats(self) -> bool:
        """Whether only kernels that repeat themselves will do."""
        return self.deterministic or self.reproducible == "across_world_sizes"


class GuardConfig(Table):
    """What is done about steps whose numbers are bad (train/guard.py), and how often what is held
    or computed twice is compared (train/replicas.py, train/repeat.py).
    """

    max_skips: NonNegativeInt = 3
    """Bad steps that are skipped in a row; one more ends the run. 0 ends it at the first one."""
    outlier: Literal["off", "skip"] = "off"
    """Steps whose loss or gradient norm is out of the ordinary: skip leaves them out; those that
    are NaN or infinite are skipped in any case.
    """
    sigmas: PositiveFloat = 6.0
    """What is ordinary: robust standard deviations above the median."""
    window: Annotated[int, Field(ge=4)] = 128
    """Good steps that median and deviation are taken over; until so many are known, nothing is out
    of the ordinary.
    """
    rollback: NonNegativeInt = 0
    """Times that a run may go back to the checkpoint before a spike of the loss or of the
    gradient norm, and skip the spike's steps; 0 switches it off.
    """
    patience: PositiveInt = 4
    """Steps in a row with a loss or gradient norm that is out of the ordinary: that is a spike."""
    skip_steps: tuple[PositiveInt, ...] = ()
    """Steps that are not taken: no forward pass, no update; their samples count as consumed."""
    check_every: NonNegativeInt = 100
    """Optimizer steps between comparisons of what every rank should hold alike, which also come
    before every checkpoint and at steps that are bad or high; 0 never compares. ZeRO 1 to 3 rebuild
    weights in every step: only 1 looks at all that were used.
    """
    repeat_every: NonNegativeInt = 1000
    """Optimizer steps between those whose passes are made twice, on the same samples, to compare
    the gradients (train/repeat.py), of a step that is not skipped; 0 never does. On GPUs only
    where train.* keeps to kernels that repeat themselves.
    """


class EvalConfig(Table):
    """Validation loss during training."""

    every: NonNegativeInt = 0
    """Optimizer steps between validations; 0 validates only before the first and after the last
    step.
    """
    samples: PositiveInt = 256
    """Validation samples per validation, taken from the front of the validation split."""


class LogConfig(Table):
    """Where metrics are shown besides RUN/metrics.jsonl."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: off, files only, or synchronised."""
    wandb_project: str = "headrace"
    """Project that wandb runs are filed under."""
