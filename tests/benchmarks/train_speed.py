"""Training speed of one process, as tokens per CPU-second and as a fraction of this machine's
matmul rate.

The job: 6 layers x 384, sequence 256, batch 8, vocabulary 65, about 10.65 M parameters, AdamW, one
thread. Engines are interleaved and the median of the rounds is reported; CPU-seconds, because wall
time depends on who else is there.

    make bench          both precisions, PlainEngine and DeepSpeedEngine stage 1; a CUDA section
    where there is a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SEQ_LEN, BATCH, VOCAB = 256, 8, 65
CASES = [("plain", "fp32"), ("zero1", "fp32"), ("plain", "bf16"), ("zero1", "bf16")]

# nanoGPT on the same job and kind of machine, tokens per CPU-second (lowest and highest of three
# runs).
NANOGPT = (989, 1045)


def measure(engine_name: str, precision: str, steps: int) -> dict[str, float]:
    """One engine in this process: speed, peak memory, and the fraction of the matmul rate."""
    import torch

    from model.config import ModelConfig
    from model.flops import flops_per_token, num_parameters
    from model.gpt import GPT, init_weights
    from model.loss import token_loss_sum
    from train.config import JobConfig
    from train.engine import DTYPES, DeepSpeedEngine, Engine, PlainEngine
    from train.metrics import matmul_flops_per_second
    from train.world import join_world

    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=6,
        hidden_size=384,
        num_heads=6,
        ffn_size=1024,
        max_seq_len=SEQ_LEN,
    )
    job = JobConfig.model_validate({"precision": precision, "zero": {"stage": 1}})
    with join_world() as world:
        module = GPT(config)
        init_weights(module, 0)
        engine: Engine = (
            PlainEngine(module, job, world)
            if engine_name == "plain"
            else DeepSpeedEngine(module, job, world, micro_batch=BATCH, accumulation=1)
        )
        generator = torch.Generator().manual_seed(0)

        def step() -> None:
            ids = torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1), generator=generator)
            batch = {"x": ids[:, :-1], "y": ids[:, 1:].contiguous()}
            engine.forward_backward(
                batch,
                num_valid=BATCH * SEQ_LEN,
                loss_sum=lambda module, batch: token_loss_sum(module(batch["x"]), batch["y"]),
            )
            engine.step(lr=1e-3)
            if world.device.type == "cuda":
                torch.cuda.synchronize()

        for _ in range(2):
            step()
        clock = time.perf_counter if world.device.type == "cuda" else time.process_time
        started = clock()
        for _ in range(steps):
            step()
        seconds = clock() - started
        rate = steps * BATCH * SEQ_LEN / seconds
        peak = matmul_flops_per_second(world.device, DTYPES[job.precision], seconds=1.0)
    return {
        "tokens_per_second": rate,
        "matmul_fraction": rate * flops_per_token(config, SEQ_LEN) / peak,
        "matmul_gflops": peak / 1e9,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "parameters": num_parameters(config),
    }


def main() -> None:
    """Interleave the cases over `--rounds` fresh processes each and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "PRECISION"))
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(measure(*options.one, options.steps)))
        return
    rows: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case in CASES:
            rows[case].append(_in_fresh_process(case, options.steps))
    figures = {
        f"{engine} {precision}": _medians(rows[engine, precision]) for engine, precision in CASES
    }
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")


def _in_fresh_process(case: tuple[str, str], steps: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.train_speed",
        "--one",
        *case,
        "--steps",
        str(steps),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]


def _medians(rows: list[dict[str, float]]) -> dict[str, Any]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _print(figures: dict[str, dict[str, float]]) -> None:
    parameters = next(iter(figures.values()))["parameters"]
    print(
        f"job: 6 layers x 384, seq {SEQ_LEN}, batch {BATCH}, vocab {VOCAB}, "
        f"{parameters / 1e6:.2f} M parameters"
    )
    print(
        f"{'engine':<12} {'tok/CPU-s':>10} {'of matmul':>10} {'matmul':>14} {'peak':>9}  vs "
        f"nanoGPT {NANOGPT}"
    )
    for name, row in figures.items():
        rate = row["tokens_per_second"]
        print(
            f"{name:<12} {rate:>10.0f} {row['matmul_fraction']:>10.1%} "
            f"{row['matmul_gflops']:>7.0f} GFLOP/s "
            f"{row['peak_mb']:>6.0f} MB  {rate / NANOGPT[1]:.2f}x - {rate / NANOGPT[0]:.2f}x"
        )


if __name__ == "__main__":
    main()
