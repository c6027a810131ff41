"""The weights of an export: checkpoint slices in, safetensors under transformers' names out.

What goes into one weight file is read together, because the ranks' files hold it in one piece; in
memory is that in fp32, and the file itself, twice while it is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from data.durable import writing
from model.config import ModelConfig, parameter_shapes
from model.flops import num_parameters
from model.gpt import GPT
from model.hf_names import hf_name, to_hf_array
from train.checkpoint import Checkpoint
from train.engine import DTYPES as DTYPES
from train.slice_reader import SliceReader
from train.slices import writing_tensors

Dtype = Literal["fp32", "bf16"]
TOGETHER_BYTES = 2 << 30
"""Of parameters that are read together where no file decides."""


def write_weights(
    folder: Path, saved: Checkpoint, config: ModelConfig, dtype: Dtype, *, max_shard_bytes: int
) -> tuple[str, ...]:
    """Write the weights as safetensors of at most `max_shard_bytes`, with an index when several.

    Returns the files' names. A matrix larger than the limit gets a file of its own.
    """
    plan = _shards(config, dtype, max_shard_bytes)
    files = [_weight_file(number, len(plan)) for number in range(len(plan))]
    for file, names in zip(files, plan, strict=True):
        tensors = dict(_exported(saved.reader, names, config, dtype))
        with writing_tensors(folder / file):
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {
            hf_name(name): file for file, names in zip(files, plan, strict=True) for name in names
        }
        size = num_parameters(config, padded=False) * DTYPES[dtype].itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        path = folder / "model.safetensors.index.json"
        with writing(path):
            path.write_text(json.dumps(index, indent=2) + "\n")
    return tuple(files)


@torch.no_grad()
def reference_logits(
    saved: Checkpoint, config: ModelConfig, dtype: Dtype, ids_BT: torch.Tensor
) -> torch.Tensor:
    """Our own model's logits in fp32, straight from the checkpoint, weights rounded to `dtype`."""
    module = GPT(config).eval()
    parameters = dict(module.named_parameters())
    for names in _shards(config, "fp32", TOGETHER_BYTES):
        for name, tensor in _tensors(saved.reader, names, parameter_shapes(config)):
            parameters[name].copy_(tensor.to(DTYPES[dtype]))
    logits_BTV: torch.Tensor = module(ids_BT)
    return logits_BTV.contiguous()


def _shards(config: ModelConfig, dtype: Dtype, max_shard_bytes: int) -> list[list[str]]:
    plan: list[list[str]] = [[]]
    size = 0
    for name, shape in parameter_shapes(config).items():
        item = DTYPES[dtype].itemsize * torch.Size(shape).numel()
        if plan[-1] and size + item > max_shard_bytes:
            plan.append([])
            size = 0
        plan[-1].append(name)
        size += item
    return plan


def _weight_file(number: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _exported(
    reader: SliceReader, names: list[str], config: ModelConfig, dtype: Dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in _tensors(reader, names, parameter_shapes(config)):
        yield hf_name(name), to_hf_array(name, tensor.to(DTYPES[dtype]), config)


def _tensors(
    reader: SliceReader, names: list[str], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read together, because the files of the ranks hold them one after the other."""
    wanted = [(name, "param", 0, torch.Size(shapes[name]).numel()) for name in names]
    for name, flat in zip(names, reader.read_all(wanted), strict=True):
        yield name, torch.from_numpy(flat).view(shapes[name])
