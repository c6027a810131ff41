"""--fit takes the fastest layout that fits; the plan has one for every number of nodes."""

from __future__ import annotations

import pytest

from launcher.gpus import GB
from launcher.plan import NothingFits, Plan, PlanError, make_plan
from launcher.show_plan import show_plan
from tests.launcher.test_plan import config


@pytest.mark.parametrize(
    ("recipe", "given", "nodes", "gpu"),
    [
        ("llama-7b", (), 32, "h100"),
        ("llama-7b", ("micro_batch=8", "zero.stage=3"), 1, "a100"),
        ("llama-1b", ("precision=fp32",), 2, "h200"),
        ("llama-7b", ("model.hidden_size=8192", "model.num_layers=64"), 8, "h100"),
        # 24 ranks share 1,024 sequences, 43 to each: a prime number.
        ("llama-1b", (), 3, "h100"),
    ],
)
def test_fit_is_the_fastest_of_all_layouts_that_fit(
    recipe: str, given: tuple[str, ...], nodes: int, gpu: str
) -> None:
    def made(*overrides: str, fit: bool = False) -> Plan:
        chosen = config(recipe, *given, *overrides)
        return make_plan(chosen, nodes=nodes, gpus_per_node=8, gpu=gpu, fit=fit)

    fitted = made(fit=True)
    again = made(*fitted.overrides)
    assert fitted.fits and again.fits
    assert again["step_seconds"] == fitted["step_seconds"]
    for micro_batch in (1, 2, 4, 8, 11):
        for stage in (1, 2, 3):
            for value in ("false", "true"):
                other = made(
                    f"micro_batch={micro_batch}",
                    f"zero.stage={stage}",
                    f"model.activation_checkpointing={value}",
                )
                assert not other.fits or other["step_seconds"] >= fitted["step_seconds"]


def test_fit_keeps_what_a_reproducible_run_holds_fixed() -> None:
    chosen = config(
        "llama-1b", "train.reproducible=across_world_sizes", "zero.stage=0", "micro_batch=2"
    )
    fitted = make_plan(chosen, nodes=1, gpus_per_node=8, gpu="h200", fit=True)
    assert fitted.overrides[:2] == ("micro_batch=2", "zero.stage=0")


def test_fit_says_what_would_fit_when_nothing_does() -> None:
    message = r"no layout fits 1 x 1 GPUs of 80 GB; what fits: 2 GPUs \(\d+\.\d GB\)"
    with pytest.raises(NothingFits, match=message) as caught:
        make_plan(config("llama-7b"), nodes=1, gpus_per_node=1, gpu="a100", fit=True)
    assert caught.value.exit_code == 1


def test_fit_and_an_assumed_mfu_contradict_each_other() -> None:
    message = r"--fit chooses by the predicted time of a step, and --mfu 0\.4 assumes one; leave"
    with pytest.raises(PlanError, match=message):
        make_plan(config("llama-7b"), nodes=1, gpus_per_node=8, gpu="h100", mfu=0.4, fit=True)


def test_every_world_size_has_a_layout_or_says_that_nothing_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = config("llama-7b", "model.hidden_size=8192", "model.num_layers=64")
    plan = make_plan(chosen, nodes=12, gpus_per_node=8, gpu="h100")
    assert [nodes for nodes, _ in plan.sizes] == [1, 2, 4, 8, 12]
    first, last = plan.sizes[0][1], plan.sizes[-1][1]
    assert first is None and last is not None
    assert last.memory_bytes <= 80 * GB
    show_plan(plan, explain=False, as_json=False)
    assert "nothing fits" in capsys.readouterr().out
    told = plan.as_dict()["sizes"]
    assert told[0] == {"nodes": 1, "fits": False}
    assert told[-1]["overrides"] == last.overrides()
