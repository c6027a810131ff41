"""The clean process of an export: does transformers read the folder as the model that we trained?

    python -m train.export_check FOLDER PROBE TOKENIZER bos|plain VERDICT

PROBE holds token ids and the logits that our own model gives for them; TOKENIZER is the run's own.
What differs is written to VERDICT, with an exit code of 0: a traceback means that the folder could
not even be loaded.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from data.tokenizer import Tokenizer, load_tokenizer
from train import hf

TOLERANCE = 1e-4
"""Largest difference of a logit, as a fraction of the largest logit. Both sides compute in fp32
and differ by the order of their sums: measured 4e-7 to 1.2e-5 for 2 to 32 layers. Two matrices
exchanged in one of 32 untrained layers make 3e-3, in a shallow or trained model 1e-2 and more."""

NUM_TEXTS = 2000
LANGUAGES = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x700), (0x3040, 0x3100), (0x4E00, 0x9FFF))
PLANES = (
    (0x0, 0xD800),
    (0xE000, 0x10000),
    (0x10000, 0x20000),
    (0x1F300, 0x1FAFF),
    (0x20000, 0x110000),
)
EDGES = (
    "",
    " ",
    "  two  spaces ",
    "\t\ttabs\t",
    "line\r\nline\n\n\nend\n",
    "nul\0nul",
    "\u2581lower one eighth block\u2581",
    "e\u0301 and \u00e9, \ufb01 and fi, \u200d\u200b\ufeff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e8\U0001f1ed",
    "<s> </s> <unk> <pad> <0x41> <0xFF> <|endoftext|> [CLS] <mask>",
    " <s>literal</s> ",
)


def check(
    folder: Path, probe: dict[str, torch.Tensor], tokenizer: Tokenizer, *, bos: bool
) -> dict[str, Any]:
    """{"problems": one line per kind of difference, "agreement": the figures of both checks}."""
    expected = probe["logits"]
    with torch.no_grad():
        found = hf.load_causal(folder, dtype=torch.float32)(probe["input_ids"]).logits
    tolerance = TOLERANCE * float(expected.abs().max())
    problems = list(logit_problems(expected, found, tolerance))
    same_shape = found.shape == expected.shape
    texts = list(awkward_texts(tokenizer))
    inputs = hf.load_tokenizer(folder).encode_inputs(texts)
    prefix = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    ours = [[*prefix, *ids] for ids in tokenizer.encode_batch(texts)]
    problems += token_problems(texts, ours, [ids for ids, _ in inputs])
    return {
        "problems": problems,
        "agreement": {
            "max_logit_difference": float((found - expected).abs().max()) if same_shape else -1.0,
            "tolerance": tolerance,
            "num_logits": expected.numel(),
            "num_texts": len(texts),
            "transformers": version("transformers"),
        },
    }


def logit_problems(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> Iterator[str]:
    """What is wrong with transformers' logits [B, T, V], if anything."""
    if found.shape != expected.shape:
        yield f"logits have shape {tuple(found.shape)}, ours {tuple(expected.shape)}"
        return
    difference = (found - expected).abs()
    wrong = ~(difference <= tolerance)  # NaN is wrong, too
    if wrong.any():
        row, position, token = (int(i) for i in wrong.nonzero()[0])
        yield (
            f"{int(wrong.sum())} of {wrong.numel()} logits differ by more than {tolerance:.3g}, by "
            f"{float(difference.max()):.3g} at most; the first is probe {row}, position "
            f"{position}, token id {token}: {float(found[row, position, token]):.6g} instead of "
            f"{float(expected[row, position, token]):.6g}"
        )


def token_problems(
    texts: list[str], expected: list[list[int]], found: list[list[int]]
) -> Iterator[str]:
    """What is wrong with the exported tokenizer's ids, if anything."""
    wrong = [i for i in range(len(texts)) if expected[i] != found[i]]
    if wrong:
        first = min(wrong, key=lambda i: len(texts[i]))
        yield (
            f"token ids of {len(wrong)} of {len(texts)} texts differ, such as "
            f"{ascii(texts[first])[:80]}: {found[first][:12]} instead of {expected[first][:12]}"
        )


def awkward_texts(tokenizer: Tokenizer, count: int = NUM_TEXTS) -> Iterator[str]:
    """Texts that tokenizers disagree on: edges, runs, every plane, and the vocabulary's own pieces
    in random order. The same for every call.
    """
    chance = random.Random(0)
    yield from EDGES
    for length in (2, 3, 17, 64, 257, 1001):
        yield from (character * length for character in (" ", "a", "\n", "=", "\u4e00", "0"))
    for number in range(count - len(EDGES) - 36):
        if number % 4 == 0:
            # Merges of long pieces, at borders that no trained text has.
            ids = [chance.randrange(tokenizer.vocab_size) for _ in range(chance.randrange(1, 40))]
            yield tokenizer.decode(ids)
        else:
            ranges = PLANES if number % 4 == 1 else LANGUAGES
            yield "".join(_words(chance, ranges))


def _words(chance: random.Random, ranges: tuple[tuple[int, int], ...]) -> Iterator[str]:
    for _ in range(chance.randrange(1, 12)):
        low, high = chance.choice(ranges)
        characters = (chr(chance.randrange(low, high)) for _ in range(chance.randrange(1, 9)))
        yield "".join(characters)
        yield chance.choice(("", " ", " ", "  ", "\n", "\t", ", ", "  \n"))


def main(arguments: list[str]) -> None:
    """Check, and write the verdict."""
    folder, probe, tokenizer, prefix, verdict = arguments
    found = check(Path(folder), load_file(probe), load_tokenizer(tokenizer), bos=prefix == "bos")
    Path(verdict).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
