"""Hugging Face folders in and out: the only module that imports transformers.

Nothing that is read here can run code or lies outside of the folder: remote code is off, the hub is
never asked, and train/folder_files.py has looked before transformers does. A folder that lacks
weights of its model is refused, because transformers would start them at random without failing.
Importing this module costs seconds; import it where it is used.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# transformers reads it once, when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from train.folder_files import check_folder, no_files, refuse_links, weight_files
from train.folder_tokenizer import FolderTokenizer as FolderTokenizer
from train.folder_tokenizer import ModelFolderError as ModelFolderError
from train.folder_tokenizer import NoModelFolder as NoModelFolder

log = logging.getLogger(__name__)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
)
"""Files of a folder that together are its tokenizer; fine-tuning hands them on unchanged."""

_LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    # A library that a folder needs and nobody has installed.
    ImportError,
    SafetensorError,
    StrictDataclassError,
)
_NO_CODE = {"trust_remote_code": False}
_SAFE = {"local_files_only": True, **_NO_CODE}
SPARE_VALUES = 2**24
"""Values that a model may have beside those of its files: a head, tables of positions, masks."""


def load_tokenizer(folder: str | Path) -> FolderTokenizer:
    """The folder's tokenizer; ModelFolderError when it has none that can be loaded."""
    folder = _existing(Path(folder))
    num_embeddings: int = _config(folder).get_text_config().vocab_size
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_SAFE, **no_files(folder))
        return FolderTokenizer(tokenizer, folder, num_embeddings=num_embeddings)
    except ModelFolderError:
        raise
    # The library tokenizers raises Exception itself.
    except Exception as error:
        raise ModelFolderError(
            f"{folder}: its tokenizer cannot be loaded: {_first_line(error)}; "
            "the folder needs a tokenizer.json beside config.json"
        ) from None


def load_causal(folder: str | Path, *, dtype: torch.dtype | None = torch.float32) -> Any:
    """The folder's language model on the CPU, in evaluation mode; dtype None: as it is stored."""
    folder = Path(folder)
    if labels_of(folder) is not None:
        raise ModelFolderError(
            f"{folder} is a classifier and predicts no text; use it with "
            f"`headrace evaluate {folder} --data FILE.csv`, or name a language model's folder"
        )
    model, report = _load(transformers.AutoModelForCausalLM, folder, dtype=dtype)
    _refuse_missing(folder, report["missing_keys"])
    return model


def load_classifier(
    folder: str | Path,
    labels: Sequence[str] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = torch.float32,
) -> Any:
    """The folder's classifier, or a new head with these labels on a language model's folder.

    The head of a new classifier is random, drawn from `seed`.
    """
    folder = Path(folder)
    own = labels_of(folder)
    # transformers finds the last token of a text by looking for this id.
    options: dict[str, Any] = {"pad_token_id": load_tokenizer(folder).fill_id}
    if own is not None and labels is not None and list(labels) != own:
        raise ModelFolderError(
            f"{folder} is a classifier for {own}, not for {list(labels)}; "
            "start from the language model that it was made from"
        )
    if own is None:
        if labels is None:
            raise ModelFolderError(
                f"{folder} is a language model without labels; train a classifier from it with "
                f"`headrace finetune classify model={folder} data=FILE.csv`"
            )
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = transformers.AutoModelForSequenceClassification
        model, report = _load(auto, folder, dtype=dtype, **options)
    # A language model's folder has no head, and often no pooler in front of it.
    inner = f"{model.base_model_prefix}."
    new = {name for name in report["missing_keys"] if own is None and "pooler" in name}
    new |= {name for name in report["missing_keys"] if own is None and not name.startswith(inner)}
    _refuse_missing(folder, report["missing_keys"] - new)
    if new:
        log.debug("new at random in the classifier: %s", ", ".join(sorted(new)))
    return model


def labels_of(folder: str | Path) -> list[str] | None:
    """Label names of a sequence classifier in the order of its logits; None for any other model."""
    config = _config(_existing(Path(folder)))
    if not any("SequenceClassification" in name for name in config.architectures or ()):
        return None
    return [str(config.id2label[index]) for index in range(len(config.id2label))]


def context_length(folder: str | Path) -> int | None:
    """Most tokens that the model can read at once; None when its config sets no limit."""
    config = _config(_existing(Path(folder))).get_text_config()
    found: int | None = getattr(config, "max_position_embeddings", None)
    return found


def num_parameters(folder: str | Path) -> int:
    """Values in the safetensors that the folder's weights are read from, by their headers alone."""
    total = 0
    for path in weight_files(_existing(Path(folder))):
        try:
            with safe_open(path, "pt") as file:
                total += sum(
                    math.prod(file.get_slice(key).get_shape()) for key in sorted(file.keys())
                )
        except _LOAD_ERRORS as error:
            raise ModelFolderError(f"{path} cannot be read: {_first_line(error)}") from None
    return total


def save_folder(
    model: Any, out: Path, *, tokenizer_from: Path, tokenizer_config: dict[str, Any] | None = None
) -> None:
    """Write a Hugging Face folder: config, safetensors in the model's dtype, and a tokenizer.

    The tokenizer files are those of `tokenizer_from` to the byte, except that `tokenizer_config`
    is laid over tokenizer_config.json.
    """
    refuse_links(tokenizer_from)
    model.save_pretrained(out, max_shard_size="5GB")
    for pattern in TOKENIZER_FILES:
        for file in sorted(tokenizer_from.glob(pattern)):
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copyfile(file, out / file.name)
    if tokenizer_config:
        path = out / "tokenizer_config.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, **tokenizer_config}, indent=2) + "\n")


def _load(auto: Any, folder: Path, *, dtype: torch.dtype | None, **options: Any) -> tuple[Any, Any]:
    weight_files(_existing(folder))
    _refuse_larger(auto, folder)
    try:
        return auto.from_pretrained(  # type: ignore[no-any-return]
            folder,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            output_loading_info=True,
            **_SAFE,
            **options,
        )
    except _LOAD_ERRORS as error:
        raise ModelFolderError(f"{folder} cannot be loaded: {_first_line(error)}") from None


def _config(folder: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, **_SAFE)
    except _LOAD_ERRORS as error:
        raise ModelFolderError(
            f"{folder / 'config.json'} names no model that transformers "
            f"{transformers.__version__} has itself (code inside a folder is never run): "
            f"{_first_line(error)}"
        ) from None


def _existing(folder: Path) -> Path:
    if (folder / "attempts.jsonl").is_file():
        hint = f"`headrace export {folder} OUT` makes one: name OUT"
        if (folder / "hf" / "config.json").is_file():
            hint = f"its own is {folder / 'hf'}: name that"
        raise NoModelFolder(f"{folder} is a run directory and no Hugging Face folder; {hint}")
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no directory"
        raise NoModelFolder(
            f"{folder} is no Hugging Face folder: it {what}; "
            "make one from a run with `headrace export RUN OUT`"
        )
    check_folder(folder)
    return folder


def _refuse_larger(auto: Any, folder: Path) -> None:
    """Before memory is asked for: what config.json describes must be about what the files hold."""
    config, stored = _config(folder), num_parameters(folder)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > stored:
        built = layers
    else:
        try:
            with torch.device("meta"):
                model = auto.from_config(config, **_NO_CODE)
        except _LOAD_ERRORS as error:
            raise ModelFolderError(f"{folder} cannot be loaded: {_first_line(error)}") from None
        built = sum(t.numel() for t in itertools.chain(model.parameters(), model.buffers()))
    if built > 2 * stored + SPARE_VALUES:
        raise ModelFolderError(
            f"{folder / 'config.json'} describes a model of at least {built:,} values, its "
            f"safetensors files hold {stored:,}: one of them is of another model"
        )


def _refuse_missing(folder: Path, missing: set[str]) -> None:
    if missing:
        raise ModelFolderError(
            f"{folder} lacks {len(missing)} weights of its model, such as {min(missing)}; "
            "transformers would start them at random: copy or export the folder again"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
