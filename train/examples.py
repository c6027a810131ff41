"""From the files of a fine-tuning run to its tokenized examples, the same on every rank.

Texts are tokenized by the model folder's own tokenizer. A prompt and its response are joined by the
folder's chat template if it has one, else by a newline.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.instruct import Example, hold_out, read_examples, sorted_labels
from data.targets import Tokenized, prompt_with_response, with_label
from train import hf
from train.config import ConfigError, FinetuneConfig

log = logging.getLogger(__name__)

PLAIN_TEMPLATE = "prompt, newline, response"


@dataclass(frozen=True)
class Examples:
    """What a run trains and validates on."""

    train: list[Tokenized]
    val: list[Tokenized]
    labels: list[str]
    """Names of the labels in the order of the logits; none for instruct."""
    template: str
    """How prompt and response are joined; empty for classify."""
    pad_id: int
    """Fills up short examples."""


def read_files(config: FinetuneConfig) -> tuple[list[Example], list[Example]]:
    """(training, validation) examples; without data.val 10 % of the texts are held out by hash."""
    data = config.data
    if not data.path:
        raise ConfigError("no examples are named; write data=FILE, a .jsonl or .csv file")
    if config.task == "classify":
        columns = {"data.text_column": data.text_column, "data.label_column": data.label_column}
    else:
        columns = {
            "data.prompt_column": data.prompt_column,
            "data.response_column": data.response_column,
        }
    examples = read_examples(data.path, columns)
    if data.val:
        return examples, read_examples(data.val, columns)
    return hold_out(examples, data.path)


def tokenize(config: FinetuneConfig, train: Sequence[Example], val: Sequence[Example]) -> Examples:
    """The examples as numbers, each within seq_len; what did not fit is reported."""
    tokenizer = hf.load_tokenizer(config.model.path)
    if config.task == "classify":
        labels, template = _labels(config, train, val), ""
        parts = [list(_with_labels(config, tokenizer, part, labels)) for part in (train, val)]
        log.info("%d labels: %s", len(labels), ", ".join(labels[:10]))
    else:
        labels = []
        template = "the folder's chat template" if tokenizer.has_chat_template else PLAIN_TEMPLATE
        parts = [list(_with_responses(config, tokenizer, part)) for part in (train, val)]
        log.info("prompt template: %s", template)
    held_out = "from data.val" if config.data.val else "held out"
    log.info("%d training examples, %d %s", len(train), len(val), held_out)
    if num_cut := sum(example.is_cut for part in parts for example in part):
        side = "beginning of the prompt" if template else "end of the text"
        log.info(
            "%d of %d examples are longer than seq_len=%d and lost the %s",
            num_cut,
            len(train) + len(val),
            config.seq_len,
            side,
        )
    return Examples(parts[0], parts[1], labels, template, tokenizer.fill_id)


def _labels(config: FinetuneConfig, train: Sequence[Example], val: Sequence[Example]) -> list[str]:
    found = sorted_labels(train, val)
    own = hf.labels_of(config.model.path)
    if own is not None:
        if unknown := sorted(set(found) - set(own)):
            raise hf.ModelFolderError(
                f"{config.model.path} is a classifier without the labels {unknown}; start from "
                "the language model that it was made from"
            )
        return own
    if len(found) < 2:
        raise ConfigError(
            f"{config.data.path}: every example has the label {found[0]!r}; a classifier needs "
            "two or more (is data.label_column the right column?)"
        )
    if unseen := sorted(set(found) - set(sorted_labels(train))):
        log.info("no training example has the labels %s", ", ".join(unseen))
    return found


def _with_labels(
    config: FinetuneConfig,
    tokenizer: hf.FolderTokenizer,
    examples: Sequence[Example],
    labels: Sequence[str],
) -> Iterator[Tokenized]:
    index = {label: number for number, label in enumerate(labels)}
    inputs = tokenizer.encode_inputs(
        [example.text for example in examples], max_tokens=config.seq_len
    )
    for (ids, is_cut), example in zip(inputs, examples, strict=True):
        yield with_label(ids, index[example.target], is_cut=is_cut)


def _with_responses(
    config: FinetuneConfig, tokenizer: hf.FolderTokenizer, examples: Sequence[Example]
) -> Iterator[Tokenized]:
    if tokenizer.eos_id is None:
        raise hf.ModelFolderError(
            f"{config.model.path}: its tokenizer has no end-of-sequence token, so no response "
            'would ever end; name one as "eos_token" in its tokenizer_config.json'
        )
    chat = tokenizer.has_chat_template
    pairs = [
        tokenizer.chat(example.text, example.target)
        if chat
        else (f"{example.text}\n", example.target)
        for example in examples
    ]
    prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
    wholes = tokenizer.encode_batch([prompt + response for prompt, response in pairs])
    prefix = [] if chat else tokenizer.prefix_ids[: config.seq_len - 1]
    for (_, text), prompt, whole in zip(pairs, prompts, wholes, strict=True):
        # Where prompt and response would merge into one token, the response is tokenized alone:
        # these are the ids that a model sees when it continues the prompt.
        joined = whole[: len(prompt)] == prompt
        response = whole[len(prompt) :] if joined else tokenizer.encode(text)
        yield prompt_with_response(
            prompt or tokenizer.context_ids(),
            _ended(response, tokenizer.eos_id, keep_end=chat),
            max_tokens=config.seq_len,
            prefix=prefix,
        )


def _ended(response: list[int], eos_id: int, *, keep_end: bool) -> list[int]:
    # A chat template writes the end of the turn itself, and often a newline behind it.
    if keep_end and eos_id in response:
        return response[: len(response) - response[::-1].index(eos_id)]
    return [*response, eos_id]
