"""How results look: for people on stdout, for programs as JSON there, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from data.selection import said

if TYPE_CHECKING:
    from pathlib import Path

    from data.inspect import Inspection
    from data.lookup import Lookup
    from data.manifest import Manifest
    from data.prepare import Summary, TaskSummary
    from data.verify import Verification
    from train.export import ExportSummary

MAX_TEXT = 160
"""Characters of a document that are shown."""
EVALUATION_LABELS = {
    "loss": ("loss", " nats per token"),
    "perplexity": ("perplexity", ""),
    "bits_per_byte": ("bits per byte", ""),
    "num_tokens": ("tokens measured", ""),
    "precision_macro": ("precision, mean over classes", ""),
    "recall_macro": ("recall, mean over classes", ""),
    "f1_macro": ("F1, mean over classes", ""),
}
"""Key of a score -> what a person reads, and its unit."""
MAX_MATRIX = 12
"""Classes up to which a confusion matrix fits a terminal."""


@contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage on stderr, fed with (stage, done, total); nothing where stderr is a file."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:10}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def show_preparation(summary: Summary, *, as_json: bool) -> None:
    """Print what a dataset holds now."""
    manifest = summary.manifest
    clean = manifest.preparation.get("clean")
    dropped = manifest.preparation.get("dropped", {})
    left_out = manifest.preparation.get("left_out", {})
    tokens = {split: manifest.num_tokens(split) for split in ("train", "val")}
    if as_json:
        _print_json(
            {
                "dataset": str(summary.output),
                "vocab_size": manifest.vocab_size,
                "train_tokens": tokens["train"],
                "val_tokens": tokens["val"],
                "documents": sum(shard.documents for shard in manifest.shards),
                "fingerprint": manifest.fingerprint,
                "was_complete": summary.was_complete,
                "warnings": list(summary.warnings),
                "notes": _notes(manifest),
                "dropped": dropped,
                "left_out": left_out,
                **({"clean": clean} if clean else {}),
            }
        )
        return
    for warning in summary.warnings:
        print(f"warning: {warning}")
    if words := said(left_out):
        print(f"left out of the input: {words}")
    if dropped:
        print("without text: " + ", ".join(f"{n:,} {reason}" for reason, n in dropped.items()))
    for count in clean["stages"] if clean else ():
        print(_cleaned(count))
    for file in clean.get("evaluation", ()) if clean else ():
        if file["too_short"]:
            print(
                f"  {file['too_short']:,} of {file['texts']:,} texts of {file['name']} have fewer "
                "than 13 words in a row: nothing is dropped for those"
            )
    for note in _notes(manifest):
        print(f"note: {note}")
    print(
        f"{summary.output}{' was complete' if summary.was_complete else ''}: "
        f"{tokens['train']:,} training and {tokens['val']:,} validation tokens, vocabulary "
        f"{manifest.vocab_size:,}, fingerprint {manifest.fingerprint[:16]}"
    )


def _notes(manifest: Manifest) -> list[str]:
    """What is as it was asked for, and still good to know."""
    # Settings of cleaning that was not asked for are not recorded.
    dedup = manifest.preparation["config"].get("clean", {}).get("dedup")
    num_tokens = manifest.num_tokens("val")
    if dedup == "near" or not num_tokens:
        return []
    return [
        f"near copies were not looked for, so some of the {num_tokens:,} validation tokens may "
        "nearly repeat training text, which makes the validation loss too low (equal text lies on "
        "one side); --dedup near keeps one of each"
    ]


def show_task(done: TaskSummary, *, as_json: bool) -> None:
    """Print what a task of a preparation has done."""
    task = f"{done.task.number}/{done.task.count}"
    if as_json:
        _print_json(
            {
                "stage": done.stage,
                "task": task,
                "jobs": done.num_jobs,
                "is_complete": done.is_complete,
            }
        )
        return
    count = done.num_jobs
    jobs = f"{count} job{'s' * (count > 1)} done" if count else "nothing to do"
    print(f"stage {done.stage}, task {task}: {jobs}")
    if done.is_complete:
        print("the dataset is complete")


def _cleaned(count: Mapping[str, Any]) -> str:
    """What a stage of cleaning did, in one line, and one more for each reason."""
    line = (
        f"{count['stage'].replace('_', ' ')}: {count['documents_out']:,} of "
        f"{count['documents_in']:,} documents and {count['bytes_out']:,} of "
        f"{count['bytes_in']:,} bytes stay"
    )
    reasons = [f"  dropped {times:,}: {reason}" for reason, times in count["dropped"].items()]
    return "\n".join([line, *reasons, *(f"  {n:,} {kind}" for kind, n in count["found"].items())])


def show_verification(result: Verification, *, as_json: bool) -> None:
    """Print what was read, or every problem."""
    if as_json:
        _print_json(result.to_json())
        return
    for problem in result.problems:
        where = f"{problem.file}: chunk {problem.chunk}" if problem.chunk else problem.file
        print(f"damaged: {where}: {problem.message}")
    if not result.ok:
        count = len(result.problems)
        print(
            f"{result.dataset}: {count} problem{'s' * (count > 1)} in {result.num_shards} shards; "
            "restore what is named from a copy, or prepare the dataset again"
        )
        return
    print(
        f"{result.dataset}: ok, "
        f"{'every byte' if result.full else 'every index and chunk'} of {result.num_shards} shards "
        f"read: {result.tokens:,} tokens in {result.documents:,} documents, "
        f"fingerprint {result.fingerprint[:16]}"
    )


def show_step(
    found: Inspection, *, run: Path | None = None, recorded: str | None = None, as_json: bool
) -> None:
    """Print the samples of a step, document by document, and the step's hash; with a run, whether
    that is what the run `recorded`.
    """
    if as_json:
        equal = None if recorded is None else recorded == found.data_hash
        compared = {} if run is None else {"run": str(run), "equals_recorded": equal}
        _print_json(found.to_json() | compared)
        return
    _print_samples(found)
    print(
        f"step {found.step}: samples [{found.first}, {found.last}), seed {found.seed}, "
        f"seq_len {found.seq_len}, data_hash {found.data_hash}"
    )
    if run is not None and recorded is None:
        print(f"{run} has recorded no such step yet")
    elif run is not None:
        same = "equals" if recorded == found.data_hash else "is not"
        print(f"data_hash {same} what {run} recorded")


def show_sample(found: Inspection, *, as_json: bool) -> None:
    """Print one sample, document by document, and its own hash: a step's is the sum of several."""
    if as_json:
        told = found.to_json()
        told["sample_hash"] = told.pop("data_hash")
        _print_json(told)
        return
    _print_samples(found)
    print(
        f"sample {found.first} of step {found.step}: seed {found.seed}, seq_len {found.seq_len}, "
        f"hash of this sample alone {found.data_hash}"
    )


def _print_samples(found: Inspection) -> None:
    for sample in found.samples:
        print(
            f"sample {sample.sample}  {sample.source} epoch {sample.epoch}  "
            f"{sample.shard} {sample.chunk} token {sample.token_offset:,}  hash {sample.hash}"
        )
        if sample.quarantined:
            print(f"  quarantined, trains nothing: {sample.quarantined}")
        for piece in sample.pieces:
            text = json.dumps(piece.text[:MAX_TEXT], ensure_ascii=False)
            named = f"{piece.number}{_in_brackets(piece.id)}"
            print(f"  document {named} from token {piece.first_token:,}: {text}")


def show_lookup(found: Lookup, *, as_json: bool) -> None:
    """Print the samples and steps that train on a document."""
    if as_json:
        _print_json(found.to_json())
        return
    for place in found.occurrences:
        step = "after the last step" if place.step is None else f"step {place.step}"
        print(f"epoch {place.epoch}  sample {place.sample}  {step}")
    print(
        f"{found.shard} document {found.number}{_in_brackets(found.id)}: {found.num_tokens:,} "
        "tokens from token "
        f"{found.first_token:,} of source {found.source}, in {len(found.occurrences)} samples"
    )


def _in_brackets(document_id: str | None) -> str:
    """What the input called a document, on one line."""
    return "" if document_id is None else f" ({ascii(document_id)[1:-1]})"


def show_export(summary: ExportSummary, *, as_json: bool) -> None:
    """Print what was published, and how closely transformers agreed."""
    if as_json:
        _print_json({**asdict(summary), "folder": str(summary.folder)})
        return
    found = summary.agreement
    print(
        f"{summary.folder}: step {summary.step}, {summary.num_parameters:,} parameters; "
        f"transformers {found.transformers} gives the same {found.num_logits:,} logits within "
        f"{found.max_logit_difference:.1e} and the same token ids for {found.num_texts:,} texts"
    )


def show_evaluation(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the numbers of an evaluation, and the confusion matrix of a classification."""
    if as_json:
        _print_json(result)
        return
    console = Console()
    numbers = Table(box=None, show_header=False, pad_edge=False)
    for key, value in result.items():
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            label, unit = EVALUATION_LABELS.get(key, (key.replace("_", " "), ""))
            numbers.add_row(label, _number(value) + unit)
    console.print(numbers)
    if "per_class" not in result:
        return
    console.print(_classes(result["per_class"]))
    names = list(result["per_class"])
    if len(names) <= MAX_MATRIX:
        print("rows: true class, columns: predicted")
        console.print(_matrix(names, result["confusion_matrix"]))
    else:
        print(f"the confusion matrix of {len(names)} classes is in the output of --json")


def _classes(per_class: Mapping[str, Mapping[str, float]]) -> Table:
    keys = ("precision", "recall", "f1", "support")
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for key in keys:
        table.add_column(key, justify="right")
    for name, row in per_class.items():
        table.add_row(escape(name), *(_number(row[key]) for key in keys))
    return table


def _matrix(names: list[str], confusion: list[list[int]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(escape(name), justify="right")
    for name, counts in zip(names, confusion, strict=True):
        table.add_row(escape(name), *(str(count) for count in counts))
    return table


def _print_json(result: Mapping[str, Any]) -> None:
    print(json.dumps(result, indent=2))


def _number(value: float | str) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else escape(value)
