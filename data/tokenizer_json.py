"""Tokenizer files for Hugging Face: tokenizer.json, the names of special tokens, our twin of one.

The twin of a sentencepiece BPE model yields the same ids. Its vocabulary is every piece with its
id; sentencepiece merges the pair whose result has the best score, so the merges are, for each piece
in order of score, every split into two pieces. Unigram models and models with a normaliser of their
own have no such twin and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.config import DataError, DataUsageError
from data.durable import write_durably
from data.piece_model import (
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PieceModel,
    read_piece_model,
)

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_COMMON_NAMES = {
    "eos_token": "</s> <|endoftext|> <|end_of_text|> <eos> <|im_end|> [SEP]",
    "bos_token": "<s> <|begin_of_text|> <bos> <|startoftext|> [CLS]",
    "unk_token": "<unk> [UNK]",
    "pad_token": "<pad> [PAD] <|pad|>",
}


def copy_tokenizer(source: Path, folder: Path) -> Path:
    """Put the tokenizer `source` into a folder under its usual name; returns the copy.

    The special tokens of a tokenizer.json go with it, in a tokenizer_config.json.
    """
    if source.suffix == ".json":
        names = special_token_names(source)
        write_durably(folder / CONFIG_FILE, _json({"split_special_tokens": True, **names}))
    copy = folder / (JSON_FILE if source.suffix == ".json" else MODEL_FILE)
    write_durably(copy, source.read_bytes())
    return copy


def write_huggingface_tokenizer(source: Path, folder: Path, *, bos: bool = False) -> None:
    """Make `source`, a tokenizer.model or tokenizer.json, the tokenizer of a Hugging Face folder.

    Writes tokenizer.json, tokenizer_config.json and, where `source` is one, tokenizer.model. The
    ids are those of `source`, behind the begin-of-sequence id when `bos` is true and with nothing
    added otherwise. Raises DataUsageError for a model that has no tokenizer.json of equal ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".json":
        content, names = _read_json(source), special_token_names(source)
    else:
        model = read_piece_model(source.read_bytes())
        check_has_twin(model, str(source))
        content, names = _twin(model), _names_of(model)
        write_durably(folder / MODEL_FILE, source.read_bytes())
    post_processor = _bos_template(content, names, source) if bos else None
    content.update(truncation=None, padding=None, post_processor=post_processor)
    if "dropout" in content["model"]:
        content["model"]["dropout"] = None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # Without it text that looks like a special token would become one.
        "split_special_tokens": True,
        **names,
    }
    write_durably(folder / JSON_FILE, _json(content))
    write_durably(folder / CONFIG_FILE, _json(config))


def special_token_names(path: Path) -> dict[str, str]:
    """{"eos_token": "</s>", ...} of a tokenizer.json: as named beside it, else by common names."""
    found = {key: token for key, (token, _) in _named_beside(path).items()}
    if "eos_token" in found:
        return found
    added = _read_json(path).get("added_tokens") or []
    known = {token["content"] for token in added if token.get("special")}
    for key, names in _COMMON_NAMES.items():
        matches = [name for name in names.split() if name in known]
        if matches:
            found.setdefault(key, matches[0])
    return found


def check_eos_is_known(path: Path, vocabulary: Mapping[str, int]) -> None:
    """DataUsageError when a file beside a tokenizer.json names an end-of-sequence token that its
    vocabulary does not hold.
    """
    token, beside = _named_beside(path).get("eos_token", ("", path))
    if not token or token in vocabulary:
        return
    known = [name for name in _COMMON_NAMES["eos_token"].split() if name in vocabulary]
    example = f', perhaps "eos_token": {json.dumps(known[0])}' if known else ""
    raise DataUsageError(
        f"{beside}: eos_token is {token!r}, which is none of the {len(vocabulary)} tokens of "
        f"{path}, so no document could end with it; write the one that the tokenizer has{example}, "
        f"or fetch both files again from one place, or add {token!r} to its added_tokens with an "
        'id of its own and "special": true'
    )


def _named_beside(path: Path) -> dict[str, tuple[str, Path]]:
    """Special tokens as the files beside a tokenizer.json name them, with the file that does."""
    found: dict[str, tuple[str, Path]] = {}
    for name in (CONFIG_FILE, "special_tokens_map.json"):
        beside = path.with_name(name)
        if beside.is_file():
            for key, value in _read_json(beside).items():
                token = value.get("content") if isinstance(value, dict) else value
                if key in _COMMON_NAMES and isinstance(token, str):
                    found.setdefault(key, (token, beside))
    return found


def export_problem(file: Path) -> str:
    """Why no model that was trained with this tokenizer can be exported; empty when it can."""
    try:
        if file.suffix != ".json":
            check_has_twin(read_piece_model(file.read_bytes()), str(file))
    except ValueError as error:
        return f"models trained with it cannot be exported: {error}"
    return ""


def check_has_twin(model: PieceModel, name: str) -> None:
    """Raise DataUsageError when no tokenizer.json can yield the ids of this model."""
    why = ""
    if model.model_type != "bpe":
        why = f"it is a {model.model_type} model, whose ties tokenizer.json breaks differently"
    elif model.rewrites_text:
        why = "it rewrites text before cutting it (normalisation or removal of spaces)"
    elif not model.escapes_whitespace or model.space_is_suffix:
        why = "it treats spaces in an unusual way"
    elif any(type_ == UNUSED for _, _, type_ in model.pieces):
        why = "it has unused pieces"
    if why:
        raise DataUsageError(
            f"{name} cannot be exported as a Hugging Face tokenizer with the same ids: {why}; "
            "give its tokenizer.json instead, or train one here with --vocab-size and without "
            "--tokenizer-type unigram, before a model is trained with it"
        )


def _twin(model: PieceModel) -> dict[str, Any]:
    """The content of a tokenizer.json that adds no special ids of its own."""
    vocab = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    added = [
        {
            "id": vocab[piece],
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": type_ != USER_DEFINED,
        }
        for piece, _, type_ in model.pieces
        if type_ in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.adds_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": (
            {"type": "Sequence", "normalizers": [prepend, replace]}
            if model.adds_prefix
            else replace
        ),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.special["unk"]][0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.has_byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(model),
        },
    }


def _names_of(model: PieceModel) -> dict[str, str]:
    """The special pieces by the names that a tokenizer_config.json gives them."""
    return {f"{name}_token": model.pieces[id_][0] for name, id_ in model.special.items()}


def _bos_template(content: dict[str, Any], names: dict[str, str], source: Path) -> dict[str, Any]:
    """The post_processor that puts the begin-of-sequence token in front of every text."""
    piece = names.get("bos_token")
    index = next((t["id"] for t in content["added_tokens"] if t["content"] == piece), None)
    if piece is None or index is None:
        raise DataUsageError(f"{source} has no begin-of-sequence token to put in front of texts")
    first, second = ({"SpecialToken": {"id": piece, "type_id": type_}} for type_ in (0, 1))
    text, pair = (
        {"Sequence": {"id": id_, "type_id": type_}} for id_, type_ in (("A", 0), ("B", 1))
    )
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second, pair],
        "special_tokens": {piece: {"id": piece, "ids": [index], "tokens": [piece]}},
    }


def _merges(model: PieceModel) -> list[list[str]]:
    normal = [(piece, score) for piece, score, type_ in model.pieces if type_ == NORMAL]
    known = {piece for piece, _ in normal}
    return [
        [piece[:cut], piece[cut:]]
        for piece, _ in sorted(normal, key=lambda pair: -pair[1])
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; fetch or write it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__} where an object is expected")
    return content


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
