"""A batch script of slurm/ with its settings filled in.

Each of these scripts can be submitted by hand. Filling one in replaces its #SBATCH lines and the
block where it reads its arguments, so that what runs is what a person can read. Whatever comes from
a command line or a file is quoted, and refused where a quote cannot hold it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

FOLDER = Path(__file__).resolve().parent.parent / "slurm"
BEGIN, END = "# filled in by `headrace submit` from here\n", "# to here\n"
SHORT_OPTIONS = {
    "J": "job-name", "N": "nodes", "t": "time", "o": "output", "D": "chdir", "G": "gpus",
    "n": "ntasks", "p": "partition", "A": "account", "q": "qos", "a": "array",
}  # fmt: skip
"""One-letter sbatch options -> the long ones, as far as the script has a say in them."""
OURS = {
    "nodes": "write --nodes",
    "gpus-per-node": "write --gpus-per-node",
    "gpus": "write --nodes and --gpus-per-node",
    "time": "write --time",
    "signal": "write --lead",
    "job-name": "write --run, whose last part names the job",
    "output": "the logs of a job lie in RUN/logs",
    "chdir": "the job runs where it is submitted",
    "ntasks": "one torchrun per node starts the ranks",
    "ntasks-per-node": "one torchrun per node starts the ranks",
    "array": "one job goes on until all is done",
}
"""sbatch options that headrace sets by itself -> what to do instead."""


class SlurmError(ValueError):
    """A job that cannot be rendered or that Slurm refused."""

    exit_code: ClassVar[int] = 1


class SlurmUsageError(SlurmError):
    """A job that nobody can run as it was asked for."""

    exit_code: ClassVar[int] = 2


def fill(
    name: str,
    directives: Mapping[str, str | None],
    lines: Sequence[str],
    *,
    options: Sequence[str] = (),
) -> str:
    """The script slurm/NAME with these #SBATCH settings and these lines as its block.

    A directive of None leaves the template's line out; one that the template does not have is
    added. `options` are further sbatch options, as they were written; they win over `directives`
    that the template does not have.
    """
    script = read(name)
    check_options(options, name)
    refuse_control_characters([*filter(None, directives.values()), *lines, *options])
    written = {option_name(option) for option in options}
    added = []
    for option, value in directives.items():
        pattern = re.compile(rf"^#SBATCH --{option}(=.*)?\n", re.MULTILINE)
        line = "" if value is None else f"#SBATCH --{option}={shlex.quote(value)}\n"
        if pattern.search(script):
            script = pattern.sub(lambda _, line=line: line, script)  # type: ignore[misc]
        elif option not in written:
            added.append(line)
    added += [f"#SBATCH {option}\n" for option in options]
    script = script.replace("\n#SBATCH --output=", "\n" + "".join(added) + "#SBATCH --output=", 1)
    head, rest = script.split(BEGIN)
    return head + BEGIN + "".join(f"{line}\n" for line in lines) + END + rest.split(END, 1)[1]


def check_options(options: Sequence[str], name: str) -> None:
    """SlurmUsageError for an sbatch option that is none, or that slurm/NAME sets by itself."""
    for option in options:
        if not _is_one_option(option):
            raise SlurmUsageError(
                f"--sbatch {option!r} is no sbatch option; write one with its dashes, "
                "such as --sbatch=--partition=batch"
            )
        found = option_name(option)
        if found in OURS or found in set(re.findall(r"^#SBATCH --([a-z-]+)", read(name), re.M)):
            raise SlurmUsageError(
                f"--sbatch={option}: the script sets --{found} itself; leave it out"
                + (f": {OURS[found]}" if found in OURS else f", or edit {FOLDER / name}")
            )


def _is_one_option(option: str) -> bool:
    """Not two of them, of which the second would go unseen."""
    try:
        name, *values = shlex.split(option)
    except ValueError:
        return False
    is_named = re.match(r"--[a-z]|-[A-Za-z]", name) is not None
    return is_named and "\n" not in option and not any(value.startswith("-") for value in values)


def option_name(option: str) -> str:
    """The long name of an sbatch option as it was written: --nodes=5, --nodes 5, -N5, -N 5."""
    if option.startswith("--"):
        return re.split(r"[=\s]", option[2:], maxsplit=1)[0]
    return SHORT_OPTIONS.get(option[1:2], option[1:2])


def refuse_control_characters(values: Sequence[str]) -> None:
    """SlurmUsageError for text that would not stay on its line of a script."""
    for value in values:
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise SlurmUsageError(
                f"{value!r} is not UTF-8, which a batch script is; choose another name"
            )
        if any(ord(character) < 32 or ord(character) == 127 for character in value):
            raise SlurmUsageError(
                f"{value!r} holds a line break or another control character; a batch script keeps "
                "each setting on one line: choose another value"
            )


def filename_pattern(path: Path | str) -> str:
    """A path for sbatch's --output, in which % stands for itself."""
    return str(path).replace("%", "%%")


def read(name: str) -> str:
    """The text of a template. SlurmError where the clone with slurm/ is not there."""
    try:
        return (FOLDER / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SlurmError(
            f"no template at {FOLDER / name}; headrace runs from its clone: "
            "install it there with `pip install -e .`"
        ) from None
