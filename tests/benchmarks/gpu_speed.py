"""One GPU on the recipes' models: tokens/s, MFU, memory beside the plan's, and what a save costs.

Each case trains a few steps of a recipe's model in a fresh process, on random tokens: an engine as
training builds it, four micro-batches per step. Memory is what CUDA's allocator held at its peak;
beside it stands what `headrace plan` says without its margins. Of three checkpoints in the
background two are waited for until they are in host memory (`copy`; the first pins its buffers),
and the third is copied beside a step's passes (`stall`: what training stands still for).

    python -m tests.benchmarks.gpu_speed [--json FILE]       needs CUDA; about three minutes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from launcher.memory import MARGINS, memory_figures
from launcher.recipes import find_recipe
from model.flops import flops_per_token
from model.gpt import GPT
from model.loss import token_loss_sum
from train.build import build_engine
from train.ceiling import matmul_flops_per_second
from train.config import RunConfig
from train.decode import load_config
from train.engine import DTYPES, Batch, Engine
from train.saver import Saver
from train.world import World, join_world

WARM, TIMED, ACCUMULATION = 2, 5, 4
VOCAB = 32_000
CASES: dict[str, tuple[str, ...]] = {
    "1b stage 1": ("llama-1b", "zero.stage=1"),
    "1b stage 2": ("llama-1b", "zero.stage=2"),
    "1b stage 3": ("llama-1b", "zero.stage=3"),
    "1b recomputed": ("llama-1b", "zero.stage=1", "model.activation_checkpointing=true"),
    "1b masked": ("llama-1b", "zero.stage=1", "data.boundaries=attention"),
    "1b fp32": ("llama-1b", "zero.stage=1", "precision=fp32", "micro_batch=4"),
    "7b stage 1": ("llama-7b", "zero.stage=1", "model.num_layers=16"),
}
"""Recipe and what is changed in it; 16 of 32 layers of the 7B fit one GPU with all their state."""


def measure(case: str, *, saves: bool) -> dict[str, float]:
    """One case in this process."""
    name, *overrides = CASES[case]
    text = find_recipe(name, "pretrain").text
    config = load_config(RunConfig, text, [*overrides, f"model.vocab_size={VOCAB}"], name=name)
    micro_batch = config.micro_batch
    batch_tokens = micro_batch * config.seq_len * ACCUMULATION
    config = config.model_copy(update={"batch_tokens": batch_tokens})
    model = config.model.model_copy(update={"max_seq_len": config.seq_len})
    with join_world() as world:
        with world.device:
            module = GPT(model)
        for parameter in module.parameters():
            # Speed depends on no value, and a billion normal ones take a CPU half a minute.
            torch.nn.init.normal_(parameter, std=0.02)
        engine = build_engine(
            module, config, world, micro_batch=micro_batch, accumulation=ACCUMULATION
        )
        tokens = micro_batch * config.seq_len * ACCUMULATION

        def loss_sum(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
            logits = module(batch["input_ids"], batch["position_ids"], batch.get("doc_ids"))
            return token_loss_sum(logits, batch["labels"])

        def step() -> float:
            loss = passes()
            engine.step(lr=1e-4)
            return loss

        def passes() -> float:
            losses = [forward_backward() for _ in range(ACCUMULATION)]
            return sum(map(float, losses)) / tokens

        def forward_backward() -> torch.Tensor:
            ids = torch.randint(0, VOCAB, (micro_batch, config.seq_len + 1))
            places = torch.arange(config.seq_len).expand(micro_batch, -1)
            batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": places}
            if config.data.boundaries == "attention":
                batch["doc_ids"] = places // 500
            return engine.forward_backward(batch, num_valid=tokens, loss_sum=loss_sum)

        for _ in range(WARM):
            loss = step()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(TIMED):
            loss = step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - begun) / TIMED
        rate = tokens / seconds
        peak = matmul_flops_per_second(world.device, DTYPES[config.precision], seconds=0.5)
        flops = rate * flops_per_token(model, config.seq_len)
        planned = memory_figures(config.model_copy(update={"model": model}), 1, micro_batch)
        found = {
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "tflops": flops / 1e12,
            "matmul_tflops": peak / 1e12,
            "matmul_fraction": flops / peak,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
            "planned_gb": sum(f.value for f in planned if f.key not in MARGINS) / 1e9,
            "loss": loss,
        }
        return found | (_save(engine, world, config, passes) if saves else {})


def _save(
    engine: Engine, world: World, config: RunConfig, passes: Callable[[], float]
) -> dict[str, float]:
    """Seconds of saves in the background: two whose copy is waited for, one beside a step."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=".") as name:
        saver = Saver(engine, world, Path(name), config=config.checkpoint)
        for number in (1, 2, 3):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            saver.save(number, {})
            if number == 3:
                found["begin_seconds"] = time.perf_counter() - begun
                passes()
                # What `finish` waits for below is no stall: training would go on meanwhile.
                found["stall_seconds"] = found["begin_seconds"] + saver.wait_for_copy()
                engine.step(lr=1e-4)
            else:
                saver.wait_for_copy()
                found[f"copy_seconds_{number}"] = time.perf_counter() - begun
            saver.finish()
            cost = saver.committed
            assert cost is not None
            found[f"write_seconds_{number}"] = cost.write_seconds
        size = sum(p.stat().st_size for p in Path(name).rglob("*.safetensors")) / 3
        found["checkpoint_gb"] = size / 1e9
        saver.close()
    return found


def main() -> None:
    """Run the cases one after the other and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=CASES)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(measure(options.one, saves=options.save)))
        return
    if not torch.cuda.is_available():
        print("no CUDA device here: what one GPU does is not measured")
        return
    rows: dict[str, dict[str, float]] = {}
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for case in CASES:
        command = [sys.executable, "-m", "tests.benchmarks.gpu_speed", "--one", case]
        command += ["--save"] if case == "1b stage 1" else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(f"{case}: failed\n{done.stderr[-1500:]}", flush=True)
            continue
        rows[case] = json.loads(lines[0].removeprefix("RESULT "))
        print(case, " ".join(f"{k} {v:.4g}" for k, v in rows[case].items()), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
