"""Texts to measure a language model on: the validation split of a dataset, or a file.

Every text is a document of its own. A dataset's ids are used as they are stored, so it must have
been prepared with the model's tokenizer; its bytes are those of the decoded text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data.config import DataError, DataUsageError
from data.instruct import read_examples
from data.manifest import MANIFEST, Manifest, read_manifest
from data.readers import LINE_SUFFIXES
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokens import TokenSource
from data.verify import check_tokenizer
from train import hf

NUM_COMPARED = 64
"""Documents that both tokenizers must cut alike when their files differ."""


@dataclass(frozen=True)
class Text:
    """A document without special ids."""

    ids: list[int]
    num_bytes: int
    """Of the text in UTF-8."""


def read_texts(
    data: str | Path, model: str | Path, tokenizer: hf.FolderTokenizer, *, text_column: str = "text"
) -> Iterator[Text]:
    """The texts of a dataset's validation split, of a .jsonl or .csv file, or one text file.

    DataError, or DataUsageError for a dataset that another tokenizer prepared.
    """
    data, model = Path(data), Path(model)
    if data.is_dir() or data.name == MANIFEST:
        yield from _dataset(data if data.is_dir() else data.parent, model, tokenizer)
        return
    if data.suffix.lower() in (*LINE_SUFFIXES, ".csv"):
        texts = [example.text for example in read_examples(data, {"--text-column": text_column})]
    else:
        texts = [_read_text(data)]
    for text in texts:
        yield Text(tokenizer.encode(text), len(text.encode()))


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise DataUsageError(f"{path} does not exist; name a dataset, a text file or a .jsonl file")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert the file first, "
            f"for example: iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}"
        ) from None
    if not text:
        raise DataError(f"{path} is empty; there is nothing to measure")
    return text


def _dataset(dataset: Path, model: Path, tokenizer: hf.FolderTokenizer) -> Iterator[Text]:
    manifest = read_manifest(dataset)
    if not manifest.source_names("val"):
        raise DataUsageError(
            f"{dataset} has no validation split; prepare it with `--val-fraction` above 0, or "
            "evaluate a text file"
        )
    check_tokenizer(dataset, manifest.tokenizer_sha256, manifest.special_ids)
    own = load_tokenizer(dataset)
    if not _same_file(manifest, model):
        for text in islice(_documents(dataset, manifest, own), NUM_COMPARED):
            if tokenizer.encode(own.decode(text.ids)) != text.ids:
                raise DataUsageError(_differs(dataset, manifest, model))
    yield from _documents(dataset, manifest, own)


def _documents(dataset: Path, manifest: Manifest, own: Tokenizer) -> Iterator[Text]:
    special = {own.eos_id, own.bos_id}
    for name in manifest.source_names("val"):
        source = TokenSource(dataset, manifest, "val", name)
        start = 0
        for document in source.documents(0, source.num_tokens):
            stop = start + document.num_tokens
            ids = [int(id) for id in source.read(start, stop) if int(id) not in special]
            start = stop
            if ids:
                yield Text(ids, len(own.decode(ids).encode()))


def _same_file(manifest: Manifest, model: Path) -> bool:
    file = model / manifest.tokenizer_file
    if not file.is_file():
        return False
    return hashlib.sha256(file.read_bytes()).hexdigest() == manifest.tokenizer_sha256


def _differs(dataset: Path, manifest: Manifest, model: Path) -> str:
    return (
        f"{dataset} was prepared with another tokenizer ({manifest.tokenizer_file}, sha256 "
        f"{manifest.tokenizer_sha256[:12]}) than the one in {model}; prepare the text for this "
        f"model with `headrace prepare --input PATH --output DATASET --tokenizer "
        f"{model / 'tokenizer.json'}`, or evaluate the text file itself: "
        f"`headrace evaluate {model} --data FILE.txt`"
    )
