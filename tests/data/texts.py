"""Text for tests: prose that a small vocabulary fits, and strings that break tokenizers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

_SENTENCE = (
    "the river turned a wheel and the wheel turned the stone while rain fell on grass near "
    "every mill where people carried grain down from hills under clouds of early autumn light"
)
WORDS = _SENTENCE.split()
HOSTILE = ("<s>", "</s>", "<unk>", "<pad>", "<0x41>", "\u2585", "\ufeff", "\u200d", "e\u0301")
REPEATED = (" ", "\n", "\t", "\r\n", "\0", "\u3000", "a", "0", "=", "-", "\u2581")


def prose(num_bytes: int, seed: int = 0) -> str:
    """About `num_bytes` of sentences, lines and paragraphs."""
    rng = random.Random(seed)
    text: list[str] = []
    size = 0
    while size < num_bytes:
        words = " ".join(rng.choices(WORDS, k=rng.randrange(3, 14))).capitalize()
        text.append(words + rng.choice([". ", ". ", ".\n", ".\n\n", f" {rng.randrange(1000)}! "]))
        size += len(text[-1])
    return "".join(text)


def write_lines(path: Path, texts: Sequence[str], **more: str) -> Path:
    """A .jsonl file with one text per line."""
    lines = [json.dumps({"text": text, **more}, ensure_ascii=False) for text in texts]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def probes(count: int, corpus: str, seed: int = 0) -> list[str]:
    """Strings of corpus slices, runs, all planes of Unicode, special tokens and noise."""
    rng = random.Random(seed)

    def character() -> str:
        ranges = (range(0xD800), range(0xE000, 0x110000))
        return chr(rng.choice(rng.choice(ranges)))

    def piece() -> str:
        start = rng.randrange(len(corpus))
        return rng.choice(
            [
                corpus[start : start + rng.randrange(1, 80)],
                rng.choice(REPEATED) * rng.randrange(1, rng.choice([4, 20, 1001])),
                "".join(character() for _ in range(rng.randrange(1, 9))),
                rng.choice(HOSTILE),
                " " * rng.randrange(1, 40) + rng.choice(["x", "def", "(", '"']),
                "".join(rng.choices("abc \n", k=rng.randrange(1, 30))),
                str(rng.randrange(10 ** rng.randrange(1, 20))),
                "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(rng.randrange(1, 9))),
            ]
        )

    runs = [" " * n for n in range(1, 40)]
    return [
        "",
        *runs,
        *("".join(piece() for _ in range(rng.randrange(1, 9))) for _ in range(count)),
    ]
