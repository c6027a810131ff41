"""A plan's figures against arithmetic done by hand and against published sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data.manifest import read_manifest
from launcher.goodput import GoodputError
from launcher.gpus import GB, GpuError
from launcher.plan import Plan, make_plan
from launcher.recipes import find_recipe
from launcher.show_plan import show_plan
from train.config import RunConfig
from train.decode import load_config
from train.interval import Costs, choose


def config(recipe: str, *overrides: str) -> RunConfig:
    """A recipe with overrides."""
    return load_config(RunConfig, find_recipe(recipe, "pretrain").text, overrides)


def test_parameters_are_those_of_the_papers() -> None:
    """Llama 2 7B and TinyLlama 1.1B, as their checkpoints on the hub count them."""
    seven = make_plan(config("llama-7b"), nodes=8, gpus_per_node=8, gpu="h100")
    assert seven["num_parameters"] == 6_738_415_616
    one = make_plan(config("llama-1b"), nodes=1, gpus_per_node=8, gpu="a100")
    assert one["num_parameters"] == 1_100_048_384


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 2, 4 + 2, 12 / 64), (2, 2, 4 / 64, 12 / 64), (3, 2 / 64, 4 / 64, 12 / 64)],
)
def test_memory_is_shared_as_the_zero_stage_says(
    stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    plan = make_plan(
        config("llama-7b", f"zero.stage={stage}"), nodes=8, gpus_per_node=8, gpu="h100"
    )
    count = plan["num_parameters"]
    assert plan["memory_weights"] == pytest.approx(weights * count)
    assert plan["memory_gradients"] == pytest.approx(gradients * count)
    assert plan["memory_optimizer"] == pytest.approx(optimizer * count)
    parts = [f.value for f in plan.figures if f.key.startswith("memory_") and "per" not in f.key]
    assert plan["memory_per_gpu"] == pytest.approx(sum(parts))


def test_fp32_without_zero_has_no_second_copy() -> None:
    chosen = config("llama-1b", "zero.stage=0", "precision=fp32")
    plan = make_plan(chosen, nodes=1, gpus_per_node=1, gpu="h200")
    count = plan["num_parameters"]
    assert [plan[f"memory_{part}"] for part in ("weights", "gradients", "optimizer")] == [
        4 * count, 4 * count, 8 * count,
    ]  # fmt: skip


def test_activations_of_one_layer_by_hand() -> None:
    chosen = config(
        "tiny-cpu", "model.num_layers=1", "model.vocab_size=64", "micro_batch=1", "seq_len=128"
    )
    plan = make_plan(chosen, nodes=1, gpus_per_node=1, gpu="h100")
    # 6 hidden of 128, k and v of 2 heads of 32, 3 feed-forward of 384, all in bf16; 4 heads and 2
    # norms with an fp32 scalar each; at the end the last norm and fp32 log-probabilities.
    layer = 2 * (6 * 128 + 2 * 64 + 3 * 384) + 4 * (4 + 2)
    assert plan["memory_activations"] == 128 * (layer + 2 * 2 * 128 + 4 * (64 + 1))
    assert plan["memory_logits"] == (4 + 4) * 128 * 64


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_formula_of_activations_gives_their_figure(recomputes: bool) -> None:
    chosen = config(
        "llama-1b", "model.vocab_size=500", f"model.activation_checkpointing={recomputes}".lower()
    )
    plan = make_plan(chosen, nodes=1, gpus_per_node=8, gpu="h100")
    (told,) = (f.formula for f in plan.figures if f.key == "memory_activations")
    layers, hidden, kv, feed_forward, heads, ids = 22, 2048, 4 * 64, 5632, 32, 500
    layer = (6 * hidden + 2 * kv + 3 * feed_forward) * 2 + (heads + 2) * 4
    end = 2 * hidden * 2 + (ids + 1) * 4
    words = "((6 hidden + 2 kv + 3 feed-forward) x 2 B + (heads + 2) x 4 B)"
    if recomputes:
        expected = layers * hidden * 2 + layer + end
        words = f"layers x hidden x 2 B + {words} of one layer"
    else:
        expected, words = layers * layer + end, f"layers x {words}"
    assert plan["memory_activations"] == 8 * 2048 * expected
    assert told == f"16,384 tokens x ({words} + 2 hidden x 2 B + (ids + 1) x 4 B)"


def test_checkpointing_activations_saves_most_of_them() -> None:
    on, off = (
        make_plan(
            config("llama-7b", f"model.activation_checkpointing={value}"),
            nodes=8, gpus_per_node=8, gpu="h100",
        )["memory_activations"]
        for value in ("true", "false")
    )  # fmt: skip
    assert on < off / 8


@pytest.mark.parametrize(
    ("nodes", "micro_batch", "accumulation", "waste"),
    [(32, 1, 4, 0.0), (3, 1, 43, 1 - 1024 / 1032), (5, 4, 7, 1 - 1024 / 1120), (1, 0, 1, 0.0)],
)
def test_waste_is_what_the_dummies_take(
    nodes: int, micro_batch: int, accumulation: int, waste: float
) -> None:
    chosen = config("llama-7b", f"micro_batch={micro_batch}")
    plan = make_plan(chosen, nodes=nodes, gpus_per_node=8, gpu="h100")
    assert plan["accumulation"] == accumulation
    assert plan["dummy_waste"] == pytest.approx(waste)
    assert any("spent on dummies" in text for text in plan.warnings) == (waste > 0.05)


def test_time_follows_from_flops_and_an_mfu_that_is_given() -> None:
    plan = make_plan(config("llama-7b"), nodes=32, gpus_per_node=8, gpu="h100", mfu=0.5)
    rate = 256 * 989.4e12 * 0.5 / plan["flops_per_token"]
    assert plan["tokens_per_second"] == pytest.approx(rate)
    assert plan["tokens_per_day"] == pytest.approx(rate * 86_400)
    assert plan["days"] == pytest.approx(32_000 * 4_194_304 / (rate * 86_400))
    # Six operations per parameter and token, and attention on top (arXiv 2001.08361, 2.1).
    assert 6 * 6.6e9 < plan["flops_per_token"] < 6 * 8e9
    assert plan["checkpoint_bytes"] == 12 * plan["num_parameters"]


def test_a_run_that_does_not_fit_is_warned_about() -> None:
    plan = make_plan(config("llama-7b", "zero.stage=1"), nodes=1, gpus_per_node=1, gpu="a100")
    assert plan["memory_per_gpu"] > 80 * GB
    assert plan.warnings == ("143.5 GB do not fit into 80 GB; what fits: 5 GPUs (78.8 GB)",)
    assert plan.as_dict()["fits"] is False
    fits = make_plan(config("llama-7b"), nodes=8, gpus_per_node=8, gpu="h100")
    assert fits.warnings == ()
    assert fits.as_dict()["fits"] is True


@pytest.mark.parametrize(
    ("given", "gpus", "advice"),
    [
        # micro_batch is 1 already, and one rank shards nothing.
        ((), 1, {"": 2}),
        (
            ("micro_batch=8", "model.activation_checkpointing=false"),
            8,
            {"micro_batch=2": 8, "model.activation_checkpointing=true": 8},
        ),
        (("micro_batch=32", "zero.stage=1"), 8, {"micro_batch=2": 8}),
        (
            ("micro_batch=64", "zero.stage=1", "model.num_layers=48"),
            8,
            {"micro_batch=1 zero.stage=3": 8},
        ),
        (("model.hidden_size=16384", "model.num_layers=64"), 8, {"zero.stage=3": 32}),
        (("model.hidden_size=65536", "model.num_layers=128"), 8, {}),
    ],
)
def test_advice_is_what_makes_the_run_fit(
    given: tuple[str, ...], gpus: int, advice: dict[str, int]
) -> None:
    def made(settings: str, nodes: int) -> Plan:
        chosen = config("llama-7b", *given, *settings.split())
        return make_plan(chosen, nodes=nodes, gpus_per_node=gpus, gpu="h100")

    told = []
    for settings, needed in advice.items():
        plan = made(settings, needed // gpus)
        assert plan.fits
        assert needed == gpus or not made(settings, needed // gpus - 1).fits
        words = [f"{needed} GPUs"] * (needed != gpus) + [settings] * bool(settings)
        told.append(f"{' with '.join(words)} ({plan['memory_per_gpu'] / GB:,.1f} GB)")
    nothing = "no number of these GPUs holds it: take one with more memory, or a smaller model"
    # Others may follow, about time.
    warning = made("", 1).warnings[0]
    assert warning.split("; ")[1] == ("what fits: " + ", or ".join(told) if told else nothing)


def test_the_vocabulary_is_that_of_the_dataset(dataset: Path) -> None:
    def made(override: str) -> Plan:
        return make_plan(config("tiny-cpu", override), nodes=1, gpus_per_node=1, gpu="h100")

    found = made(f"data={dataset}")
    size = read_manifest(dataset).vocab_size
    assert found["num_parameters"] == made(f"model.vocab_size={size}")["num_parameters"]
    assert not any("vocabulary" in text for text in found.assumptions)


def test_people_read_words_and_units(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = config("tiny-cpu", f"data={dataset}", "steps=1000000")
    plan = make_plan(chosen, nodes=1, gpus_per_node=1, gpu="h100")
    show_plan(plan, explain=False, as_json=False)
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    shown = {line[0]: line[1] for line in lines if len(line) > 1}
    assert shown["memory of the GPU"] == "80.00 GB"
    assert shown["memory: weights"].endswith(" MB")
    assert shown["speed"].endswith(" tokens/s")
    assert re.fullmatch(r"[\d.]+ (seconds|minutes)", shown["time of the whole run"])
    assert shown["epochs of source main"] == f"{plan['epochs_main']:,.0f}"
    assert "_" not in "".join(shown) and "e+" not in "".join(shown.values())


def test_every_figure_is_explained_and_assumptions_are_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = make_plan(config("llama-7b"), nodes=32, gpus_per_node=8, gpu="h100")
    assert all(figure.formula for figure in plan.figures)
    show_plan(plan, explain=True, as_json=False)
    shown = capsys.readouterr().out
    assert "2 B x parameters" in shown
    assert "assumed: vocabulary of 32,000 ids" in shown
    assert "assumed: time of a step from a roofline" in shown
    assert "assumed: a node fails every 6,250 h (--node-mtbf)" in shown
    assumed = make_plan(config("llama-7b"), nodes=32, gpus_per_node=8, gpu="h100", mfu=0.4)
    assert "40% of the peak FLOP/s (--mfu)" in assumed.assumptions
    show_plan(plan, explain=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["num_parameters"] == 6_738_415_616


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    message = r"unknown GPU 'h20'; did you mean 'h200'\? known: a100, h100, h200"
    with pytest.raises(GpuError, match=message):
        make_plan(config("llama-7b"), nodes=1, gpus_per_node=8, gpu="h20")


def test_the_time_of_a_step_is_the_sum_of_its_parts() -> None:
    plan = make_plan(config("llama-7b"), nodes=32, gpus_per_node=8, gpu="h100")
    parts = [figure.value for figure in plan.figures if figure.key.startswith("time_")]
    assert len(parts) == 7 and plan["step_seconds"] == pytest.approx(sum(parts))
    flops = 256 * 989.4e12 * plan["mfu"] * plan["step_seconds"]
    assert flops == pytest.approx(plan["flops_per_step"])
    assert plan["days"] == pytest.approx(32_000 * plan["step_seconds"] / 86_400)


def test_the_mfu_that_was_predicted_gives_the_same_time_when_it_is_given() -> None:
    chosen = config("llama-7b")
    predicted = make_plan(chosen, nodes=3, gpus_per_node=8, gpu="a100")
    given = make_plan(chosen, nodes=3, gpus_per_node=8, gpu="a100", mfu=predicted["mfu"])
    for key in ("step_seconds", "tokens_per_day", "wall_days", "energy_kwh"):
        assert given[key] == pytest.approx(predicted[key])


def test_energy_and_disk_by_hand() -> None:
    chosen = config("llama-7b", "checkpoint.keep=2", "checkpoint.keep_every_steps=8000")
    plan = make_plan(chosen, nodes=4, gpus_per_node=8, gpu="a100")
    assert plan["gpu_hours"] == pytest.approx(32 * 24 * plan["wall_days"])
    assert plan["energy_kwh"] == pytest.approx(0.4 * plan["gpu_hours"])
    assert plan["disk_bytes"] == (2 + 1 + 4) * plan["checkpoint_bytes"]
    assert plan["wall_days"] == pytest.approx(plan["days"] / plan["goodput_as_configured"])


def test_the_interval_is_that_of_a_run_with_the_same_costs() -> None:
    costs = Costs(
        stall=12 * 6_738_415_616 / 32 / 24e9,
        lag=12 * 6_738_415_616 * (1 / 32 / 24e9 + 1 / 4 / 2e9),
        restart=120,
        between_failures=1000 * 3600 / 4,
    )
    plan = make_plan(
        config("llama-7b"),
        nodes=4, gpus_per_node=8, gpu="a100", node_hours=1000, write_bytes=2e9,
    )  # fmt: skip
    found = choose(costs, plan["step_seconds"])
    assert plan["checkpoint_interval"] == found.steps
    assert plan["goodput"] == pytest.approx(found.goodput)


def test_an_interval_that_loses_time_is_warned_about() -> None:
    def warnings(*overrides: str) -> tuple[str, ...]:
        chosen = config("llama-7b", *overrides)
        return make_plan(chosen, nodes=32, gpus_per_node=8, gpu="h100", node_hours=100).warnings

    (warning,) = warnings("checkpoint.every=2000")
    assert re.fullmatch(
        r"checkpoint\.every=2,000 is productive [\d.]+% of the time, a checkpoint every (\d+) "
        r"steps [\d.]+%; write checkpoint\.every=\1, or auto to choose by what is measured",
        warning,
    )
    assert warnings("checkpoint.every=auto") == ()
    chosen = config("llama-7b", "checkpoint.every=0")
    alone = make_plan(chosen, nodes=32, gpus_per_node=8, gpu="h100", node_hours=100)
    # One save, at the end of days of training that hardly ever stay whole.
    assert alone["goodput_as_configured"] < 0.01 and alone["wall_days"] > 100 * alone["days"]
    (warning,) = warnings("checkpoint.every=0")
    assert warning == (
        "checkpoint.every=0 saves at the end only, and a failure is expected every 3.1 h; write "
        "checkpoint.every=auto"
    )


def test_no_interval_is_longer_than_the_run() -> None:
    chosen = config("tiny-cpu", "steps=50", "checkpoint.every=10")
    plan = make_plan(chosen, nodes=1, gpus_per_node=2, gpu="h100")
    assert plan["checkpoint_interval"] == 50
    (warning,) = plan.warnings
    assert re.fullmatch(
        r"checkpoint\.every=10 is productive [\d.]+% of the time, a checkpoint at the end alone "
        r"[\d.]+%; write checkpoint\.every=0, which saves at the end",
        warning,
    )
    chosen = config("tiny-cpu", "steps=50", "checkpoint.every=0")
    assert make_plan(chosen, nodes=1, gpus_per_node=2, gpu="h100").warnings == ()


def test_a_run_that_would_never_end_is_refused() -> None:
    def plan(*overrides: str, node_hours: float, write_bytes: float = 1e9) -> None:
        chosen = config("llama-7b", *overrides)
        make_plan(
            chosen,
            nodes=32, gpus_per_node=8, gpu="h100", node_hours=node_hours, write_bytes=write_bytes,
        )  # fmt: skip

    message = (
        r"a checkpoint takes 42\.1 minutes to disk, and a failure is expected every 112 "
        r"seconds: no step would be kept; take fewer nodes, or say that they write faster "
        r"\(--write-rate\) or fail less often \(--node-mtbf\)"
    )
    with pytest.raises(GoodputError, match=message):
        plan(node_hours=1, write_bytes=1e6)
    message = (
        r"checkpoint\.every=2,000 saves every [\d.]+ (minutes|hours), and a failure is expected "
        r"every 112 seconds: the run would not end; write checkpoint\.every=auto"
    )
    with pytest.raises(GoodputError, match=message):
        plan("checkpoint.every=2000", node_hours=1)
    plan("checkpoint.every=auto", node_hours=1)


def test_a_step_that_no_failure_lets_end_is_refused() -> None:
    chosen = config("llama-7b", "precision=fp32", "checkpoint.every=auto")
    message = (
        r"a step takes [\d.]+ hours, and a failure is expected every 36 seconds: no step would"
    )
    with pytest.raises(GoodputError, match=message):
        make_plan(chosen, nodes=1, gpus_per_node=1, gpu="a100", node_hours=0.01)


def test_no_interval_is_advised_that_is_longer_than_the_run() -> None:
    plan = make_plan(config("tiny-cpu"), nodes=1, gpus_per_node=1, gpu="h100")
    assert plan["checkpoint_interval"] == config("tiny-cpu").steps
    assert plan.warnings[-1].endswith("; write checkpoint.every=0, which saves at the end")
