"""Loads hostile files through every way in, with an audit hook that sees what they make us do.

`python -m tests.train.attack FOLDER` prints one JSON object: how many were loaded, and each event
that must not be: unpickling, a program, a connection, code or a secret of theirs. A hook cannot be
taken back, so this is a process of its own.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from data.durable import read_sealed, write_sealed
from data.foreign_tar import read_arrays
from data.instruct import read_examples
from data.manifest import read_manifest
from data.readers import cut_parts, find_files, read_extent
from data.stream import SampleStream
from tests.data.tiny import documents, write_dataset
from tests.train.checkpoints import inventory
from tests.train.folders import make_folder
from train import checkpoint, hf
from train.slices import write_slices

SLOW_SECONDS = 10
Case = tuple[str, Callable[[], Any]]
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
             "os.fork", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen")  # fmt: skip
NAMES = ("../secret", "../../secret", "/etc/hostname", "a/../../secret", "", ".", "..", "a\0b",
         "%2e%2e/secret", "secret ", "rank-00000.safetensors/../../secret", "~root/secret",
         "file:///etc/hostname", "pipe:touch ran", "https://127.0.0.1:9/x")  # fmt: skip
NUMBERS = (-1, 2**31, 2**63, 2**64, 10**30, 1.5, None, "7", [], {}, True)


def _too_slow(number: int, frame: Any) -> None:
    raise TimeoutError(f"not done in {SLOW_SECONDS} s")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def checkpoints(folder: Path) -> Iterator[Case]:
    """Manifests with a good seal and bad content."""
    good = folder / "run"
    target = checkpoint.begin(good, 1)
    entry = write_slices(target, 0, {"param": [np.zeros(64)]}, {"param": [("w", 0, 64)]})
    checkpoint.commit(
        target,
        step=1,
        parameters=inventory({"w": (8, 8)}),
        scalars={},
        state={"step": 1},
        files=[entry],
    )
    content = read_sealed(target / "manifest.json")
    content.pop("sha256", None)

    def load(changed: Any) -> None:
        write_sealed(target / "manifest.json", changed)
        saved = checkpoint.open_checkpoint(good)
        saved.verify()
        saved.read("w")

    for number, name in enumerate(NAMES):
        changed = json.loads(json.dumps(content))
        changed["files"][0]["name"] = name
        yield f"checkpoint name {number}", lambda changed=changed: load(changed)
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
        for value in NUMBERS:
            changed = json.loads(json.dumps(content))
            inner = changed["files"][0]
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            yield f"checkpoint {path} {value!r}", lambda changed=changed: load(changed)
    for key in content["parameters"]["w"]:
        for value in (*NUMBERS, *([number] for number in NUMBERS), [2**61] * 3):
            changed = json.loads(json.dumps(content))
            changed["parameters"]["w"][key] = value
            yield f"checkpoint parameter {key} {value!r}", lambda changed=changed: load(changed)
    for key in ("step", "parameters", "scalars", "state", "files", "version"):
        for value in NUMBERS[3:]:
            changed = {**content, key: value}
            yield f"checkpoint {key} {value!r}", lambda changed=changed: load(changed)


def datasets(folder: Path) -> Iterator[Case]:
    """Manifests of datasets with a good seal and bad content, and shards that hold objects."""
    dataset = folder / "dataset"
    write_dataset(dataset, {"train/main": documents(40)})
    content = read_sealed(dataset / "manifest.json")
    content.pop("sha256", None)

    def load(changed: Any) -> None:
        write_sealed(dataset / "manifest.json", changed)
        read_manifest(dataset)
        SampleStream(dataset, seq_len=16, seed=0).tokens(0)

    for key in sorted(content):
        for value in (*NUMBERS, *NAMES[:4]):
            changed = {**content, key: value}
            yield f"dataset {key} {value!r}", lambda changed=changed: load(changed)


def tars(folder: Path) -> Iterator[Case]:
    """Members that point elsewhere, are no files, or hold pickles."""
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    objects = io.BytesIO()
    np.save(objects, np.array([Evil()], dtype=object), allow_pickle=True)
    payloads = (objects.getvalue(), pickle.dumps(Evil()), b"\x93NUMPY\x01\x00\xff\xff", b"")
    number = 0
    for name in (*(f"{n}.npy" for n in NAMES[:8]), "a.pickle", "a.pyd", "a.npy"):
        for kind in (tarfile.REGTYPE, *kinds):
            for payload in payloads if kind == tarfile.REGTYPE else (b"",):
                path = folder / f"{number}.tar"
                number += 1
                with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
                    member = tarfile.TarInfo(name.replace("\0", "0"))
                    member.type, member.linkname = kind, "../secret"
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))

                def load(path: Path = path) -> None:
                    list(read_arrays(path, dtype=None, ignored=Counter()))

                def read(path: Path = path) -> None:
                    for extent in chain(*cut_parts(find_files([str(path)]), 2**20)):
                        list(read_extent(extent))

                yield f"tar {name} {kind!r}", load
                yield f"tar text {name} {kind!r}", read


def folders(folder: Path) -> Iterator[Case]:
    """Hugging Face folders that bring code, promise other sizes, or point elsewhere."""
    good = make_folder(folder / "hf")
    (good / "evil.py").write_text("open('ran', 'w')\nC = M = object\n", encoding="utf-8")
    config = json.loads((good / "config.json").read_text())
    weights = (good / "model.safetensors").read_bytes()
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.M"}
    changes: list[dict[str, Any]] = [
        {"auto_map": code},
        {"auto_map": code, "model_type": "evil"},
        {"auto_map": code, "architectures": ["Evil"]},
        {"_name_or_path": "../secret"},
        {"quantization_config": {"quant_method": "evil"}},
        {"torch_dtype": "evil"},
        {"model_type": "../secret"},
    ]
    changes += [{"vocab_size": value} for value in NUMBERS if value is not True]
    changes += [{"n_layer": value} for value in (-1, "7", None, [])]

    def load(change: dict[str, Any]) -> None:
        (good / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
        hf.load_causal(good)

    for change in changes:
        yield f"hf {change}", lambda change=change: load(change)

    def indexed(name: str) -> None:
        (good / "config.json").write_text(json.dumps(config), encoding="utf-8")
        index = {"metadata": {}, "weight_map": {"transformer.wte.weight": name}}
        (good / "model.safetensors").unlink(missing_ok=True)
        (good / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        try:
            hf.load_causal(good)
        finally:
            (good / "model.safetensors.index.json").unlink()

    for name in NAMES:
        yield f"hf index {name!r}", lambda name=name: indexed(name)

    def headed(raw: bytes) -> None:
        (good / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (good / "model.safetensors").write_bytes(raw)
        hf.load_causal(good)

    for size in (0, 1, 2**20, 2**40, 2**63, 2**64 - 1):
        raw = size.to_bytes(8, "little") + weights[8:]
        yield f"hf header of {size} bytes", lambda raw=raw: headed(raw)
    yield "hf pickle", lambda: headed(pickle.dumps(Evil()))


def lines(folder: Path) -> Iterator[Case]:
    """JSON lines that are deep, long, or no text."""
    bombs = [b"[" * 100_000, b'{"a":' * 50_000, b'{"text": ' + b"9" * 100_000 + b"}",
             b'{"text": "\\ud800"}', b'{"text": NaN}', b'{"text": 1e999}', b"\xff\xfe{}",
             b'{"text": "a", "text": {"b": 1}}', b'{"text": "\\u0000"}', b'"', b"null",
             pickle.dumps(Evil())]  # fmt: skip
    for number, bomb in enumerate(bombs):
        path = folder / f"{number}.jsonl"
        path.write_bytes(b'{"text": "good", "label": "x"}\n' + bomb + b"\n")

        def load(path: Path = path) -> None:
            read_examples(path, {"text": "text", "label": "label"})

        def read(path: Path = path) -> None:
            for extent in chain(*cut_parts(find_files([str(path)]), 2**20)):
                list(read_extent(extent))

        yield f"examples {number}", load
        yield f"documents {number}", read


def main(folder: Path) -> None:
    """Load everything once, with the hook in place after what is good was loaded."""
    folder.mkdir()
    os.chdir(folder)
    secret = folder / "secret"
    secret.write_text("secret", encoding="utf-8")
    hf.load_causal(make_folder(folder / "warm"))
    made: list[Case] = []
    for make in (checkpoints, datasets, tars, folders, lines):
        inner = folder / make.__name__
        inner.mkdir()
        save_file({"w": np.zeros(1, np.float32)}, inner / "secret")
        made += make(inner)
    signal.signal(signal.SIGALRM, _too_slow)
    seen: list[str] = []
    armed = [False]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not armed[0]:
            return
        text = repr(args)
        is_theirs = event in ("exec", "import") and "evil" in text
        if event in FORBIDDEN or is_theirs or (event == "open" and "secret" in str(args[0])):
            seen.append(f"{event} {text[:200]}")

    sys.addaudithook(hook)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, Any] = {"violations": [], "unexpected": [], "slow": [], "passed": []}
    for name, load in made:
        begun, outcome = time.monotonic(), ""
        print(name, file=sys.stderr, flush=True)
        signal.alarm(SLOW_SECONDS)
        armed[0] = True
        try:
            load()
            found["passed"].append(name)
        except Exception as error:
            if getattr(error, "exit_code", None) is None:
                outcome = f"{type(error).__name__}: {error}"
        armed[0] = False
        signal.alarm(0)
        if outcome:
            found["unexpected"].append(f"{name}: {outcome[:300]}")
        if time.monotonic() - begun > SLOW_SECONDS - 1:
            found["slow"].append(name)
        found["violations"] += [f"{name}: {event}" for event in seen]
        seen.clear()
    found["count"] = len(made)
    found["ran"] = [str(path) for path in folder.rglob("ran")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["memory_mib"] = (peak - memory) / 1024
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
