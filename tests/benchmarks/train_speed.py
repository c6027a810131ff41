"""Training speed of one process: tokens per CPU-second, and the fraction of the matmul rate.

The job: 6 layers x 384, sequence 256, batch 8, vocabulary 65, about 10.65 M parameters, AdamW, one
thread. Cases are interleaved in fresh processes and medians are reported; CPU-seconds, because wall
time depends on who else is there. On a GPU the clock is wall time and the device is synchronised.

    make bench                                PlainEngine and ZeRO-1, fp32 and bf16
    make bench BENCH="--nanogpt CHECKOUT"     and nanoGPT's fp32 step beside them
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.flops import flops_per_token
from model.gpt import GPT, init_weights
from model.loss import token_loss_sum
from train.ceiling import matmul_flops_per_second
from train.config import JobConfig, Precision
from train.engine import DTYPES, Batch, DeepSpeedEngine, Engine
from train.plain import PlainEngine
from train.world import World, join_world

SEQ_LEN, BATCH, VOCAB = 256, 8, 65
MODEL = ModelConfig(
    vocab_size=VOCAB,
    num_layers=6,
    hidden_size=384,
    num_heads=6,
    ffn_size=1024,
    max_seq_len=SEQ_LEN,
    tie_embeddings=True,
)
CASES = [("plain", "fp32"), ("zero1", "fp32"), ("plain", "bf16"), ("zero1", "bf16")]

Figures = dict[str, float]


@dataclass(frozen=True)
class Trained:
    """Something that takes training steps, and what they cost in theory."""

    step: Callable[[], None]
    flops_per_token: float
    device: torch.device


def ours(engine_name: str, precision: Precision, world: World) -> Trained:
    """The benchmark job on an engine of ours."""
    engine = build(precision, world, stage=None if engine_name == "plain" else 1)
    return Trained(lambda: step(engine, world), flops_per_token(MODEL, SEQ_LEN), world.device)


def build(precision: Precision, world: World, *, stage: int | None) -> Engine:
    """The engine of the job at a ZeRO stage; without one the plain one."""
    job = JobConfig.model_validate({"precision": precision, "zero": {"stage": stage or 0}})
    module = GPT(MODEL)
    init_weights(module, 0)
    if stage is None:
        return PlainEngine(module, job, world)
    return DeepSpeedEngine(module, job, world, micro_batch=BATCH, accumulation=1)


def step(engine: Engine, world: World) -> None:
    """Collective. A step of the job, BATCH sequences on every rank."""
    forward_backward(engine, world, random_batch())
    engine.step(lr=1e-3)
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def forward_backward(
    engine: Engine, world: World, batch: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Collective. The passes of a step; returns this rank's loss sum."""

    def loss_sum(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return token_loss_sum(module(batch["x"]), batch["y"])

    x, y = batch
    num_valid = world.size * BATCH * SEQ_LEN
    return engine.forward_backward({"x": x, "y": y}, num_valid=num_valid, loss_sum=loss_sum)


def nanogpt(checkout: Path) -> Trained:
    """The same job in nanoGPT's own model and optimizer, fp32; its loop is these five lines."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None and spec.loader is not None
    theirs: Any = importlib.util.module_from_spec(spec)
    # dataclass looks its module up there.
    sys.modules["nanogpt_model"] = theirs
    spec.loader.exec_module(theirs)
    config = theirs.GPTConfig(
        block_size=SEQ_LEN,
        vocab_size=VOCAB,
        n_layer=6,
        n_head=6,
        n_embd=384,
        dropout=0.0,
        bias=False,
    )
    model = theirs.GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")

    def step() -> None:
        _, loss = model(*random_batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Trained(step, 6.0 * model.get_num_params() + 12 * 6 * 384 * SEQ_LEN, torch.device("cpu"))


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and shifted targets, int64 [BATCH, SEQ_LEN] each."""
    ids = torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1))
    return ids[:, :-1], ids[:, 1:].contiguous()


def measure(engine_name: str, precision: Precision, steps: int, checkout: Path | None) -> Figures:
    """One case in this process: speed, peak memory, and the fraction of the matmul rate."""
    torch.set_num_threads(1)
    if engine_name == "nanogpt":
        assert checkout is not None
        # As it is: what our world does to the process, such as the allocator's settings, is ours.
        return _time(nanogpt(checkout), precision, steps)
    with join_world() as world:
        return _time(ours(engine_name, precision, world), precision, steps)


def _time(trained: Trained, precision: Precision, steps: int) -> Figures:
    for _ in range(2):
        trained.step()
    clock = time.perf_counter if trained.device.type == "cuda" else time.process_time
    started = clock()
    for _ in range(steps):
        trained.step()
    rate = steps * BATCH * SEQ_LEN / (clock() - started)
    peak = matmul_flops_per_second(trained.device, DTYPES[precision], seconds=1.0)
    return {
        "tokens_per_second": rate,
        "matmul_fraction": rate * trained.flops_per_token / peak,
        "matmul_gflops": peak / 1e9,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Interleave the cases over `--rounds` fresh processes each and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "PRECISION"))
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to measure beside ours")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(measure(*options.one, options.steps, options.nanogpt)))
        return
    cases = [*CASES, ("nanogpt", "fp32")] if options.nanogpt else CASES
    rows: dict[tuple[str, str], list[Figures]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            rows[case].append(_in_fresh_process(case, options.steps, options.nanogpt))
    figures = {
        f"{engine} {precision}": _medians(rows[engine, precision]) for engine, precision in cases
    }
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")


def _in_fresh_process(case: tuple[str, str], steps: int, checkout: Path | None) -> Figures:
    command = [sys.executable, "-m", "tests.benchmarks.train_speed", "--one", *case]
    command += ["--steps", str(steps), *(["--nanogpt", str(checkout)] if checkout else [])]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]


def _medians(rows: list[Figures]) -> Figures:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _print(figures: dict[str, Figures]) -> None:
    print(f"job: 6 layers x 384, seq {SEQ_LEN}, batch {BATCH}, vocab {VOCAB}, one thread")
    print(f"{'engine':<14} {'tok/CPU-s':>10} {'of matmul':>10} {'matmul':>14} {'peak':>9}")
    base = figures.get("nanogpt fp32")
    for name, row in figures.items():
        rate = row["tokens_per_second"]
        beside = f"  {rate / base['tokens_per_second']:.2f}x nanoGPT" if base else ""
        print(
            f"{name:<14} {rate:>10.0f} {row['matmul_fraction']:>10.1%} "
            f"{row['matmul_gflops']:>7.0f} GFLOP/s {row['peak_mb']:>6.0f} MB{beside}"
        )


if __name__ == "__main__":
    main()
