"""The time of a step against arithmetic done by hand, and what must hold for any layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.gpus import GPUS
from launcher.step_time import Layout, StepTime, formulas, ring_bandwidth, step_time
from model.config import ModelConfig
from model.flops import flops_per_token, num_parameters

MODEL = ModelConfig(vocab_size=32_000, num_layers=16, hidden_size=2048, num_heads=16, ffn_size=5632)
ONE = Layout(nodes=1, gpus_per_node=1, micro_batch=4, accumulation=1, stage=1)
NODES = replace(ONE, nodes=4, gpus_per_node=8)


def taken(layout: Layout, *, model: ModelConfig = MODEL, gpu: str = "h100") -> StepTime:
    """Seconds of a step of 2,048 tokens per sequence."""
    return step_time(model, 2048, layout=layout, gpu=GPUS[gpu])


def test_products_by_hand() -> None:
    model = ModelConfig(vocab_size=64, num_layers=1, hidden_size=64, num_heads=1, ffn_size=128)
    layout = replace(ONE, micro_batch=1)
    found = step_time(model, 100, layout=layout, gpu=GPUS["a100"])
    # Four matrices of 64 x 64, three of 64 x 128 and the head; each forward and twice backward.
    values = 4 * 64 * 64 + 3 * 64 * 128 + 64 * 64
    moved = 4 * (100 * 128 + 64 * 64) + 3 * (100 * 192 + 64 * 128) + (100 * 128 + 64 * 64)
    rate = GPUS["a100"].matmul_share * 312e12
    assert found.matmul == pytest.approx(3 * (2 * 100 * values / rate + 2 * moved / 2.039e12))
    # 4 D T per token, half of it causal, and 2.5 times that backward.
    rate = GPUS["a100"].attention_share * 312e12
    assert found.attention == pytest.approx(3.5 * 0.5 * 4 * 64 * 100 * 100 / rate)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("stage", range(4))
def test_no_step_is_faster_than_the_peak(stage: int, gpu: str) -> None:
    layout = replace(NODES, stage=stage, accumulation=3)
    flops = 3 * 4 * 2048 * flops_per_token(MODEL, 2048)
    assert taken(layout, gpu=gpu).total > flops / GPUS[gpu].bf16_flops


def test_passes_add_up() -> None:
    one, four = (taken(replace(ONE, accumulation=n)) for n in (1, 4))
    assert four.compute == pytest.approx(4 * one.compute)
    assert four.optimizer == one.optimizer
    # Four times the tokens in one pass move the weights once.
    assert taken(replace(ONE, micro_batch=16)).matmul < four.matmul


def test_recomputation_is_one_forward_pass_of_the_blocks() -> None:
    again = MODEL.model_copy(update={"activation_checkpointing": True})
    kept, computed = taken(ONE), taken(ONE, model=again)
    assert kept.recomputation == 0
    assert computed.compute - kept.compute == pytest.approx(computed.recomputation)
    assert kept.compute / 5 < computed.recomputation < kept.compute / 3


def test_traffic_by_hand() -> None:
    """A ring of n ranks passes (n - 1) / n of what it gathers, twice that for an all-reduce."""
    count = num_parameters(MODEL)
    # Eight ports of 50 GB/s are less than NVLink's 450 GB/s; four fifths of them are reached.
    rate = 0.8 * 8 * 50e9
    assert ring_bandwidth(NODES, GPUS["h100"]) == rate
    share = 31 / 32 / rate
    hop = 31 * 5e-6
    buckets, gathers = -(-count // 500_000_000), -(-count // 50_000_000)

    def waited(stage: int, *, accumulation: int = 1, overlap: bool = False) -> float:
        layout = replace(NODES, stage=stage, accumulation=accumulation, overlap=overlap)
        return taken(layout).communication

    reduced = 2 * (4 * count * share + buckets * hop)
    gathered = 2 * count * share + buckets * hop
    assert waited(0) == pytest.approx(reduced)
    assert waited(1) == pytest.approx(reduced + gathered)
    assert waited(1, accumulation=8) == waited(1)
    assert waited(2, accumulation=8) == pytest.approx(8 * reduced + gathered)
    scattered = 4 * count * share + buckets * hop
    assert waited(3) == pytest.approx(2 * (2 * count * share + gathers * hop) + scattered)
    # Computation hides all but a tenth.
    assert waited(3, overlap=True) == pytest.approx(waited(3) / 10)


def test_one_rank_sends_nothing_and_one_node_uses_nvlink() -> None:
    assert taken(replace(ONE, stage=3)).communication == 0
    inside = replace(ONE, gpus_per_node=8)
    assert ring_bandwidth(inside, GPUS["a100"]) == 0.8 * 300e9
    assert taken(inside, gpu="a100").communication < taken(NODES, gpu="a100").communication


def test_masks_and_hooks_take_time() -> None:
    assert taken(replace(ONE, is_masked=True)).attention == pytest.approx(
        2.5 * taken(ONE).attention
    )
    assert taken(replace(ONE, stage=3)).hooks > taken(replace(ONE, stage=2)).hooks > 0
    assert taken(replace(ONE, stage=3, has_hooks=False)).hooks == 0


def test_fp32_has_the_rate_of_the_cuda_cores() -> None:
    assert taken(replace(ONE, precision="fp32")).matmul > 10 * taken(ONE).matmul


@pytest.mark.parametrize("stage", range(4))
def test_every_part_has_a_formula(stage: int) -> None:
    told = dict(formulas(replace(NODES, stage=stage), GPUS["h100"]))
    assert list(told) == [*StepTime.__dataclass_fields__]
    assert all(told.values())
