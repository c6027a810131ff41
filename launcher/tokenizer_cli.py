"""`headrace tokenizer`: train one by itself, and compare several on texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher import options, spawn

if TYPE_CHECKING:
    from data.tokenizer_eval import Score

tokenizer_app = typer.Typer(help="Train and compare tokenizers.", no_args_is_help=True)

Tokenizers = Annotated[
    list[Path], typer.Argument(metavar="TOKENIZER...", help="tokenizer.model, .json, or folders.")
]
Texts = Annotated[
    list[str], typer.Option("--data", help="Text file, .jsonl file, folder or glob; repeatable.")
]
Model = Annotated[Path, typer.Option("--output", help="File to write, such as tokenizer.model.")]
Size = Annotated[int, typer.Option("--vocab-size", min=1, help="Pieces.")]


@tokenizer_app.command("train")
def train(
    inputs: options.Inputs,
    output: Model,
    vocab_size: Size = 8192,
    tokenizer_type: options.TokenizerType = None,
    user_symbols: options.UserSymbols = None,
    text_field: options.TextField = None,
    exclude: options.Exclude = None,
    workers: options.Workers = 0,
) -> None:
    """Train a sentencepiece model, to be given to `headrace prepare --tokenizer`."""
    from data.config import PrepareConfig
    from data.vocabulary import train_file

    given = {
        "vocab_size": vocab_size,
        "tokenizer_type": tokenizer_type,
        "user_symbols": user_symbols,
        "text_field": text_field,
        "exclude": exclude,
        "val_fraction": 0.0,
    }
    config = PrepareConfig.model_validate({k: v for k, v in given.items() if v is not None})
    train_file(inputs, output, config, workers=workers or spawn.num_cores())
    print(output)


@tokenizer_app.command("eval")
def evaluate(
    tokenizers: Tokenizers,
    data: Texts,
    text_field: options.TextField = None,
    as_json: options.AsJson = False,
) -> None:
    """Bytes per token, documents changed by decoding, tokens that are a lone byte of a character
    or unknown, and speed, per source.
    """
    from data.tokenizer_eval import evaluate_tokenizers

    scores = evaluate_tokenizers(tokenizers, data, text_field=text_field or "text")
    if as_json:
        print(json.dumps([score.to_json() for score in scores], indent=2))
    else:
        show_scores(scores)


def show_scores(scores: list[Score]) -> None:
    """Print a table for each source."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for source in dict.fromkeys(score.source for score in scores):
        # Paths are told whole: rows differ at their ends.
        console.print(escape(source), soft_wrap=True, highlight=False)
        table = Table(box=None, pad_edge=False)
        table.add_column("tokenizer", overflow="fold")
        for name in ("ids", "bytes/token", "changed", "by byte", "MB/CPU-s"):
            table.add_column(name, justify="right", no_wrap=True)
        for score in scores:
            if score.source == source:
                table.add_row(
                    escape(score.tokenizer),
                    f"{score.vocab_size:,}",
                    f"{score.bytes_per_token:.3f}",
                    f"{score.changed} of {score.documents}",
                    f"{score.unknown_share:.3%}",
                    f"{score.mb_per_cpu_second:.1f}",
                )
        console.print(table)
