"""A checkpoint as a Hugging Face folder, proven to be the same model before it is published.

Weights are read from the checkpoint's slices tensor by tensor, without DeepSpeed or a GPU; writing
holds two weight files in memory at most, the proof one copy of the model in fp32. The folder is
built as OUT.tmp-PID, which the next export removes when this one is killed. A clean process then
loads it with transformers, which must give our logits on random token ids and our token ids on
awkward texts. Only then is it renamed to OUT; on any disagreement nothing is published.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from data.claim import holding, is_abandoned
from data.durable import file_sha256, publish_folder, writing
from data.tokenizer import Tokenizer, load_tokenizer, tokenizer_file, write_huggingface_tokenizer
from model.config import ModelConfig, parameter_shapes
from model.flops import num_parameters
from model.hf_names import hf_config
from train import faults
from train.checkpoint import Checkpoint, CheckpointError, committed, open_checkpoint
from train.choice import newest_intact, retraining
from train.config import RunConfig
from train.export_weights import DTYPES, Dtype, reference_logits, write_weights
from train.run import read_config
from train.slices import writing_tensors

log = logging.getLogger(__name__)

NUM_PROBES, PROBE_TOKENS = 2, 64


class ExportError(ValueError):
    """A checkpoint that cannot be exported, or a folder that is not the model it was made from."""

    exit_code: ClassVar[int] = 1


class ExportUsageError(ExportError):
    """An export that is refused before any work is done."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True)
class Agreement:
    """What the clean process found when it compared the folder with the run."""

    max_logit_difference: float
    tolerance: float
    num_logits: int
    num_texts: int
    transformers: str


@dataclass(frozen=True)
class ExportSummary:
    """A published folder."""

    folder: Path
    step: int
    num_parameters: int
    """Without the rows that pad the vocabulary."""
    weight_files: tuple[str, ...]
    agreement: Agreement


def export(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: Dtype = "fp32",
    max_shard_bytes: int = 2 << 30,
) -> ExportSummary:
    """Write the checkpoint of `step` (the newest by default) of a pretraining run to `out`.

    Raises ExportUsageError when `out` holds something or `run` is no pretraining run, ExportError
    when the folder turns out not to be the same model, CheckpointError when the checkpoint is
    missing or damaged.
    """
    _refuse_occupied(run, out)
    config = _model_config(run)
    saved = _open(run, out, step)
    _check_model(saved, config)
    source = tokenizer_file(run)
    _check_tokenizer(saved, source)
    tokenizer = load_tokenizer(source)
    _remove_leftovers(out)
    unfinished = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    # Nobody else has our number; on storage without locks a dead export of it was left above.
    shutil.rmtree(unfinished, ignore_errors=True)
    with holding(unfinished):
        try:
            bos = bool(saved.state.get("bos", False))
            write_huggingface_tokenizer(source, unfinished, bos=bos)
            _write_configs(unfinished, config, tokenizer, dtype)
            weights = write_weights(
                unfinished, saved, config, dtype, max_shard_bytes=max_shard_bytes
            )
            log.info("step %d is written; comparing it with transformers", saved.step)
            probe_ids = _probe_ids(config)
            logits = reference_logits(saved, config, dtype, probe_ids)
            agreement = compare(unfinished, probe_ids, logits, tokenizer=source, bos=bos)
            _write_provenance(unfinished, run, saved, dtype, probe_ids, agreement)
            _publish(unfinished, out)
        except CheckpointError as error:
            raise _with_remedy(error, run, out, saved.step) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    size = num_parameters(config, padded=False)
    return ExportSummary(out, saved.step, size, weights, agreement)


def compare(
    folder: Path, probe_ids: torch.Tensor, logits: torch.Tensor, *, tokenizer: Path, bos: bool
) -> Agreement:
    """Let a clean process compare the folder with our logits and our tokenizer.

    It shares nothing with this one but files, so nothing set or patched here can hide a defect of
    the folder. Raises ExportError that says what differs.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-export-") as exchange:
        probe, verdict = Path(exchange, "probe.safetensors"), Path(exchange, "verdict.json")
        with writing_tensors(probe):
            save_file({"input_ids": probe_ids, "logits": logits}, probe)
        command = [sys.executable, "-m", "train.export_check", str(folder.resolve())]
        command += [str(probe), str(tokenizer.resolve()), "bos" if bos else "plain", str(verdict)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0 or not verdict.exists():
            last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
            raise ExportError(
                f"the process that checks the export left with code {done.returncode}: {last}; "
                "nothing was published"
            )
        found = json.loads(verdict.read_text())
    if found["problems"]:
        raise ExportError(
            "the exported folder is not the model it was made from:\n  "
            + "\n  ".join(found["problems"])
            + f"\nnothing was published; transformers is {found['agreement']['transformers']}"
        )
    return Agreement(**found["agreement"])


def _refuse_occupied(run: Path, out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if os.path.lexists(out):
        what = "is not empty" if out.is_dir() else "is a file"
        # Only what an export has written may be thrown away lightly.
        remove = f"remove it with `rm -r {out}`, or " if (out / "headrace.json").is_file() else ""
        raise ExportUsageError(
            f"{out} {what}, and an export overwrites nothing; {remove}name another folder: "
            f"`headrace export {run} {out.with_name(out.name + '-2')}`"
        )


def _remove_leftovers(out: Path) -> None:
    """Remove what killed exports to the same place have left; a living one holds its folder."""
    for folder in out.parent.glob(f"{glob.escape(out.name)}.tmp-*"):
        if folder.suffix.removeprefix(".tmp-").isdigit() and is_abandoned(folder):
            log.info("removing %s, which a killed export has left", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _open(run: Path, out: Path, step: int | None) -> Checkpoint:
    try:
        return open_checkpoint(run, step)
    except CheckpointError as error:
        steps = committed(run)
        damaged = step if step is not None else max(steps, default=None)
        if damaged not in steps:
            raise
        raise _with_remedy(error, run, out, damaged) from error


def _with_remedy(error: CheckpointError, run: Path, out: Path, step: int) -> CheckpointError:
    """The error of a damaged checkpoint, with the commands that help; reads the others."""
    other = newest_intact(run, but=step)
    remedy = retraining(run, step, intact=other)
    if other is not None:
        remedy += f"; to export that one: `headrace export {run} {out} --step {other}`"
    return CheckpointError(f"{error}\n{remedy}")


def _model_config(run: Path) -> ModelConfig:
    config = read_config(run)
    if not isinstance(config, RunConfig):
        raise ExportUsageError(
            f"{run} is a fine-tuning run, whose result is a Hugging Face folder already: "
            f"{run / 'hf'}"
        )
    length = config.model.max_seq_len or config.seq_len
    return config.model.model_copy(update={"max_seq_len": length})


def _check_model(saved: Checkpoint, config: ModelConfig) -> None:
    stored = saved.parameters
    # Before so many names are made: a layer has some parameters.
    if config.num_layers > len(stored):
        raise ExportError(
            f"{saved.folder} is of another model than the run's config.json: {len(stored)} "
            f"parameters there, config.json makes it {config.num_layers} layers"
        )
    expected = parameter_shapes(config)
    if stored != expected:
        names = sorted(stored.keys() | expected.keys())
        name = next(n for n in names if stored.get(n) != expected.get(n))
        raise ExportError(
            f"{saved.folder} is of another model than the run's config.json: {name!r} is "
            f"{stored.get(name, 'absent')} there, config.json makes it "
            f"{expected.get(name, 'absent')}"
        )


def _check_tokenizer(saved: Checkpoint, source: Path) -> None:
    trained_with = saved.state.get("tokenizer_sha256")
    if trained_with is not None and file_sha256(source) != trained_with:
        raise ExportError(
            f"{source} is not the tokenizer that the run was trained with (sha256 "
            f"{trained_with[:12]}...); copy {source.name} from the dataset to {source}"
        )


def _probe_ids(config: ModelConfig) -> torch.Tensor:
    """Random ids of the whole vocabulary, its first and last id among them."""
    num_tokens = min(PROBE_TOKENS, config.max_seq_len)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (NUM_PROBES, num_tokens), generator=generator)
    ids[0, 0], ids[-1, 0] = 0, config.vocab_size - 1
    return ids


def _write_configs(folder: Path, config: ModelConfig, tokenizer: Tokenizer, dtype: Dtype) -> None:
    special = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    stored = str(DTYPES[dtype]).removeprefix("torch.")
    _write_json(folder / "config.json", {**hf_config(config), **special, "dtype": stored})
    _write_json(folder / "generation_config.json", special)


def _write_provenance(
    folder: Path,
    run: Path,
    saved: Checkpoint,
    dtype: Dtype,
    probe_ids: torch.Tensor,
    agreement: Agreement,
) -> None:
    files = sorted(path for path in folder.iterdir())
    state = saved.state
    _write_json(
        folder / "headrace.json",
        {
            "headrace": version("headrace"),
            "run": run.resolve().name,
            "step": saved.step,
            "tokens": state.get("tokens"),
            "data": state.get("data"),
            "config_sha256": file_sha256(run / "config.json"),
            "checkpoint_sha256": file_sha256(saved.folder / "manifest.json"),
            "tokenizer_sha256": state.get("tokenizer_sha256"),
            "dtype": dtype,
            "files": {path.name: file_sha256(path) for path in files},
            "checks": {**asdict(agreement), "probe_ids": probe_ids.tolist()},
        },
    )


def _publish(unfinished: Path, out: Path) -> None:
    faults.point("export")
    for path in unfinished.iterdir():
        # safetensors makes files that only their owner may read.
        shutil.copymode(unfinished / "config.json", path)
    try:
        # Onto an empty folder, too; one that was filled meanwhile is left alone.
        publish_folder(unfinished, out)
    except OSError as error:
        raise ExportError(
            f"{out} cannot be published: {error.strerror}; was it filled meanwhile?"
        ) from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with writing(path):
        path.write_text(json.dumps(value, indent=2) + "\n")
