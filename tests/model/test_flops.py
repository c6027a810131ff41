from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig, parameter_shapes
from model.flops import activation_bytes, flops_per_token, num_parameters
from model.gpt import GPT, init_weights
from model.loss import token_loss_sum

SHAPES = {
    "tied": ModelConfig(
        vocab_size=65, num_layers=2, hidden_size=32, num_heads=4, ffn_size=48, tie_embeddings=True
    ),
    "grouped": ModelConfig(
        vocab_size=100, num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, ffn_size=96
    ),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_shapes_and_count_are_those_of_the_module(config: ModelConfig) -> None:
    module = GPT(config)
    found = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert list(found.items()) == list(parameter_shapes(config).items())
    assert num_parameters(config) == sum(p.numel() for p in module.parameters())


def test_count_without_the_rows_that_export_cuts() -> None:
    assert num_parameters(SHAPES["tied"]) - num_parameters(SHAPES["tied"], padded=False) == 63 * 32
    spare = 2 * 28 * 64
    assert (
        num_parameters(SHAPES["grouped"]) - num_parameters(SHAPES["grouped"], padded=False) == spare
    )


def test_llama_2_7b_has_its_published_size() -> None:
    # arXiv 2307.09288 rounds it to 7B; the released weights hold 6,738,415,616 values.
    config = ModelConfig(
        vocab_size=32000, num_layers=32, hidden_size=4096, num_heads=32, ffn_size=11008
    )
    assert num_parameters(config) == 6_738_415_616


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_flops_are_those_that_torch_counts(config: ModelConfig) -> None:
    module, ids = _module_and_ids(config)
    # The plain backend is the one whose products the counter sees, and it recomputes none of them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        token_loss_sum(module(ids), ids).backward()
    assert counter.get_total_flops() / ids.numel() == flops_per_token(config, ids.shape[1])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_activation_bytes_are_those_that_autograd_keeps(
    config: ModelConfig, checkpointing: bool
) -> None:
    config = config.model_copy(update={"activation_checkpointing": checkpointing})
    module, ids = _module_and_ids(config)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = token_loss_sum(module(ids), ids)
    planned = activation_bytes(config, micro_batch=2, seq_len=64, value_bytes=4)
    if checkpointing:
        # Autograd has only the blocks' inputs so far; the plan adds one block computed again.
        one = config.model_copy(update={"num_layers": 1, "activation_checkpointing": False})
        two = config.model_copy(update={"num_layers": 2, "activation_checkpointing": False})
        sizes = [activation_bytes(c, micro_batch=2, seq_len=64, value_bytes=4) for c in (one, two)]
        planned -= sizes[1] - sizes[0]
    # The rotary tables, 1 / head_size of a value each, are not planned.
    assert planned <= sum(kept.values()) <= 1.03 * planned
    del loss


def _module_and_ids(config: ModelConfig) -> tuple[GPT, torch.Tensor]:
    module = GPT(config)
    init_weights(module, seed=0)
    return module.train(), torch.arange(2 * 64).view(2, 64) % config.vocab_size
