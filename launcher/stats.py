"""`headrace data stats`: what a dataset is made of, and how often a run passes over it; and what
`headrace data index` has made of tars, and `headrace data pack` of documents.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.foreign import Indexed
from data.pack import PackedDataset
from data.places import place_of
from data.stats import Stats, dataset_stats
from launcher.inspect import config_of, open_subject
from launcher.show import stage_progress

DEFAULT_SEQ_LEN = 2048
MAX_BAR = 40
"""Characters of the longest bar of the histogram."""


def stats(dataset: str | Path, *, run: Path | None, seq_len: int | None) -> Stats:
    """What `dataset` holds; `run` gives seq_len, seed and the epochs that it makes in all."""
    config = None if run is None else config_of(run)
    subject = None
    if config is not None:
        # Before the counting, which takes a while: it refuses data that is not the run's. A run of
        # one dataset finds it where it is now; sources of several are where its config says.
        alone = None if config.data.sources else dataset
        subject = open_subject(alone, run=run, recipe="", overrides=())
    length = seq_len or (config.seq_len if config else DEFAULT_SEQ_LEN)
    with stage_progress() as progress:
        found = dataset_stats(
            place_of(dataset, commands=True),
            seq_len=length,
            seed=config.seed if config else 0,
            progress=progress,
        )
    if subject is None:
        return found
    total = subject.phases.samples(subject.steps)[1]
    return replace(found, epochs=subject.stream.epochs(total))


def show_stats(found: Stats, *, as_json: bool) -> None:
    """Print the counts, the sources, and a histogram of document lengths."""
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    console = Console()
    console.print(_totals(found))
    console.print(_sources(found))
    console.print(_packing(found))
    console.print(_histogram(found))


def show_indexed(found: Indexed, *, as_json: bool) -> None:
    """Print what was copied, changed and left alone."""
    manifest = found.manifest
    tokens = {split: manifest.num_tokens(split) for split in ("train", "val")}
    if as_json:
        result = {
            "dataset": str(found.output),
            "vocab_size": manifest.vocab_size,
            "train_tokens": tokens["train"],
            "val_tokens": tokens["val"],
            "documents": sum(shard.documents for shard in manifest.shards),
            "fingerprint": manifest.fingerprint,
            "was_complete": found.was_complete,
            "eos_appended": found.eos_appended,
            "eos_inside": found.eos_inside,
            "ignored": found.ignored,
        }
        print(json.dumps(result, indent=2))
        return
    for ending, count in found.ignored.items():
        print(f"warning: {count:,} members .{ending} are no token arrays and were left alone")
    print(
        f"{found.output}{' was complete' if found.was_complete else ''}: {tokens['train']:,} "
        f"training and {tokens['val']:,} validation tokens in "
        f"{manifest.counts['documents']:,} documents, EOS appended to {found.eos_appended:,} of "
        f"them, {found.eos_inside:,} hold EOS inside, fingerprint {manifest.fingerprint[:16]}"
    )


def show_packed(found: PackedDataset, *, as_json: bool) -> None:
    """Print the samples of a plan and what of them is padding."""
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    for s in found.sources:
        print(
            f"{s.split}/{s.source}: {s.samples:,} samples of {s.seq_len:,} tokens, "
            f"{s.targets:,} targets, {s.padding:.2%} padding"
        )
    done = "was packed" if found.was_complete else "is packed"
    print(f"{found.dataset} {done}; train with data.packing=best_fit seq_len={found.seq_len}")


def _totals(found: Stats) -> Table:
    repeats = found.repeats
    table = Table(box=None, show_header=False, pad_edge=False)
    rows = {
        "dataset": f"{found.dataset}, fingerprint {found.fingerprint[:16]}",
        "tokens": f"{found.tokens:,} in {found.documents:,} documents, vocabulary "
        f"{found.vocab_size:,}",
        "bytes per token": "unknown: the preparation did not count the text's bytes"
        if found.bytes_per_token is None
        else f"{found.bytes_per_token:.3f} ({found.text_bytes:,} bytes of text)",
        "document length": f"mean {found.tokens / found.documents:,.1f}, longest "
        f"{found.longest_document:,} tokens; {_share(found.longer_than_seq_len, found.documents)} "
        f"longer than seq_len {found.seq_len:,}",
        "exact copies": f"{repeats.documents:,} documents "
        f"({_share(repeats.documents, found.documents)}), {_share(repeats.tokens, found.tokens)} "
        f"of the tokens; {repeats.val_documents_in_train:,} validation documents are also in "
        "the training side",
        "disk": f"{found.disk_bytes:,} bytes, {found.disk_over_tokens:.4f}x the bytes of the "
        "tokens",
    }
    if found.epochs:
        passes = (f"{name} {count:,.3f}" for name, count in found.epochs.items())
        rows["epochs of the run"] = ", ".join(passes)
    for name, text in rows.items():
        table.add_row(name, escape(text))
    return table


def _sources(found: Stats) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("source")
    names = ["shards", "documents", "tokens", "samples", "unused tokens", "read / used"]
    for name in names:
        table.add_column(name, justify="right")
    for s in found.sources:
        numbers = [s.shards, s.documents, s.tokens, s.samples_per_epoch, s.unused_tokens]
        row = [f"{number:,}" for number in numbers] + [f"{s.read_amplification:.2f}"]
        table.add_row(escape(f"{s.split}/{s.source}"), *row)
    return table


def _packing(found: Stats) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("packing", "source"):
        table.add_column(name)
    for name in ("samples", "padding", "cut documents"):
        table.add_column(name, justify="right")
    for s in found.sources:
        label = f"concat {found.seq_len}"
        where = escape(f"{s.split}/{s.source}")
        cut = _share(s.cut_documents, s.documents)
        table.add_row(label, where, f"{s.samples_per_epoch:,}", "0.00%", cut)
    for p in found.plans:
        numbers = [f"{p.samples:,}", f"{p.padding:.2%}", _share(p.cut_documents, p.documents)]
        table.add_row(f"best_fit {p.seq_len}", escape(f"{p.split}/{p.source}"), *numbers)
    return table


def _histogram(found: Stats) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("documents", justify="right")
    table.add_column("")
    most = max(found.length_histogram.values())
    for first, count in found.length_histogram.items():
        bar = "#" * -(-MAX_BAR * count // most)
        table.add_row(f"{first:,} - {2 * first - 1:,}", f"{count:,}", bar)
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}"
