"""Runs and mirrors that somebody else has made, for tests/train/attack.py: manifests with a good
seal and bad content, links, and everything else that a resume or an export reads.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from data.durable import read_sealed, write_sealed
from model.config import parameter_shapes
from tests.train.attack import BOMBS, NAMES, NUMBERS, Case, pickled
from tests.train.checkpoints import inventory
from tests.train.folders import make_tokenizer
from tests.train.toy import make_engine, run_steps, save
from train import checkpoint
from train.attempts import attempts
from train.config import JobConfig, RunConfig
from train.export import ExportError, export
from train.phases import read_phases
from train.restore import restore_newer
from train.rollback import rollbacks_of
from train.run import open_run, read_config
from train.slices import write_slices
from train.state import load_newest
from train.world import World

FOLDER = "step-000000001"


def checkpoints(folder: Path, world: World) -> Iterator[Case]:
    """Manifests that are opened, resumed from, or come back from a mirror."""
    engine, _ = make_engine(JobConfig(precision="fp32"), world, size=4, micro_batch=4, plain=True)
    run_steps(engine, world, range(1), size=4, micro_batch=4, accumulation=1)
    run, far, lost = folder / "run", folder / "far", folder / "lost"
    save(engine, world, run, 1)
    (run / "config.json").write_text("{}")
    shutil.copytree(run / "checkpoints", far / "lost")
    manifest, copy = run / "checkpoints" / FOLDER / "manifest.json", far / "lost" / FOLDER
    content = read_sealed(manifest)

    def opened(changed: Any) -> None:
        write_sealed(manifest, changed)
        saved = checkpoint.open_checkpoint(run)
        saved.verify()
        saved.read("norm.weight")

    def resumed(changed: Any) -> None:
        write_sealed(manifest, changed)
        load_newest(engine, world, run)

    def restored(changed: Any) -> None:
        write_sealed(copy / "manifest.json", changed)
        shutil.rmtree(lost, ignore_errors=True)
        restore_newer(world, lost, str(far))
        if checkpoint.committed(lost):
            load_newest(engine, world, lost)

    ways = (opened, (run,)), (resumed, (run,)), (restored, (far, lost))
    for load, roots in ways:
        yield Case(f"{load.__name__} good", lambda load=load: load(content), roots, is_good=True)
    for number, (name, changed) in enumerate(_manifests(content)):
        # The names in all ways, the rest in one each.
        for load, roots in ways if name.startswith("name") else (ways[number % 3],):
            yield Case(f"{load.__name__} {name}", lambda c=changed, f=load: f(c), roots)

    def mirrored(name: str, raw: bytes) -> None:
        (far / "lost" / name).write_bytes(raw)
        try:
            restored(content)
            attempts(lost)
            read_phases(lost)
            rollbacks_of(lost)
            if name == "config.json":
                read_config(lost)
        finally:
            (far / "lost" / name).unlink()

    for name in ("config.json", "attempts.jsonl", "events.jsonl", "phases.jsonl", "ran.py"):
        for number, raw in enumerate(BOMBS):
            load = lambda name=name, raw=raw: mirrored(name, raw)  # noqa: E731
            yield Case(f"mirror {name} {number}", load, (far, lost))

    def linked(file: Path, load: Any) -> None:
        file.rename(folder / "away")
        file.symlink_to(folder / "secret")
        try:
            load(content)
        finally:
            file.unlink()
            (folder / "away").rename(file)

    # Followed, as people keep files on several disks; what is there must have the hash.
    for file, (load, roots) in zip((manifest.parent, manifest.parent, copy), ways, strict=True):
        slices = file / "rank-00000.safetensors"
        yield Case(
            f"{load.__name__} link",
            lambda file=slices, load=load: linked(file, load),
            (*roots, folder / "secret"),
        )


def exports(folder: Path, world: World) -> Iterator[Case]:
    """Runs that are exported. A good one gets as far as the process that checks what was written,
    which no hostile one may.
    """
    sizes = {"vocab_size": 320, "num_layers": 1, "hidden_size": 32, "num_heads": 2}
    config = RunConfig.model_validate({"model": sizes, "seq_len": 16, "batch_tokens": 32})
    run, out = folder / "run", folder / "outs" / "out"
    out.parent.mkdir()
    open_run(run, config, {})
    make_tokenizer(run)
    shapes = parameter_shapes(config.model.model_copy(update={"max_seq_len": 16}))
    ranges = [(name, 0, int(np.prod(shape))) for name, shape in shapes.items()]
    target = checkpoint.begin(run, 1)
    values = [np.zeros(sum(size for *_, size in ranges), np.float32)]
    checkpoint.commit(
        target,
        step=1,
        parameters=inventory(shapes),
        scalars={},
        state={"step": 1},
        files=[write_slices(target, 0, {"param": values}, {"param": ranges})],
    )
    with patch.object(sys, "executable", "/bin/false"):
        try:
            export(run, out)
        except ExportError as error:
            assert "the process that checks the export left with code 1" in str(error)
    good = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def load(name: str, raw: bytes, gone: str = "") -> None:
        (run / name).write_bytes(raw)
        (run / (gone or "nothing")).unlink(missing_ok=True)
        try:
            export(run, out)
        finally:
            (run / name).unlink()
            for path, content in good.items():
                path.write_bytes(content)

    for name in ("config.json", "tokenizer.json", "tokenizer.model"):
        for number, raw in enumerate(BOMBS):
            yield Case(
                f"export {name} {number}", lambda n=name, r=raw: load(n, r), (run, out.parent)
            )
    config_text = json.loads(good[run / "config.json"])
    for path in (("model", "vocab_size"), ("model", "num_layers"), ("model",), ("data", "path")):
        for value in (*NUMBERS, *NAMES[:3]):
            changed = json.loads(json.dumps(config_text))
            inner = changed["config"]
            for key in path[:-1]:
                inner = inner[key]
            if inner[path[-1]] == value or path == ("data", "path"):
                continue
            inner[path[-1]] = value
            raw = json.dumps(changed).encode()
            yield Case(f"export {path} {value!r}", lambda r=raw: load("config.json", r), (run,))


def _manifests(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(what is changed, a manifest that is not ours)."""
    for number, name in enumerate(NAMES):
        changed = json.loads(json.dumps(content))
        changed["files"][0]["name"] = name
        yield f"name {number}", changed
    for path in (
        ("bytes",),
        ("chunk_bytes",),
        ("chunks",),
        ("tensors", "param", "offset"),
        ("tensors",),
        ("tables",),
        ("tables", 0),
        ("tables", 0, 0),
        ("tables", 0, 1),
        ("tables", 0, 2),
    ):
        for value in (*NUMBERS, 2**45):
            changed = json.loads(json.dumps(content))
            inner = changed["files"][0]
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            yield f"{path} {value!r}", changed
    parameter = "norm.weight"
    for key in content["parameters"][parameter]:
        for value in (*NUMBERS, *([number] for number in NUMBERS), [2**45], [2**61] * 3):
            changed = json.loads(json.dumps(content))
            changed["parameters"][parameter][key] = value
            yield f"parameter {key} {value!r}", changed
    for key in ("step", "parameters", "scalars", "state", "files", "version"):
        for value in (*NUMBERS[3:], pickled().hex()):
            yield f"{key} {value!r}", {**content, key: value}
