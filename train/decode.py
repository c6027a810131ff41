"""From the text of a recipe and `key=value` overrides to a config, or to a refusal that helps.

An unknown key is refused with the one that was probably meant, a bad value with its key. No torch.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from train.config import ConfigError, FinetuneConfig, RunConfig

Config = TypeVar("Config", bound=BaseModel)

OTHER_NAMES = {
    "optim.lr": "learning_rate max_lr peak_lr",
    "optim.min_lr_ratio": "min_lr final_lr",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_epsilon adam_eps epsilon",
    "optim.weight_decay": "wd",
    "optim.clip_norm": "grad_clip max_grad_norm clip_grad gradient_clipping",
    "schedule.warmup_steps": "warmup num_warmup_steps warmup_iters",
    "steps": "max_steps num_steps max_iters train_iters total_steps",
    "epochs": "num_epochs num_train_epochs max_epochs",
    "batch_tokens": "batch_size global_batch_size total_batch_size",
    "batch_size": "batch_tokens global_batch_size train_batch_size",
    "micro_batch": "gradient_accumulation_steps micro_batch_size device_batch_size "
    "per_device_train_batch_size",
    "seq_len": "block_size context_length sequence_length max_length max_seq_length",
    "precision": "dtype torch_dtype mixed_precision bf16 fp16 fp32",
    "model.num_layers": "n_layer n_layers num_hidden_layers layers depth",
    "model.hidden_size": "n_embd d_model dim n_embed embedding_size width",
    "model.num_heads": "n_head n_heads num_attention_heads heads",
    "model.num_kv_heads": "n_kv_heads num_key_value_heads",
    "model.ffn_size": "intermediate_size ffn_hidden_size d_ff",
    "model.tie_embeddings": "tie_word_embeddings",
    "model.norm_eps": "rms_norm_eps layer_norm_eps",
    "model.init_std": "initializer_range",
    "model.activation_checkpointing": "gradient_checkpointing checkpoint_activations",
    "checkpoint.every": "save_steps save_every save_interval checkpoint_every",
    "checkpoint.keep": "save_total_limit",
    "zero.stage": "zero_stage",
    "data.path": "dataset dataset_path data_path train_data",
    "model.path": "model_name_or_path checkpoint",
    "log.wandb": "report_to",
}
"""Key of ours -> the last part of what the rest of the field calls it."""


def load_config(
    kind: type[Config], recipe: str, overrides: Sequence[str] = (), *, name: str = "recipe"
) -> Config:
    """The config of a TOML recipe (its text) with `key=value` overrides, dotted keys, applied in
    order.

    Raises ConfigError that names the key, and the key that was probably meant.
    """
    try:
        table = tomllib.loads(recipe)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}") from None
    for override in overrides:
        _apply(table, override, kind)
    return decode(kind, table, name=name)


def overridden(
    config: RunConfig | FinetuneConfig, overrides: Sequence[str]
) -> RunConfig | FinetuneConfig:
    """A config with `key=value` overrides; ConfigError as for `load_config`."""
    table = config.model_dump(mode="json")
    for override in overrides:
        _apply(table, override, type(config))
    if isinstance(config, RunConfig):
        return decode(RunConfig, table)
    return decode(FinetuneConfig, table)


def decode(kind: type[Config], table: Mapping[str, Any], *, name: str = "config") -> Config:
    """`table` as a `kind`; ConfigError lists every key that is unknown or has a bad value."""
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_explain(kind, item, name) for item in error.errors())
        ) from None


def flat_keys(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a nested mapping."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def known_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a config of this kind may carry."""
    for key, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from known_keys(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _apply(table: dict[str, Any], override: str, kind: type[BaseModel]) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(
            f"override {override!r} is not of the form key=value, such as optim.lr=3e-4"
        )
    if key in ("data", "model") and f"{key}.path" in known_keys(kind):
        key = f"{key}.path"
    *tables, leaf = key.strip().split(".")
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a table")
    table[leaf] = _value(text) if key.split(".")[-1] not in ("path", "val") else text


def _value(text: str) -> Any:
    # Whatever TOML can read is TOML; anything else is a bare string, so that data.path=a/b needs no
    # quotes.
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(kind: type[BaseModel], item: Any, name: str) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{name}: unknown key {key!r}; {_hint(key, list(known_keys(kind)), kind)}"
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        return f"{name}: {key + ': ' if key else ''}{message}"
    return f"{name}: {key} = {item['input']!r}: {item['msg']}"


def _hint(key: str, keys: Sequence[str], kind: type[BaseModel]) -> str:
    """What was probably meant: by its last part, by another name for it, by likeness."""
    *tables, leaf = key.split(".")
    meant = [known for known in keys if known.split(".")[-1] == leaf] or [
        known for known in keys if leaf.lower() in OTHER_NAMES.get(known, "").split()
    ]
    # Of several, the one in the table that was named.
    near = [known for known in meant if known.split(".")[:-1] == tables] or meant
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    near = near or difflib.get_close_matches(leaf, keys, n=1, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    if kind in (RunConfig, FinetuneConfig):
        return "`headrace recipes NAME` lists the keys of a recipe"
    return f"there are {', '.join(keys)}"
