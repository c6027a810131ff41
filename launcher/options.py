"""What command lines may say: every option and argument that several commands share, or that is
long; each is declared once.

Defaults of a preparation are those of data/config.py, written out: to import that takes longer than
`--help`, and a test compares them.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def _named(value: str | Path) -> Path:
    """A path that was written: "" would be the current folder, as when a variable is not set."""
    if not str(value).strip():
        raise typer.BadParameter("it is empty, as when a variable is not set; write . for this one")
    return Path(value)


def _dataset(value: str | Path) -> Any:
    """A dataset: a path, or a URL or command, which stay text; a path would lose a slash of it."""
    from data.places import is_url

    text = str(value)
    return text if is_url(text) else _named(value)


def _folder(value: str | Path) -> Path:
    """A folder that is there, or may be made."""
    path = _named(value)
    blocked = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise typer.BadParameter(f"{blocked} is a file, no folder; name another one")
    return path


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"headrace {importlib.metadata.version('headrace')}")
        raise typer.Exit


PATH: Any = {"parser": _named, "metavar": "PATH"}
FOLDER: Any = {"parser": _folder, "metavar": "FOLDER"}

Version = Annotated[
    bool,
    typer.Option(
        "--version", help="Print the version and leave.", callback=_print_version, is_eager=True
    ),
]

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A built-in name or a file; `headrace recipes` lists them."
    ),
]
OneRecipe = Annotated[
    str | None, typer.Argument(metavar="[RECIPE]", help="A built-in name or a file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Dotted keys, such as optim.lr=3e-4; `headrace recipes RECIPE` lists them.",
    ),
]
RunFolder = Annotated[
    Path | None,
    typer.Option("--run", help="Run directory.", show_default="runs/RECIPE", **FOLDER),
]
NumProcesses = Annotated[int, typer.Option("--nproc", min=1, help="Ranks on this machine.")]
StopAt = Annotated[
    int | None,
    typer.Option("--stop-at", min=1, help="Save and leave after this step; the schedule stays."),
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-change",
        metavar="KEY",
        help="Go on with a new value from here: batch_tokens, data.sources or (where windows of "
        "the order end) seq_len; repeatable.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DatasetPlace = Annotated[
    Any, typer.Argument(metavar="DATASET", help="Dataset: directory or URL.", parser=_dataset)
]
ModelFolder = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Hugging Face folder.", parser=_named)
]

Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        help="Text, .jsonl, .json, .csv, .tsv, .parquet, .warc or WebDataset .tar file, also as "
        ".gz .bz2 .xz .zst; directory, glob, URL (s3 gs http hf), @LIST, - (-.jsonl) for "
        "standard input, or pipe:.jsonl:COMMAND; repeatable.",
    ),
]
MoreInputs = Annotated[
    list[str] | None, typer.Argument(metavar="[PATH]...", help="Further inputs.")
]
Output = Annotated[Path, typer.Option("--output", help="Dataset directory to write.", **PATH)]
VocabSize = Annotated[
    int | None,
    typer.Option(min=1, help="Train a tokenizer with this many pieces.", show_default="8192"),
]
TokenizerFile = Annotated[
    Path | None, typer.Option(help="Use this tokenizer.model or tokenizer.json instead.", **PATH)
]
TokenizerType = Annotated[
    Literal["bpe", "unigram"] | None,
    typer.Option(
        help="Algorithm of the trained tokenizer; models of a unigram one cannot be exported.",
        show_default="bpe",
    ),
]
UserSymbols = Annotated[
    list[str] | None, typer.Option("--symbol", help="String that is always one piece; repeatable.")
]
ValFraction = Annotated[
    float | None,
    typer.Option(
        help="Share of the text that is held out.",
        show_default="0.01",
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        help="Key (a.b.c goes into objects) or column of the text.",
        show_default="text",
    ),
]
IdField = Annotated[
    str | None,
    typer.Option(
        help="Key or column of a record's id: keep ids (or file and place) with the tokens, for "
        "`data inspect`."
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="Leave out these files and folders of the input: '*.png', node_modules, "
        "'docs/*.html'; repeatable.",
    ),
]
OnBadText = Annotated[
    Literal["strict", "replace", "skip"],
    typer.Option(help="Text that is not UTF-8: stop, put U+FFFD in, or skip the document."),
]
MaxBadLines = Annotated[
    int | None,
    typer.Option(
        help="Broken .jsonl lines to tolerate.",
        show_default="0",
    ),
]
Bos = Annotated[bool, typer.Option("--bos", help="Put BOS in front of every document.")]
Normalize = Annotated[
    bool, typer.Option("--normalize", help="Unicode NFC, no NUL, no byte order mark.")
]
Filter = Annotated[
    bool, typer.Option("--filter", help="Drop what the Gopher and C4 rules (English prose) drop.")
]
FilterDatatrove = Annotated[
    str | None,
    typer.Option(
        metavar="RULES",
        help="Drop what these rules of datatrove drop, in order: gopher-repetition,gopher-quality,"
        "c4,fineweb-quality.",
    ),
]
Languages = Annotated[
    str | None,
    typer.Option("--language", metavar="CODES", help="Keep only these languages: en,zh."),
]
LanguageMin = Annotated[
    float | None,
    typer.Option(
        help="How sure of the language to be.",
        show_default="0.65",
    ),
]
MaskPii = Annotated[
    bool, typer.Option("--mask-pii", help="Mask e-mail and IP addresses, phone and card numbers.")
]
Dedup = Annotated[
    Literal["off", "exact", "near"],
    typer.Option(help="Keep the first of equal, or of nearly equal documents."),
]
Decontaminate = Annotated[
    list[Path] | None,
    typer.Option(
        help="Evaluation file (text, .jsonl, .csv): drop documents that share 13 words in a row "
        "with it; repeatable.",
        **PATH,
    ),
]
Shuffle = Annotated[
    bool, typer.Option("--shuffle", help="Store documents in a random order over the whole input.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes; 0 uses every core.")]
Stage = Annotated[
    str | None,
    typer.Option(
        help="Do one stage alone, for a job array (slurm/prepare.sbatch): plan, read, clean, "
        "dedup, drop, scatter, shuffle, survey, tokenizer, encode, commit. Each needs the one "
        "before; those that are off do nothing."
    ),
]
TaskOf = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="i/N",
        help="Do share i of N of the stage, counted from 0: 0/64 ... 63/64. N may differ from "
        "stage to stage; the bytes of the dataset depend on neither.",
        show_default="0/1, all of it",
    ),
]

Full = Annotated[bool, typer.Option("--full", help="Also hash every shard as a whole.")]
DatasetOrRun = Annotated[
    Any,
    typer.Argument(
        metavar="[DATASET]", help="Directory or URL; a run or recipe may name it.", parser=_dataset
    ),
]
Step = Annotated[
    int | None, typer.Option(min=1, help="Its samples: optimizer step, counted from 1.")
]
Sample = Annotated[int | None, typer.Option(min=0, help="Its documents: sample, counted from 0.")]
DocumentName = Annotated[
    str | None,
    typer.Option(metavar="SHARD:NUMBER", help="Its samples and steps, as --step names it."),
]
StepRecipe = Annotated[str, typer.Option("--recipe", help="Gives seed, seq_len, batch_tokens.")]
StepRun = Annotated[
    Path | None,
    typer.Option("--run", help="A run gives them, and its own data_hash is compared.", **FOLDER),
]

StatsRun = Annotated[
    Path | None,
    typer.Option("--run", help="A run gives seq_len and seed; its epochs are shown.", **FOLDER),
]
SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", min=1, help="Tokens per sample.", show_default="the run's, or 2048"),
]

PackedLen = Annotated[
    int, typer.Option("--seq-len", min=1, help="Tokens per sample, as in the recipe.")
]

Tars = Annotated[
    list[Path],
    typer.Argument(metavar="TAR...", help="Tars of KEY.npy or KEY.bin arrays."),
]
TheirTokenizer = Annotated[
    Path,
    typer.Option("--tokenizer", help="The tokenizer.model or .json of the tokens.", **PATH),
]
RawType = Annotated[
    str | None, typer.Option("--dtype", help="Type of .bin members: <u1 <u2 <u4 <i4 <i8.")
]
ValShare = Annotated[
    float, typer.Option("--val-fraction", help="Share of the documents that is held out.")
]
SourceName = Annotated[str, typer.Option("--source", help="Name of the source in the dataset.")]

RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Run directory of `headrace pretrain`.", parser=_folder),
]
Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="Run directories.", parser=_folder),
]
Watch = Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")]
OtherRun = Annotated[
    Path | None,
    typer.Argument(metavar="[OTHER]", help="Another run; the same by default.", parser=_folder),
]
OutArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to write.", parser=_folder)
]
ReplayStep = Annotated[int, typer.Option("--step", min=1, help="Optimizer step, from 1.")]
CheckpointStep = Annotated[
    int | None, typer.Option("--step", min=1, help="Checkpoint; the newest by default.")
]
WeightType = Annotated[Literal["fp32", "bf16"], typer.Option(help="Type of the weights.")]
EvaluationData = Annotated[
    Path,
    typer.Option(
        "--data", help="Dataset (its validation split), text, .jsonl or .csv file.", **PATH
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column of the text.")]
LabelColumn = Annotated[str, typer.Option(help="Column of the label.")]
Split = Annotated[
    Literal["all", "train", "val"], typer.Option(help="Classifier: which examples of the file.")
]
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens to add at most.", show_default="what fits, up to 128"),
]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
Seed = Annotated[int, typer.Option(min=0, help="Makes the sample repeatable.")]

Nodes = Annotated[int, typer.Option(min=1, help="Machines.")]
GpusPerNode = Annotated[int, typer.Option(min=1, help="GPUs in each machine.")]
GpuName = Annotated[str, typer.Option(help="a100, h100 or h200.")]
Fit = Annotated[
    bool, typer.Option("--fit", help="Choose the fastest layout that fits, and print its keys.")
]
Mfu = Annotated[
    float | None,
    typer.Option(
        min=0.01, max=1, help="Share of the peak FLOP/s, in place of the predicted time of a step."
    ),
]
NodeMtbf = Annotated[
    float | None,
    typer.Option(min=0.01, help="Hours between failures of one node; default: 50,000 / its GPUs."),
]
WriteRate = Annotated[
    float, typer.Option(min=0.001, help="GB/s that one node writes to the disk of checkpoints.")
]
Explain = Annotated[bool, typer.Option("--explain", help="Show every formula.")]
Workdir = Annotated[Path, typer.Option(help="Where everything is written.", **FOLDER)]
