from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig, ModelConfigError, parameter_shapes
from model.gpt import GPT, init_weights
from model.hf_names import from_hf_config, from_hf_state, hf_config, hf_name, to_hf_state

CASES = {
    "grouped": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "far": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-6},
}


def _llama(case: dict[str, Any]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=70,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        **case,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hugging_face_to_ours_to_hugging_face_is_the_identity(case: dict[str, Any]) -> None:
    llama = _llama(case)
    config = from_hf_config(llama.config.to_dict())
    state = llama.state_dict()
    back = to_hf_state(from_hf_state(state, config), config)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    assert set(back) == set(state) - tied
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())
    again = LlamaConfig(**hf_config(config)).to_dict()
    theirs = llama.config.to_dict()
    # What an export writes besides: architectures, dtype and the special ids.
    ignored = {"architectures", "dtype", "transformers_version"}
    assert {k: v for k, v in again.items() if k not in ignored} == {
        k: v for k, v in theirs.items() if k not in ignored
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_weights_give_the_same_logits(case: dict[str, Any]) -> None:
    llama = _llama(case)
    config = from_hf_config(llama.config.to_dict())
    ours = GPT(config)
    ours.load_state_dict(
        from_hf_state(llama.state_dict(), config), strict=not config.tie_embeddings
    )
    ids = torch.randint(70, (3, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # Logits are of the order of 10 and differ by the order of fp32 sums.
        torch.testing.assert_close(ours.eval()(ids), llama(ids).logits, rtol=1e-5, atol=5e-5)


def test_export_cuts_the_padding_of_numpy_and_torch_alike() -> None:
    config = ModelConfig(vocab_size=70, num_layers=1, hidden_size=16, num_heads=2, ffn_size=24)
    model = GPT(config)
    init_weights(model, 0)
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    theirs: dict[str, np.ndarray] = to_hf_state(arrays, config)
    assert theirs["lm_head.weight"].shape == theirs["model.embed_tokens.weight"].shape == (70, 16)
    llama = LlamaForCausalLM(LlamaConfig(**hf_config(config)))
    assert {n: tuple(t.shape) for n, t in llama.state_dict().items()} == {
        n: a.shape for n, a in theirs.items()
    }


def test_every_parameter_has_its_own_name() -> None:
    config = ModelConfig(vocab_size=70, num_layers=12)
    names = [hf_name(name) for name in parameter_shapes(config)]
    assert len(set(names)) == len(names)
    assert "model.layers.11.mlp.up_proj.weight" in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, r"model_type='qwen3'; only 'llama' can be read"),
        ({"attention_bias": True}, r"attention_bias=True; only False"),
        ({"head_dim": 64}, r"head_dim=64; only 12"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"rope_type='llama3'; only 'default'"),
        ({"vocab_size": None}, r"vocab_size: Input should be a valid integer"),
    ],
)
def test_a_config_that_we_cannot_express_names_the_key(
    change: dict[str, Any], message: str
) -> None:
    config = ModelConfig(vocab_size=70, num_layers=1, hidden_size=48, num_heads=4, ffn_size=24)
    table = {k: v for k, v in hf_config(config).items() if k != "rope_parameters"} | change
    with pytest.raises(ModelConfigError, match=message):
        from_hf_config(table)


def test_a_config_without_a_key_names_it() -> None:
    with pytest.raises(ModelConfigError, match=r"config\.json has no key 'num_hidden_layers'"):
        from_hf_config({"model_type": "llama", "vocab_size": 5})


def test_weights_of_another_model_are_named() -> None:
    llama = _llama(CASES["grouped"])
    config = from_hf_config(llama.config.to_dict())
    state = llama.state_dict()
    cut = {n: t for n, t in state.items() if n != "model.norm.weight"}
    with pytest.raises(ModelConfigError, match=r"the weights have no 'model\.norm\.weight'"):
        from_hf_state(cut, config)
    with pytest.raises(
        ModelConfigError, match=r"'lm_head\.weight' has shape \(70, 24\).*\(70, 48\)"
    ):
        from_hf_state(state | {"lm_head.weight": torch.zeros(70, 24)}, config)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}
    with pytest.raises(
        ModelConfigError, match=r"the weights have 'model\.layers\.0.*q_proj\.bias'"
    ):
        from_hf_state(state | bias, config)
