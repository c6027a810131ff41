"""Speed of the data pipeline in CPU-seconds, beside what others use, interleaved in one run.

Loading: shuffled, packed samples of 2,048 targets as int64 tensors in batches of 8, from a data set
larger than our cache; a round is one whole epoch from a fresh start, so the hash check of every
chunk has its true share. Ours also hashes each sample (`data_hash`). Beside it a loader as Megatron
has it: flat memory-mapped tokens, document, sample and shuffle index; and mosaicml-streaming where
it is installed. Preparing: text to shards with a given tokenizer, beside sentencepiece's own
`encode` of the same texts. Exit code 1 when a bar is missed, which is named.

    .venv/bin/python -m tests.benchmarks.data_speed                   the standard library's sources
    .venv/bin/python -m tests.benchmarks.data_speed --text BOOKS.jsonl --json FIGURES.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from numpy.typing import NDArray

from data.config import PrepareConfig
from data.loader import SampleStream, micro_batches
from data.manifest import dtype_for, read_manifest, write_manifest
from data.prepare import prepare
from data.shards import write_shard
from data.tokens import TokenSource
from launcher.corpus import choose, read_sources
from tests.benchmarks import mosaic
from tests.benchmarks.bars import Bar, judge

SEQ_LEN, BATCH, VOCAB = 2048, 8, 4096
SHARD_TOKENS = 2**25
STEP_SECONDS = 0.05
HAS_STREAMING = importlib.util.find_spec("streaming") is not None

Figures = dict[str, float]
Case = Callable[[], int]


@dataclass(frozen=True)
class Megatron:
    """The documents of a flat file in shuffled order, cut into samples, read in shuffled order."""

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    documents: NDArray[np.int64]
    """Document index: the order of documents."""
    sample_document: NDArray[np.int64]
    sample_offset: NDArray[np.int64]
    """Sample index: place in `documents`, and token in that document, where each sample begins."""
    order: NDArray[np.int64]
    """Shuffle index."""

    def sample(self, number: int) -> NDArray[np.int64]:
        """seq_len + 1 tokens, as GPTDataset gathers them."""
        index = self.order[number]
        place, offset = int(self.sample_document[index]), int(self.sample_offset[index])
        parts, missing = [], SEQ_LEN + 1
        while missing:
            document = self.documents[place]
            start = self.starts[document] + offset
            size = min(int(self.lengths[document]) - offset, missing)
            parts.append(self.tokens[start : start + size])
            missing -= size
            place, offset = place + 1, 0
        return np.concatenate(parts, dtype=np.int64)


def megatron(path: Path, lengths: NDArray[np.int64], dtype: str, *, seed: int) -> Megatron:
    """Build the three indexes, vectorised; nothing of it is timed."""
    random = np.random.default_rng(seed)
    documents = random.permutation(len(lengths))
    ends = np.cumsum(lengths[documents])
    count = int((ends[-1] - 1) // SEQ_LEN)
    first = np.arange(count) * SEQ_LEN
    places = np.searchsorted(ends, first, side="right")
    return Megatron(
        tokens=np.memmap(path, dtype=dtype, mode="r"),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        documents=documents,
        sample_document=places,
        sample_offset=first - (ends - lengths[documents])[places],
        order=random.permutation(count),
    )


def read_megatron(loader: Megatron) -> int:
    """One epoch in batches of tensors; position ids are made once, as there."""
    positions = torch.arange(SEQ_LEN)
    count = 0
    for first in range(0, len(loader.order) - BATCH + 1, BATCH):
        texts = [torch.from_numpy(loader.sample(first + i)) for i in range(BATCH)]
        batch = {
            "tokens": torch.stack([text[:-1] for text in texts]),
            "labels": torch.stack([text[1:] for text in texts]),
            "position_ids": torch.stack([positions] * BATCH),
        }
        count += batch["tokens"].numel()
    return count


def read_ours(dataset: Path, boundaries: Any) -> int:
    """One epoch through the loader of a training run."""
    count = 0
    for batch in _batches(dataset, boundaries, num_workers=0):
        count += batch["input_ids"].numel()
    return count


def _batches(dataset: Path, boundaries: Any, *, num_workers: int) -> Iterator[Any]:
    stream = SampleStream(dataset, seq_len=SEQ_LEN, seed=1)
    return micro_batches(
        stream,
        first_sample=0,
        batch_samples=BATCH,
        num_steps=stream.num_samples_per_epoch // BATCH,
        rank=0,
        num_ranks=1,
        micro_batch=BATCH,
        num_workers=num_workers,
        boundaries=boundaries,
    )


def waiting(dataset: Path, steps: int = 100) -> Figures:
    """Wall time that a trainer waits for data, at 2 workers and a step of 50 ms."""
    batches = _batches(dataset, "ignore", num_workers=2)
    waits = []
    for _ in range(steps + 5):
        begin = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - begin)
        time.sleep(STEP_SECONDS)
    kept = waits[5:]
    return {
        "mean_wait_share": statistics.mean(kept) / STEP_SECONDS,
        "median_wait_share": statistics.median(kept) / STEP_SECONDS,
    }


def texts_of(path: Path | None, limit: int) -> list[str]:
    """Documents of about `limit` bytes in all."""
    if path is None:
        texts = [s.text for s in choose(read_sources(Path(sysconfig.get_path("stdlib"))))]
    else:
        with path.open() as lines:
            texts = [json.loads(line)["text"] for line in lines]
    kept, size = [], 0
    for text in texts:
        if kept and size + len(text.encode()) > limit:
            break
        kept.append(text)
        size += len(text.encode())
    return kept


def prepared(texts: list[str], folder: Path) -> Path:
    """The texts as a dataset with a tokenizer of their own."""
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PrepareConfig(vocab_size=VOCAB, val_fraction=0, tokenizer_bytes=2**21)
    prepare([str(file)], folder / "small", config, workers=1)
    return folder / "small"


def enlarged(small: Path, folder: Path, num_tokens: int) -> tuple[Path, NDArray[np.int64], Path]:
    """The same documents over and over, as our shards and as one flat file with lengths."""
    manifest = read_manifest(small)
    source = TokenSource(small, manifest, "train", "main")
    lengths = np.array([d.num_tokens for d in source.documents(0, source.num_tokens)])
    dtype = dtype_for(manifest.vocab_size)
    texts = np.split(source.read(0, source.num_tokens).astype(dtype), np.cumsum(lengths)[:-1])
    times = max(-(-num_tokens // int(lengths.sum())), 1)
    per_shard = max(SHARD_TOKENS // int(lengths.sum()), 1)
    large = folder / "large"
    entries = [
        write_shard(
            large / "train" / "main" / f"shard-{i:06d}.tar",
            texts * min(per_shard, times - i * per_shard),
            dtype,
        )
        for i in range(-(-times // per_shard))
    ]
    tokenizer = large / manifest.tokenizer_file
    tokenizer.write_bytes((small / manifest.tokenizer_file).read_bytes())
    write_manifest(
        large,
        entries,
        tokenizer=tokenizer,
        vocab_size=manifest.vocab_size,
        special_ids=manifest.special_ids,
        preparation={},
        split_rule="none",
    )
    flat = folder / "flat.bin"
    with flat.open("wb") as file:
        for _ in range(times):
            for ids in texts:
                file.write(ids.tobytes())
    return large, np.tile(lengths, times), flat


def loading_cases(small: Path, folder: Path, num_tokens: int) -> dict[str, Case]:
    """Each reads an epoch and returns how many tokens that was."""
    large, lengths, flat = enlarged(small, folder, num_tokens)
    dtype = dtype_for(VOCAB)
    theirs = megatron(flat, lengths, dtype, seed=1)
    cases: dict[str, Case] = {
        "memmap": lambda: read_megatron(theirs),
        "ours": lambda: read_ours(large, "ignore"),
        "ours, masks and document ids": lambda: read_ours(large, "attention"),
    }
    if HAS_STREAMING:
        order = range(len(theirs.order))
        mosaic.write_samples((theirs.sample(i).astype(dtype) for i in order), folder / "mds")
        cases["mosaicml-streaming"] = lambda: mosaic.read_samples(
            folder / "mds", dtype, batch=BATCH
        )
    return cases


def preparing_cases(texts: list[str], small: Path, folder: Path) -> dict[str, Case]:
    """Each turns the texts into ids and returns how many bytes that were."""
    size = sum(len(text.encode()) for text in texts)
    model = small / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    runs = iter(range(10**6))

    def theirs() -> int:
        processor.encode(texts, num_threads=1)
        return size

    def ours() -> int:
        output = folder / f"prepared-{next(runs)}"
        config = PrepareConfig(val_fraction=0)
        prepare([str(folder / "text.jsonl")], output, config, workers=1, tokenizer=model)
        return size

    return {"sentencepiece encode": theirs, "prepare": ours}


def measure(cases: dict[str, Case], rounds: int, base: str) -> dict[str, Figures]:
    """Rate per CPU-second of every case, and its ratio to `base`, medians over the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            begin = time.process_time()
            done = case()
            # The first round warms the page cache and imports.
            if number:
                rates[name].append(done / (time.process_time() - begin) / 1e6)
    return {
        name: {
            "millions_per_cpu_second": statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(found, rates[base], strict=True)),
        }
        for name, found in rates.items()
    }


def bars(figures: dict[str, Any]) -> list[Bar]:
    """What the data pipeline promises."""
    ours, theirs = (figures["loading"].get(name) for name in ("ours", "mosaicml-streaming"))
    found = [
        Bar("loading over memmap", ours["ratio"], at_least=1.0),
        Bar(
            "preparing over sentencepiece encode",
            figures["preparing"]["prepare"]["ratio"],
            at_least=0.9,
        ),
        Bar(
            "mean waiting share of a 50 ms step", figures["waiting"]["mean_wait_share"], below=0.01
        ),
    ]
    if theirs is not None:
        ratio = ours["ratio"] / theirs["ratio"]
        found.append(Bar("loading over mosaicml-streaming", ratio, at_least=6.0))
    return found


def main() -> int:
    """Print and perhaps write the figures; the exit code says whether every bar is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--text", type=Path, help="JSON lines with a text each")
    parser.add_argument("--text-bytes", type=int, default=2**22, help="of it, at most")
    parser.add_argument("--tokens", type=int, default=2**26, help="size of the dataset to load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder = Path(name)
        texts = texts_of(options.text, options.text_bytes)
        small = prepared(texts, folder)
        cases = loading_cases(small, folder, options.tokens)
        figures: dict[str, Any] = {
            "loading": measure(cases, options.rounds, "memmap"),
            "preparing": measure(
                preparing_cases(texts, small, folder), options.rounds, "sentencepiece encode"
            ),
            "waiting": waiting(folder / "large"),
        }
    units = {"loading": "Mtok/CPU-s", "preparing": "MB/CPU-s"}
    for kind, unit in units.items():
        for case, row in figures[kind].items():
            rate = row["millions_per_cpu_second"]
            print(f"{kind:10} {case:30} {rate:8.1f} {unit}  {row['ratio']:.2f}x")
    share = figures["waiting"]
    print(
        f"waiting    2 workers, step 50 ms: mean {share['mean_wait_share']:.2%}, "
        f"median {share['median_wait_share']:.2%} of the step (wall time)"
    )
    if HAS_STREAMING:
        rows = figures["loading"]
        ratio = rows["ours"]["ratio"] / rows["mosaicml-streaming"]["ratio"]
        print(f"loading    ours over mosaicml-streaming {ratio:.1f}x")
    else:
        print("mosaicml-streaming is not measured: it is not installed (it is no dependency)")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
    return judge(bars(figures))


if __name__ == "__main__":
    sys.exit(main())
