"""What a Hugging Face folder would have transformers follow: refused before it is asked.

Every file that is read lies in the folder itself, weights are safetensors, and no code is named.
transformers looks after remote code alone: it opens whatever an index lists (any path, and a pickle
where the name is no safetensors), other configs and tokenizer files that these name, adapters, and
kernels of the hub. Costs a walk over the folder and a few small files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.folder_tokenizer import ModelFolderError

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FILE_KEYS = ("_file", "_files", "_path", "_dir", "_option")
"""Ends of keys that are options of tokenizer libraries and may name a file."""


def check_folder(folder: Path) -> None:
    """ModelFolderError when something of the folder leads elsewhere, or to code."""
    refuse_links(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelFolderError(
            f"{folder / 'adapter_config.json'} makes this an adapter, which may belong to any "
            "model; merge it into its model (peft's merge_and_unload) and write that with "
            "save_pretrained"
        )
    _check_config(folder)
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        _check_tokenizer_config(folder / name)


def refuse_links(folder: Path) -> None:
    """ModelFolderError for a link out of a folder: who loads or copies what is behind it reads and
    hands on a file that is none of the folder's.
    """
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        # The hub's own cache: snapshots/COMMIT/NAME is a link to blobs/HASH.
        homes.append(home.parent.parent / "blobs")
    for root, folders, names in os.walk(home):
        for path in (Path(root, name) for name in (*folders, *names)):
            if not path.is_symlink():
                continue
            # Without links in it, as far as there is something.
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(one) for one in homes):
                raise ModelFolderError(
                    f"{folder / path.relative_to(home)} is a link to {target}, outside of the "
                    f"folder; copy the folder with what it links to, if you trust it: "
                    f"`cp -rL {folder} COPY`"
                )


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from; ModelFolderError unless they are
    safetensors of the folder itself.
    """
    if parts := sorted(folder.glob("shard-*.safetensors")):
        raise ModelFolderError(
            f"{parts[0]} is of a model that was written in parts by many processes; load it where "
            "it was written and write it again with save_pretrained"
        )
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelFolderError(_no_weights(folder))
    found = _read(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ModelFolderError(f"{folder / INDEX} has no weight_map; copy the folder again")
    paths = []
    for name in sorted(set(map(str, found.values()))):
        # A path of its own, "." or ".." is no name of a safetensors file.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFolderError(
                f"{folder / INDEX} leads to {name!r}, which is no safetensors file of this folder; "
                "nothing else is loaded: write the model again with save_pretrained"
            )
        if not (folder / name).is_file():
            raise ModelFolderError(
                f"{folder / name} is missing, which {INDEX} lists; copy the folder again"
            )
        paths.append(folder / name)
    return paths


def no_files(folder: Path) -> dict[str, None]:
    """Options for a tokenizer of the folder, by which it takes no file that its config names."""
    path = folder / TOKENIZER_CONFIG
    found = _read(path) if path.is_file() else {}
    return dict.fromkeys(key for key in found if key.endswith("_file"))


def _no_weights(folder: Path) -> str:
    others = sorted(
        file.name for suffix in ("bin", "pt", "pth") for file in folder.glob(f"*.{suffix}")
    )
    return (
        f"{folder} holds no {WEIGHTS} and no {INDEX}"
        + (f", only {', '.join(others)}, which can run code when loaded" if others else "")
        + "; load it where you trust it and write it again with save_pretrained"
    )


def _check_config(folder: Path) -> None:
    path = folder / CONFIG
    found = _read(path)
    for key in ("configuration_files", "transformers_weights"):
        if found.get(key) is not None:
            raise ModelFolderError(
                f"{path} names other files with {key!r}; rename what it names to {CONFIG} and "
                f"{WEIGHTS}, and remove that key"
            )
    for keys, value in _leaves(found):
        is_code = any("implementation" in key for key in keys) and "/" in str(value)
        if is_code:
            raise ModelFolderError(
                f"{path}: {'.'.join(keys)} = {value!r} names a kernel of the hub, which is code "
                "(code of a folder is never run); remove that key"
            )


def _check_tokenizer_config(path: Path) -> None:
    if not path.is_file():
        return
    found = _read(path)
    bad = [key for key in ("vocab", "merges") if isinstance(found.get(key), str)]
    bad += ["init_inputs"] * bool(found.get("init_inputs"))
    names = found.get("fast_tokenizer_files") or []
    if not isinstance(names, list) or any(Path(str(name)).name != name for name in names):
        bad.append("fast_tokenizer_files")
    # Those of the outermost table are taken back by `no_files`; many a real folder has some.
    own = path.name != TOKENIZER_CONFIG
    bad += [
        ".".join(keys)
        for keys, value in _leaves(found)
        if (own or len(keys) > 1) and keys[-1].endswith(_FILE_KEYS) and value is not None
    ]
    if bad:
        raise ModelFolderError(
            f"{path}: {bad[0]!r} may name a file anywhere; a tokenizer is what lies in its own "
            "folder: remove that key, or write the tokenizer again with save_pretrained"
        )


def _leaves(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is neither a table nor a list, with the keys that lead to it."""
    rest: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while rest:
        keys, value = rest.pop()
        if isinstance(value, dict):
            rest += [((*keys, str(key)), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            rest += [(keys, inner) for inner in value]
        else:
            yield keys, value


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} cannot be read: {error}; copy the folder again") from None
    if not isinstance(found, dict):
        raise ModelFolderError(f"{path} holds no JSON object; copy the folder again")
    return found
