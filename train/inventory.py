"""What a model consists of: every parameter with its shape, dtype, and what the optimizer does with
it. A checkpoint has the inventory of the model that it was taken of, and is loaded into no other.

No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from train.slices import CheckpointError

Dtype = Literal["fp32", "bf16", "fp16"]
Count = Annotated[int, Field(ge=0, lt=2**62)]


class Parameter(BaseModel):
    """One parameter of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    shape: list[Count]
    dtype: Dtype
    """That the model computes in; masters and optimizer state are fp32 whatever it is."""
    trainable: bool
    """One that is not is no part of a checkpoint: it is as the model's source has it."""
    group: Count | None
    """Of the optimizer, counted from 0; None for one that is not trained."""


Inventory = Mapping[str, Parameter]
"""By name."""


def sizes_of(parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Elements of each parameter that a manifest's inventory has as trained, and so as stored."""
    return {name: math.prod(one["shape"]) for name, one in parameters.items() if one["trainable"]}


def check_same(there: Inventory, here: Inventory, name: str) -> None:
    """CheckpointError, which calls the checkpoint `name`, unless its model is the one that was
    built; names the first parameter that differs and in what.
    """
    for parameter in sorted(there.keys() | here.keys()):
        stored, built = there.get(parameter), here.get(parameter)
        if stored == built:
            continue
        what = _difference(stored, built)
        raise CheckpointError(f"{name} is of another model: {parameter!r} {what}")


def _difference(stored: Parameter | None, built: Parameter | None) -> str:
    if stored is None:
        return "is not there, and the model that was built here has it"
    if built is None:
        return "is there, and the model that was built here does not have it"
    told = [
        f"{key} {value} there, {getattr(built, key)} here"
        for key, value in stored
        if value != getattr(built, key)
    ]
    return "has " + "; ".join(told)
