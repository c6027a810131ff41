"""Redoes the measurements behind the README: real commands on real corpora, one JSON file each,
then the table.

    make evidence                      quickstart and training speed
    make evidence NANOGPT=CHECKOUT     with nanoGPT's step beside ours
    make evidence CORPORA=FOLDER       and the corpora in FOLDER (tinyshakespeare, gutenberg-en,
    ...)

Each docs/evidence/NAME.json holds the commands, the commit, the seed, the machine and the figures.
Two parts of the README are rewritten between their markers: the table, from those files alone, and
what quickstart printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.device import processor

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
TABLE = "<!-- evidence: written by `make evidence` -->", "<!-- end of evidence -->"
OUTPUT = (
    "<!-- quickstart output: written by `make evidence` -->",
    "<!-- end of quickstart output -->",
)
SEED = 0


@dataclass(frozen=True)
class Corpus:
    """A corpus to pretrain on, and what to fine-tune its model on."""

    name: str
    text: str
    vocab_size: int
    steps: int
    finetune: tuple[tuple[str, ...], ...] = ()
    """Recipe, file, and overrides of each fine-tuning."""


CORPORA = (
    Corpus("tinyshakespeare", "tinyshakespeare/input.txt", 1024, 300),
    Corpus(
        "gutenberg-en",
        "gutenberg-en/books.jsonl",
        4096,
        300,
        (
            ("classify", "banking77/train.csv", "data.label_column=category", "epochs=2"),
            ("instruct", "instruct-dolly/train.jsonl", "epochs=1"),
        ),
    ),
    Corpus("chinese-poetry", "chinese-poetry/tang.jsonl", 8192, 200),
)


class Recorder:
    """Runs headrace commands and remembers what was typed, printed and spent."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self._started = time.monotonic()

    def headrace(self, *arguments: str, folder: Path | None = None) -> str:
        """stdout of one command; the commands are kept as a person would type them."""
        self.commands.append(" ".join(["headrace", *map(_shown, arguments)]))
        print("$", self.commands[-1], file=sys.stderr, flush=True)
        done = subprocess.run(
            [str(Path(sys.executable).with_name("headrace")), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd=folder,
            env={**os.environ, "COLUMNS": "120"},
        )
        return done.stdout

    def write(self, name: str, figures: dict[str, Any]) -> None:
        """docs/evidence/NAME.json."""
        EVIDENCE.mkdir(parents=True, exist_ok=True)
        content = {
            "name": name,
            "commands": self.commands,
            "commit": _commit(),
            "seed": SEED,
            "machine": _machine(),
            "seconds": round(time.monotonic() - self._started, 1),
            "figures": figures,
        }
        (EVIDENCE / f"{name}.json").write_text(
            json.dumps(content, indent=2, ensure_ascii=True) + "\n"
        )


def life_of(corpus: Corpus, folder: Path, work: Path) -> None:
    """prepare -> pretrain -> export -> evaluate [-> finetune -> evaluate] of one corpus."""
    recorder = Recorder()
    dataset, run, hf = work / "dataset", work / "run", work / "hf"
    prepared = recorder.headrace(
        "prepare",
        f"--input={folder / corpus.text}",
        f"--output={dataset}",
        f"--vocab-size={corpus.vocab_size}",
        "--json",
    )
    recorder.headrace(
        "pretrain",
        "tiny-cpu",
        f"data={dataset}",
        f"--run={run}",
        "--nproc=2",
        f"steps={corpus.steps}",
        "zero.stage=2",
        f"seed={SEED}",
    )
    recorder.headrace("export", str(run), str(hf))
    found = json.loads(recorder.headrace("evaluate", str(hf), "--data", str(dataset), "--json"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [row["val_loss"] for row in rows if "val_loss" in row]
    figures: dict[str, Any] = {
        "prepared": {k: v for k, v in json.loads(prepared).items() if k != "dataset"},
        "pretraining": found,
        "val_loss_untrained": validations[0],
        "val_loss_trained": validations[-1],
        "tokens": rows[-1]["tokens"],
    }
    figures["finetuning"] = {
        recipe: finetuned(recorder, recipe, folder / file, overrides, hf=hf, run=work / recipe)
        for recipe, file, *overrides in corpus.finetune
    }
    recorder.write(corpus.name, figures)


def finetuned(
    recorder: Recorder, recipe: str, file: Path, overrides: list[str], *, hf: Path, run: Path
) -> dict[str, Any]:
    """Fine-tune and measure on the tenth of the examples that was held out."""
    recorder.headrace(
        "finetune", recipe, f"model={hf}", f"data={file}", f"--run={run}", "--nproc=2", *overrides
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    figures = {"val_loss_before": losses[0], "val_loss_after": losses[-1]}
    if recipe == "classify":
        column = next(o.partition("=")[2] for o in overrides if o.startswith("data.label_column"))
        scores = recorder.headrace(
            "evaluate",
            str(run / "hf"),
            f"--data={file}",
            f"--label-column={column}",
            "--split=val",
            "--json",
        )
        kept = json.loads(scores).items()
        figures |= {key: value for key, value in kept if isinstance(value, float)}
    return figures


def quickstart(work: Path) -> None:
    """The life cycle on the standard library's source."""
    recorder = Recorder()
    printed = recorder.headrace("quickstart", "--workdir", "quickstart", folder=work)
    figures = json.loads((work / "quickstart" / "summary.json").read_text())
    recorder.write("quickstart", figures)
    # The paths of the next commands are those of this machine.
    shown = printed.partition("next:")[0].rstrip()
    rewrite(
        OUTPUT,
        f"What `headrace quickstart` printed ({figures['seconds']:.0f} s, {_machine()}, commit "
        f"{_commit()}, seed {SEED}):\n\n```\n{shown}\n```",
    )


def train_speed(nanogpt: Path | None) -> None:
    """Tokens per CPU-second of the benchmark job."""
    recorder = Recorder()
    beside = ["--nanogpt", str(nanogpt)] if nanogpt else []
    recorder.commands.append('make bench BENCH="--nanogpt CHECKOUT"' if nanogpt else "make bench")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.train_speed", "--json", str(path), *beside],
            cwd=ROOT,
            check=True,
        )
        recorder.write("train_speed", json.loads(path.read_text()))


def gpu_speed() -> None:
    """What one GPU does."""
    recorder = Recorder()
    recorder.commands.append("python -m tests.benchmarks.gpu_speed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "tests.benchmarks.gpu_speed", "--json", str(path)]
        subprocess.run(command, cwd=ROOT, check=True)
        recorder.write("gpu_speed", json.loads(path.read_text()))


def table() -> str:
    """The README's table, from the files alone."""
    lines = ["| what | command | figures | commit, seed |", "|---|---|---|---|"]
    for path in sorted(EVIDENCE.glob("*.json")):
        content = json.loads(path.read_text())
        lines.append(
            f"| {content['name']} | "
            f"{'<br>'.join(f'`{command}`' for command in content['commands'])} | "
            f"{_summary(content['name'], content['figures'])} | {content['commit']}, "
            f"{content['seed']} |"
        )
    return "\n".join(lines)


def _summary(name: str, figures: dict[str, Any]) -> str:
    if name == "train_speed":
        return "; ".join(
            f"{case}: {row['tokens_per_second']:.0f} tokens/CPU-s, {row['matmul_fraction']:.0%} "
            "of matmul"
            for case, row in figures.items()
        )
    if name == "gpu_speed":
        return "; ".join(
            f"{case}: {row['tokens_per_second']:,.0f} tokens/s, {row['tflops']:.0f} TFLOP/s, "
            f"{row['matmul_fraction']:.0%} of matmul, {row['peak_gb']:.1f} GB "
            f"(planned {row['planned_gb']:.1f})"
            for case, row in figures.items()
        )
    if name == "published_runs":
        return "time of a step, predicted: " + "; ".join(
            f"{group}: {found['runs']} runs, off by {found['median_absolute_error']:.1%} (median), "
            f"from {found['smallest_error']:+.0%} to {found['largest_error']:+.0%} of the speed"
            for group, found in figures["summary"].items()
        )
    if name == "quickstart":
        numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
        return "; ".join(f"{key} {value:.2f}" for key, value in numbers.items())
    text = (
        f"{figures['tokens']:,} tokens; validation loss {figures['val_loss_untrained']:.3f} -> "
        f"{figures['val_loss_trained']:.3f}; {figures['pretraining']['bits_per_byte']:.3f} bits "
        "per byte"
    )
    for recipe, found in figures["finetuning"].items():
        shown = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
        text += f"; {recipe}: {shown}"
    return text


def _shown(argument: str) -> str:
    # Paths of this machine say nothing to a reader.
    option, equals, path = argument.rpartition("=")
    if not path.startswith("/"):
        return argument
    parts = [part for part in Path(path).parts[-2:] if not part.startswith("headrace-evidence-")]
    return option + equals + "/".join(parts)


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def rewrite(markers: tuple[str, str], text: str) -> None:
    """Put `text` between two markers of the README."""
    readme = ROOT / "README.md"
    content = readme.read_text()
    start, stop = content.index(markers[0]) + len(markers[0]), content.index(markers[1])
    readme.write_text(f"{content[:start]}\n{text}\n{content[stop:]}")


def _machine() -> str:
    gpu = f"one {torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores, {processor()}, {gpu}Python {platform.python_version()}"


def main() -> None:
    """Run what was asked for, then rewrite the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=Path, help="folder of real corpora")
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT to measure beside ours")
    parser.add_argument("--only", nargs="*", help="names; default: everything that can run here")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="headrace-evidence-"))
    try:
        jobs: dict[str, Any] = {
            "quickstart": lambda: quickstart(work),
            "train_speed": lambda: train_speed(options.nanogpt),
        }
        if torch.cuda.is_available():
            jobs["gpu_speed"] = gpu_speed
        for corpus in CORPORA if options.corpora else ():
            jobs[corpus.name] = lambda corpus=corpus: life_of(
                corpus, options.corpora, work / corpus.name
            )
        for name, job in jobs.items():
            if not options.only or name in options.only:
                job()
    finally:
        shutil.rmtree(work)
    rewrite(TABLE, table())


if __name__ == "__main__":
    main()
