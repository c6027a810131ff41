"""What a preparation and a run's [data] table may say.

Nothing here imports more than pydantic, so that commands on a login node answer at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from data.errors import AccessError as AccessError
from data.errors import DataError as DataError
from data.errors import DataUsageError as DataUsageError
from data.errors import MissingError as MissingError
from data.errors import missing_extra as missing_extra

COMMAND = "pipe:"
"""What the name of a dataset or input begins with that is a command of the person who runs it."""

BadText = Literal["strict", "replace", "skip"]
DatatroveRule = Literal["gopher-repetition", "gopher-quality", "c4", "fineweb-quality"]
Boundaries = Literal["ignore", "labels", "attention"]
Packing = Literal["concat", "best_fit"]
OnDamage = Literal["fail", "quarantine"]


class CleanConfig(BaseModel):
    """What is done to documents before anything else; without it they are stored as they came."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    normalize: bool = False
    """Unicode NFC, without NUL and without U+FEFF at the start."""
    filter: bool = False
    """Drop what the published rules of Gopher and C4 (English prose) drop: data/quality.py."""
    language: tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], ...] = ()
    """Keep documents of these languages (ISO 639) alone, where any is named: data/language.py."""
    language_min: Annotated[float, Field(ge=0, le=1)] = 0.65
    """How sure of its language a document must be, in [0, 1], where languages are named."""
    filter_datatrove: tuple[DatatroveRule, ...] = ()
    """Rules of datatrove, in this order; c4 also takes lines out: data/trove.py."""
    mask_pii: bool = False
    """Put placeholders for e-mail and IP addresses, phone and card numbers: data/privacy.py."""
    dedup: Literal["off", "exact", "near"] = "off"
    """Keep the first of equal documents, or of documents that share most of their wording."""

    @property
    def changes_text(self) -> bool:
        """Whether the text that is stored can differ from the text that was read."""
        return self.normalize or self.mask_pii or "c4" in self.filter_datatrove

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        for names in (self.language, self.filter_datatrove):
            if len(set(names)) < len(names):
                raise ValueError(f"{', '.join(names)}: one of them is named twice; name it once")
        if (
            not self.language
            and self.language_min != type(self).model_fields["language_min"].default
        ):
            raise ValueError("--language-min needs --language: which ones to be sure of")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As it was recorded before there were languages and rules of datatrove."""
        values: dict[str, Any] = serialize(self)
        if not self.language:
            del values["language"], values["language_min"]
        if not self.filter_datatrove:
            del values["filter_datatrove"]
        return values


SPECIAL_PIECES = ("<unk>", "<s>", "</s>", "<pad>")
"""Of a tokenizer that is trained here, by id; no text may encode to them."""


class PrepareConfig(BaseModel):
    """How text becomes token shards. Every field changes what is written; workers never do."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    vocab_size: Annotated[int, Field(ge=1)] = 8192
    """Pieces of the tokenizer that is trained here; unused with a tokenizer of your own."""
    tokenizer_type: Literal["bpe", "unigram"] = "bpe"
    """Algorithm of the tokenizer that is trained here. A unigram model encodes 4 times faster, but
    has no exact twin as tokenizer.json, so models trained with it cannot be exported."""
    user_symbols: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that are always one piece of their own, wherever they stand in a text."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the text held out for validation; 0 holds nothing out."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """Key of a record that holds its text; dots go into nested objects: `a.b.text`."""
    id_field: str = ""
    """Key of a record that holds its id, with dots as above; the id is kept beside the tokens, and
    so is the address of a page, or else the name of the file and the place in it. Empty keeps none.
    """
    on_bad_text: BadText = "strict"
    """Text that is not UTF-8: stop, put U+FFFD in (for NUL and half surrogate pairs too), or skip
    the document or line that holds any; what was replaced or skipped is counted."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of files and folders of the input that are left out: data/selection.py."""
    max_bad_lines: Annotated[int, Field(ge=0)] = 0
    """JSON lines that may be skipped: broken, without the text field, or not Unicode text."""
    bos: bool = False
    """Store a begin-of-sequence id in front of every document."""
    tokenizer_bytes: Annotated[int, Field(ge=1)] = 2**25
    """Text to train the tokenizer on, in bytes; more text than that is sampled by hash."""
    shard_bytes: Annotated[int, Field(ge=1)] = 2**30
    """Text per shard in bytes; the shard itself is smaller (English: about half)."""
    part_bytes: Annotated[int, Field(ge=1)] = 2**21
    """Input that one worker takes at a time, in bytes; a shard holds whole parts."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Chooses which text is held out, and the order of a shuffle."""
    shuffle: bool = False
    """Store documents in a random order over the whole input instead of the input's."""
    clean: CleanConfig = CleanConfig()
    """Recorded only where something is cleaned, so what was recorded before stays as it is."""

    def settings(self) -> dict[str, Any]:
        """Every setting by its name, those of cleaning beside the others."""
        return {**{k: v for k, v in self if k != "clean"}, **dict(self.clean)}

    @model_validator(mode="after")
    def _no_special_piece(self) -> Self:
        for symbol in self.user_symbols:
            if symbol in SPECIAL_PIECES:
                raise ValueError(
                    f"--symbol {symbol!r} is a special token of every tokenizer that is trained "
                    "here, and no text may encode to one; choose another string"
                )
        return self

    @model_validator(mode="after")
    def _excludes_by_name(self) -> Self:
        for pattern in self.exclude:
            if not pattern.strip("/. "):
                raise ValueError(
                    f"--exclude {pattern!r} names no file; write a pattern of names, such as "
                    "'*.png', node_modules or 'docs/*.html'"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        if self.clean == CleanConfig():
            values.pop("clean", None)
        if self.on_bad_text == "strict":
            values.pop("on_bad_text", None)
        if not self.id_field:
            values.pop("id_field", None)
        if not self.exclude:
            values.pop("exclude", None)
        if not self.shuffle:
            values.pop("shuffle", None)
        return values


class DataSource(BaseModel):
    """One [[data.sources]] entry of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Annotated[str, Field(pattern=r"^[^/.\x00][^/\x00]*$")]
    """What the source is called; it is part of the keys of the sample order, so it must stay."""
    path: Annotated[str, Field(min_length=1)]
    """Dataset written by `headrace prepare`: a directory, a URL, or pipe:COMMAND."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Share of the samples, on any positive scale."""


class DataConfig(BaseModel):
    """The [data] table of a pretraining recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: str = ""
    """Dataset written by `headrace prepare`: a directory, a URL (s3, gs, http, https, hf), or
    "pipe:COMMAND {path}" for a program that writes a file of it; the short form for one dataset."""
    sources: tuple[DataSource, ...] = ()
    """Several datasets of one tokenizer, mixed by weight, instead of `path`."""
    max_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Epochs of any source that the whole run may need; more is refused at the start, 0 allows it.
    """
    boundaries: Boundaries = "ignore"
    """What the ends of documents mean inside a sample. labels: the first token of a document is no
    target; attention: that, and tokens and positions know only their own document. Nothing is then
    learned of how a text begins, unless it begins with BOS: prepare with --bos."""
    packing: Packing = "concat"
    """How documents fill samples. concat: one run of tokens after another, cut wherever a sample
    ends; best_fit: only documents that are longer than a sample are cut, by the plan of `headrace
    data pack`, what stays empty is padding, and the first token of a document is no target."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank; 0 reads in the training process."""

    on_damage: OnDamage = "fail"
    """What a sample is that touches a damaged chunk. quarantine: it trains nothing and is counted
    in metrics.jsonl. What is missing, or cannot be read for another reason, stops the run all the
    same."""
    cache_dir: str = ""
    """Folder for what comes from elsewhere, shared by the ranks and jobs of a node, on its own
    disk; empty takes headrace in the user's cache directory."""
    cache_bytes: Annotated[int, Field(ge=2**20)] = 2**36
    """Bytes that the cache folder may hold; what was used longest ago makes room."""
    stage: bool = False
    """Copy what is read of a directory into the cache, so that a shared file system is asked for
    every byte once per node."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Every dataset that is named."""
        return tuple(source.path for source in self.sources) or (self.path,) * bool(self.path)

    @model_validator(mode="after")
    def _without_secrets(self) -> Self:
        for path in self.paths:
            check_public(path)
        return self

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if self.path and self.sources:
            raise ValueError(
                f"path={self.path} and {len(self.sources)} sources are both given; list the "
                "dataset as one of [[data.sources]], or leave the sources out"
            )
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}; give each a name of its own")
        return self


def check_public(location: str, noun: str = "dataset") -> None:
    """DataUsageError for a URL that holds a secret: names of places are written down."""
    scheme, mark, rest = location.partition("://")
    if not mark or location.startswith(COMMAND):
        return
    host = rest.partition("/")[0]
    if "@" in host or "?" in rest or "#" in rest:
        shown = host.rpartition("@")[2].partition("?")[0].partition("#")[0]
        raise DataUsageError(
            f"the {noun} at {scheme}://{shown}/... is named with a password, a query or a "
            "fragment, but its name is kept in the run directory; name it without, and put "
            "credentials where the library for it looks (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, "
            "HF_TOKEN, ~/.netrc for http)"
        )


def accumulation(batch_samples: int, num_ranks: int, micro_batch: int) -> int:
    """Micro-batches per rank and step: as many as the batch needs, the last ones part dummies."""
    return -(-batch_samples // (num_ranks * micro_batch))
