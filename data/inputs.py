"""From what a person names to files: paths, folders, patterns, lists, URLs, standard input and the
output of commands.

Nothing is read here but lists, the first bytes of files, and what comes from elsewhere: that is
kept whole in a folder first, so that everything after can be repeated.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from data import remote
from data.commands import run, split_input
from data.compressed import kind_by_content
from data.config import COMMAND, DataUsageError
from data.documents import BINARY_BYTES, COMPRESSIONS, InputFile, is_binary
from data.drafts import draft
from data.durable import write_stream
from data.selection import Selection, said
from data.stamps import Stamp

log = logging.getLogger(__name__)

MAY_HOLD_TEXT = frozenset(
    {".lz4", ".zip", ".7z", ".arrow", ".rar", ".br", ".z", ".tbz2", ".txz", ".pdf", ".docx"}
)
"""What cannot be read, but is never left out unasked: there may be text in it."""
UNREADABLE_SUFFIXES = MAY_HOLD_TEXT | {
    *(".npy", ".npz", ".bin", ".safetensors", ".png", ".jpg", ".jpeg"),
}
_BINARY_KINDS = ("zip", "7z", "pdf")
"""By their first bytes, under a suffix that says something else, as .jar and .whl do."""
_STDIN = "-"

Found = tuple[Path, str, bool]
"""A file, its display name, and whether its suffix was written by a person."""


def find_files(
    inputs: Sequence[str], keep: Path | None = None, *, selection: Selection | None = None
) -> list[InputFile]:
    """Every file that the inputs name, in a fixed order: inputs as given, folders by sorted path.

    What comes from a URL or standard input is kept in the folder `keep`, where nobody else may
    write. Hidden files and folders inside a folder are left out, and what `selection` excludes;
    binary files that nobody named are counted there, or told in the log. Raises DataUsageError for
    an input that is empty or does not exist, a pattern without a match, an empty folder, a file
    that is named twice, and kinds of file that cannot be read.
    """
    chosen = Selection() if selection is None else selection
    if not inputs:
        raise DataUsageError("no input given; name files, folders or patterns: --input PATH...")
    files: list[InputFile] = []
    seen: dict[Path, Path] = {}
    for named in inputs:
        if not named.strip():
            raise DataUsageError(
                f"--input {named!r} names nothing, as when a variable is not set; write . for "
                "the current folder"
            )
        for path, name, is_named in _named(named, keep, chosen):
            stat = path.stat()
            # Of one look: what grows later is not what was found.
            stamp = Stamp(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            file = InputFile(path, name, stat.st_size, is_named, stamp)
            if not _is_read(file, chosen):
                continue
            real = path.resolve()
            if real in seen:
                raise DataUsageError(
                    f"--input {named} names {path}, which is the same file as {seen[real]}; its "
                    "text would count twice: name it once, or leave one out with --exclude"
                )
            seen[real] = path
            files.append(file)
    chosen.check(num_left=len(files))
    if selection is None and (left_out := chosen.to_json()):
        log.warning("left out of the input: %s", said(left_out))
    return files


def _named(named: str, keep: Path | None, chosen: Selection) -> Iterator[Found]:
    """The files of one input."""
    if named.startswith("@") and not Path(named).exists():
        yield from _listed(Path(named[1:]), keep, chosen)
    elif named == _STDIN or named.startswith(f"{_STDIN}."):
        path = _spool_stdin(named, _folder(named, keep))
        yield path, path.name, True
    elif named.startswith(COMMAND):
        path = _spool_command(named, _folder(named, keep))
        yield path, path.name, True
    elif "://" in named:
        for path in remote.fetch(named, _folder(named, keep), chosen.excludes):
            yield path, path.name, True
    else:
        yield from _expand(named, chosen)


def _folder(named: str, keep: Path | None) -> Path:
    if keep is None:
        raise DataUsageError(f"--input {named}: only a file on this machine can be read here")
    return keep


def _listed(path: Path, keep: Path | None, chosen: Selection) -> Iterator[Found]:
    """The files of a list: a path, pattern or URL per line, relative to the list's folder."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataUsageError(f"--input @{path}: the list cannot be read: {reason}") from None
    count = 0
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        count += 1
        if entry.startswith(("@", _STDIN, COMMAND)):
            raise DataUsageError(
                f"{path}:{number}: {entry} is not a path, pattern or URL; a list names no other "
                "list, no command, and not standard input (write ./ before a name that begins so)"
            )
        try:
            name = entry if "://" in entry else str(path.parent / entry)
            yield from _named(name, keep, chosen)
        except DataUsageError as error:
            raise DataUsageError(f"{path}:{number}: {error}") from None
    if not count:
        raise DataUsageError(f"--input @{path}: the list names no file")


def _spool_stdin(named: str, folder: Path) -> Path:
    """Standard input as a file; its suffix is what follows the dash, as in -.jsonl.gz."""
    if sys.stdin is None or sys.stdin.isatty():
        raise DataUsageError(f"--input {named} reads standard input, where nothing is piped in")
    stream = sys.stdin.buffer
    block = stream.read(2**20)
    if not block:
        raise DataUsageError(f"--input {named}: standard input is empty; did the command fail?")
    if named == _STDIN:
        _check_plain(block)
    path = folder / f"stdin{named[1:] or '.txt'}"
    return _spool(chain([block], iter(lambda: stream.read(2**20), b"")), path)


def _spool_command(named: str, folder: Path) -> Path:
    """What a command writes as a file, when it has ended well; its suffix as in pipe:.jsonl:CMD."""
    suffix, words = split_input(named)
    key = hashlib.blake2b(named.encode(), digest_size=8).hexdigest()
    pieces = run(words)
    first = next(pieces, b"")
    if not first:
        raise DataUsageError(f"--input {named}: the command wrote nothing")
    return _spool(chain([first], pieces), folder / f"pipe-{key}{suffix}")


def _spool(pieces: Iterable[bytes], path: Path) -> Path:
    """A stream as a file, which has its name when it is whole."""
    with draft(path, path.parent) as temporary:
        write_stream(temporary, pieces)
    return path


def _check_plain(head: bytes) -> None:
    """A bare dash is one text: refuse what is plainly something else."""
    kind = kind_by_content(head)
    if kind is not None:
        raise DataUsageError(
            f"--input -: standard input is {kind}, not text; say what it is by a suffix, such as "
            "--input -.jsonl.gz or -.parquet"
        )
    try:
        is_object = isinstance(json.loads(head.partition(b"\n")[0]), dict)
    except (ValueError, RecursionError):
        is_object = False
    if is_object:
        raise DataUsageError(
            "--input -: standard input looks like JSON lines; write --input -.jsonl to read its "
            "text field, or --input -.txt to take it as one text"
        )


def _expand(named: str, chosen: Selection) -> list[Found]:
    """The files of one path or pattern that are not excluded."""
    path = Path(named)
    if path.is_dir():
        return _walk(path, chosen)
    if path.exists():
        is_left = not chosen.excludes(path, below=len(path.parts) - 1)
        return [(path, path.name, True)] * is_left
    if not glob.has_magic(named):
        raise DataUsageError(f"--input {named}: no such file or folder (looked in {Path.cwd()})")
    matches = [Path(match) for match in sorted(glob.glob(named, recursive=True))]
    has_files = any(match.is_file() for match in matches)
    below = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
    found: list[Found] = []
    num_excluded = 0
    for match in matches:
        if match.is_file():
            if chosen.excludes(match, below):
                num_excluded += 1
                continue
            is_named = bool(match.suffix) and named.endswith(match.suffix)
            found.append((match, match.name, is_named))
        elif match.is_dir() and not has_files:
            found += _walk(match, chosen, below)
        elif match.is_dir() and "**" not in named:
            # As when the shell had named them; ** has named what is in them already.
            found += _walk(match, chosen, below, may_be_empty=True)
    if not found and not num_excluded:
        raise DataUsageError(f"--input {named}: no file matches this pattern")
    return found


def _walk(
    folder: Path, chosen: Selection, below: int | None = None, *, may_be_empty: bool = False
) -> list[Found]:
    """Files below `folder` that are not excluded, sorted by relative path; linked folders are
    followed once. The first `below` parts of a path are those that a person wrote.
    """
    below = len(folder.parts) if below is None else below
    found: list[tuple[str, Path]] = []
    visited: set[str] = set()
    num_excluded = 0

    def refuse(error: OSError) -> None:
        if not chosen.excludes(error.filename, below):
            raise DataUsageError(f"{error.filename} cannot be listed: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(root, name)
            if name.startswith("."):
                continue
            if chosen.excludes(path, below):
                num_excluded += 1
                continue
            if not path.exists():
                raise DataUsageError(
                    f"{path} is a link to nothing; mend or remove it, or name the files beside it"
                )
            found.append((path.relative_to(folder).as_posix(), path))
    if not found and not num_excluded and not may_be_empty:
        raise DataUsageError(f"--input {folder}: the folder holds no files")
    top = folder.resolve().name
    return [(path, f"{top}/{relative}", False) for relative, path in sorted(found)]


def _is_read(file: InputFile, chosen: Selection) -> bool:
    """Whether a file is text for all that its name and first bytes tell. DataUsageError for one of
    a kind that cannot be read; if nobody named it, `chosen` takes note of it instead.
    """
    path = file.path
    if not path.is_file():
        raise DataUsageError(f"{path} is not a regular file; write its text to a file first")
    suffixes = [path.suffix.lower()]
    if suffixes[0] in COMPRESSIONS:
        suffixes.append(path.with_suffix("").suffix.lower())
    for suffix in suffixes:
        if suffix in (UNREADABLE_SUFFIXES if file.is_named else MAY_HOLD_TEXT):
            return _refuse(
                file,
                f"{path}: files ending in {suffix} cannot be read; "
                "unpack or convert it to plain text or .jsonl first",
                chosen,
            )
    if not os.access(path, os.R_OK):
        raise DataUsageError(f"{path} cannot be read: permission denied")
    if file.compression is not None or file.format in ("parquet", "tar"):
        return True
    with path.open("rb") as stream:
        head = stream.read(BINARY_BYTES)
    kind = kind_by_content(head[:512])
    if not file.is_named and (kind in _BINARY_KINDS or (kind is None and is_binary(file, head))):
        chosen.skip_binary(path)
        return False
    if kind is not None:
        return _refuse(
            file,
            f"{path} is {kind} by its first bytes, although its name does not end so; rename it so "
            "that its last suffix says what it is, or unpack it",
            chosen,
        )
    return True


def _refuse(file: InputFile, why: str, chosen: Selection) -> bool:
    if file.is_named:
        raise DataUsageError(why)
    chosen.refuse(file.path, why)
    return False
