from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from model.config import ModelConfig, ModelConfigError, parameter_shapes


def test_vocabulary_is_padded_to_a_multiple_of_64() -> None:
    assert [ModelConfig(vocab_size=v).padded_vocab_size for v in (1, 64, 65, 32000)] == [
        64,
        64,
        128,
        32000,
    ]


def test_no_kv_heads_means_as_many_as_query_heads() -> None:
    assert ModelConfig(num_heads=12).kv_heads == 12
    assert ModelConfig(num_heads=12, num_kv_heads=4).kv_heads == 4


def test_heads_that_do_not_fit_the_width_name_a_width_that_does() -> None:
    message = (
        r"hidden_size=100 is no multiple of 2 \* num_heads=16, and rotary positions turn pairs of "
        r"a head's values; write hidden_size=112, or another num_heads"
    )
    with pytest.raises(ValidationError, match=message):
        ModelConfig(hidden_size=100, num_heads=8)


def test_kv_heads_that_do_not_divide_the_heads_name_those_that_do() -> None:
    message = r"num_kv_heads=5 does not divide num_heads=12; these do: 1, 2, 3, 4, 6, 12"
    with pytest.raises(ValidationError, match=message):
        ModelConfig(num_kv_heads=5)


def test_an_open_vocabulary_has_no_shapes() -> None:
    with pytest.raises(
        ModelConfigError, match=r"model\.vocab_size is 0.*write model\.vocab_size=N"
    ):
        parameter_shapes(ModelConfig())


def test_plans_need_no_torch() -> None:
    code = (
        "import sys, model.config, model.flops; "
        "print(sorted({'torch', 'numpy', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
