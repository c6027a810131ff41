"""The whole life cycle on one page: raw text to an exported, fine-tuned, evaluated model.

Every stage is a `headrace` command, printed before it runs, so each can be repeated by hand. The
text is the source of this Python's own standard library; training runs on two processes with ZeRO
stage 2 in bf16, or in fp32 on a CPU that is slow in bf16. A second call continues where the first
one ended. The model must learn: held-out bits per byte at most 0.6 of the untrained model's, and
macro-F1 at least 0.2 above always answering the commonest class; else the exit code is 1.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher import spawn
from launcher.corpus import Corpus, write_corpus

PREPARE = ("--vocab-size=2048", "--val-fraction=0.05")
PRETRAIN = ("zero.stage=2", "steps=450", "schedule.warmup_steps=10", "eval.samples=512")
FINETUNE = ("zero.stage=2", "epochs=2", "batch_size=16", "schedule.warmup_steps=10")
EVERY = ("checkpoint.every=150",)
PROMPT = "def __init__(self"
MAX_BITS_RATIO = 0.6
MIN_F1_GAIN = 0.2


class QuickstartError(ValueError):
    """The model did not learn what it must."""

    exit_code: ClassVar[int] = 1


class Folders:
    """Where everything of a quickstart lies."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.corpus = workdir / "corpus"
        self.dataset = workdir / "dataset"
        self.pretrained = workdir / "pretrained"
        self.model = workdir / "model"
        self.finetuned = workdir / "finetuned"
        self.classifier = self.finetuned / "hf"


@dataclass(frozen=True)
class Findings:
    """What was measured."""

    bits_before: float
    """Bits per byte of held-out text, before the first step."""
    bits_after: float
    bits_xz: float
    """The same text under `xz -9`."""
    scores: dict[str, Any]
    """Evaluation of the classifier on held-out files."""
    baseline: dict[str, float]
    """accuracy and f1_macro of always answering the commonest class."""
    sample: str
    """What the model makes of PROMPT."""


def quickstart(workdir: Path) -> int:
    """Run every stage that `workdir` does not hold yet, measure, and print; returns the exit code.

    QuickstartError when a threshold is missed.
    """
    started = time.monotonic()
    # Runs know their inputs by path: one spelling, however the folder was named.
    workdir = _from_here(workdir)
    folders = Folders(workdir)
    corpus = write_corpus(folders.corpus)
    for number, stage in enumerate(_stages(folders, corpus), start=1):
        code = _run(f"[{number}/4] ", *stage)
        if code:
            _say(f"not finished; this continues: {_program()} quickstart --workdir {workdir}")
            return code
    findings = _measure(folders, corpus)
    _write_summary(folders, findings, seconds=time.monotonic() - started)
    _show(folders, findings, seconds=time.monotonic() - started)
    _check(findings)
    return 0


def _stages(folders: Folders, corpus: Corpus) -> Iterator[list[str]]:
    yield _argv("prepare", "--input", corpus.text, "--output", folders.dataset, *PREPARE)
    ranks = ("--nproc", _num_processes())
    precision = _precision()
    yield _argv(
        "pretrain", "tiny-cpu", f"data={folders.dataset}", "--run", folders.pretrained, *ranks,
        *PRETRAIN, *EVERY, *precision,
    )  # fmt: skip
    yield _argv("export", folders.pretrained, folders.model)
    yield _argv(
        "finetune", "classify", f"model={folders.model}", f"data={corpus.windows}",
        f"data.val={corpus.val_windows}", "--run", folders.finetuned, *ranks, *FINETUNE, *EVERY,
        *precision,
    )  # fmt: skip


def _run(label: str, command: str, *argv: str) -> int:
    _say(f"{label}$ headrace {shlex.join([command, *argv])}")
    if command == "export" and (Path(argv[1]) / "config.json").is_file():
        _say(f"{argv[1]} is there already")
        return 0
    if "--nproc" not in argv:
        return _in_process([command, *argv])[0]
    # A process of its own, were it a single rank: DeepSpeed serves one world per process.
    run = Path(argv[argv.index("--run") + 1])
    num_processes = int(argv[argv.index("--nproc") + 1])
    return spawn.launch([command, *argv], run=run, num_processes=num_processes)


def _measure(folders: Folders, corpus: Corpus) -> Findings:
    from train.scores import majority_baseline

    classes = _output("evaluate", folders.classifier, "--data", corpus.val_windows, "--json")
    scores = json.loads(classes)
    held_out = _held_out_text(folders.dataset)
    before, after = _validation_bits(folders)
    return Findings(
        bits_before=before,
        bits_after=after,
        bits_xz=8 * len(lzma.compress(held_out, preset=9)) / len(held_out),
        scores=scores,
        baseline=majority_baseline(scores["confusion_matrix"]),
        sample=_output("generate", folders.model, PROMPT, "--max-tokens", 64),
    )


def _validation_bits(folders: Folders) -> tuple[float, float]:
    """Bits per byte of the validation samples before the first step and after the last."""
    from data.manifest import read_manifest
    from train.metrics import read_metrics

    counts = read_manifest(folders.dataset).counts
    bits_per_nat = counts["tokens_val"] / counts["text_bytes_val"] / math.log(2)
    losses = [row["val_loss"] for row in read_metrics(folders.pretrained) if "val_loss" in row]
    return losses[0] * bits_per_nat, losses[-1] * bits_per_nat


def _held_out_text(dataset: Path) -> bytes:
    """The validation split as text."""
    from data.manifest import read_manifest
    from data.tokenizer import load_tokenizer
    from data.tokens import TokenSource

    manifest, tokenizer = read_manifest(dataset), load_tokenizer(dataset)
    pieces = []
    for name in manifest.source_names("val"):
        source = TokenSource(dataset, manifest, "val", name)
        ids = source.read(0, source.num_tokens).tolist()
        pieces.append(tokenizer.decode([id for id in ids if id != tokenizer.eos_id]))
    return "".join(pieces).encode()


def _write_summary(folders: Folders, findings: Findings, *, seconds: float) -> None:
    """What the table shows, for programs."""
    scores = {key: value for key, value in findings.scores.items() if isinstance(value, float)}
    content = {
        "seconds": round(seconds, 1),
        "bits_per_byte_untrained": findings.bits_before,
        "bits_per_byte_trained": findings.bits_after,
        "bits_per_byte_xz": findings.bits_xz,
        **scores,
        "baseline": findings.baseline,
        "sample": PROMPT + findings.sample,
    }
    path = folders.workdir / "summary.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check(findings: Findings) -> None:
    limit = MAX_BITS_RATIO * findings.bits_before
    if not findings.bits_after <= limit:
        raise QuickstartError(
            f"the model did not learn: {findings.bits_after:.2f} bits per byte after training, "
            f"at most {limit:.2f} were expected ({MAX_BITS_RATIO} of {findings.bits_before:.2f})"
        )
    least = findings.baseline["f1_macro"] + MIN_F1_GAIN
    if not findings.scores["f1_macro"] >= least:
        raise QuickstartError(
            f"fine-tuning did not learn: macro-F1 {findings.scores['f1_macro']:.2f}, at least "
            f"{least:.2f} was expected (the commonest class alone, plus {MIN_F1_GAIN})"
        )


def _show(folders: Folders, findings: Findings, *, seconds: float) -> None:
    from data.manifest import read_manifest

    manifest = read_manifest(folders.dataset)
    scores, baseline = findings.scores, findings.baseline
    table = Table(title=f"{seconds:.0f} s", title_justify="right", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    train, val = manifest.num_tokens("train"), manifest.num_tokens("val")
    table.add_row("tokens", f"{train:,} for training, {val:,} held out")
    table.add_row(
        "bits per byte, held out",
        f"{findings.bits_before:.2f} before training, {findings.bits_after:.2f} after "
        f"(xz -9 on the same text: {findings.bits_xz:.2f})",
    )
    table.add_row(
        "which of 8 packages, held out",
        f"accuracy {scores['accuracy']:.2f}, precision {scores['precision_macro']:.2f}, "
        f"recall {scores['recall_macro']:.2f}, F1 {scores['f1_macro']:.2f} "
        f"(commonest class: accuracy {baseline['accuracy']:.2f}, F1 {baseline['f1_macro']:.2f})",
    )
    table.add_row("a sample", escape(PROMPT + findings.sample))
    for name, path in (
        ("token shards", folders.dataset),
        ("checkpoints, metrics", folders.pretrained),
        ("Hugging Face folder", folders.model),
        ("fine-tuned classifier", folders.classifier),
    ):
        table.add_row(name, str(path))
    console = Console()
    console.print(table)
    console.print("next:", highlight=False)
    for command in (
        f"generate {folders.model} 'class Queue:' --max-tokens 100",
        "prepare --input YOUR_TEXT --output dataset --vocab-size 8192",
        "plan llama-7b --nodes 32 --gpus-per-node 8 --gpu h100 --explain",
    ):
        console.print(f"  {_program()} {command}", highlight=False, soft_wrap=True)


def _num_processes() -> int:
    """Two; on a machine with a single GPU one, because a GPU belongs to one rank."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def _precision() -> tuple[str, ...]:
    """That of the recipes, bf16, but on a CPU that has no instructions for it."""
    import torch

    from train.ceiling import SLOW, bf16_share

    if torch.cuda.is_available():
        return ()
    share = bf16_share(torch.device("cpu"))
    if share >= SLOW:
        return ()
    _say(f"this CPU multiplies bf16 at {share:.2f} of its fp32 rate: training in fp32")
    return ("precision=fp32",)


def _program() -> str:
    """How a person calls `headrace` from here: by path where its environment is not active."""
    if shutil.which("headrace"):
        return "headrace"
    return str(_from_here(Path(sys.executable).with_name("headrace")))


def _from_here(path: Path) -> Path:
    """`path` relative to the current directory where it lies below it, else absolute."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _argv(*words: object) -> list[str]:
    return [str(word) for word in words]


def _output(*words: object) -> str:
    """Stdout of a `headrace` command that must succeed."""
    code, stdout = _in_process(_argv(*words))
    if code:
        raise QuickstartError(f"`headrace {shlex.join(_argv(*words))}` left with {code}")
    return stdout


def _in_process(argv: list[str]) -> tuple[int, str]:
    """Exit code and stdout of a `headrace` command that runs in this process."""
    from launcher.cli import run_command

    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code = run_command(argv, standalone=False)
    return code, stdout.getvalue()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
