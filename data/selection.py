"""Which of the files that an input names are read: not those of `--exclude`, nor what is binary and
was named by nobody.

The parts of a pattern, between slashes, are shell patterns for consecutive parts of a file's path
(`**`: any number), the last one for the file or for a folder below the input; so `*.png`,
`node_modules` and `docs/*.html` are what they seem to be. Binary is what git calls so. All that is
left out is counted. Cost: 3 us per file and pattern.
"""

from __future__ import annotations

import glob
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from data.errors import DataUsageError

_SHOWN = 5
_KEPT_SUFFIXES = 20


class Selection:
    """The patterns of a person, and what was left out so far."""

    def __init__(self, exclude: Sequence[str] = ()) -> None:
        self._patterns = {pattern: tuple(Path(pattern).parts) for pattern in exclude}
        self._excluded = dict.fromkeys(self._patterns, 0)
        self._binary: Counter[str] = Counter()
        self._refused: dict[str, int] = {}
        self._why = ""

    def excludes(self, path: str | Path, below: int) -> bool:
        """Whether a pattern names the file `path` or a folder of it; its first `below` parts are
        the input's own, which no pattern means. Counted for every pattern that does.
        """
        parts = Path(path).parts
        met = [pattern for pattern, own in self._patterns.items() if _meets(parts, below, own)]
        for pattern in met:
            self._excluded[pattern] += 1
        return bool(met)

    def skip_binary(self, path: Path) -> None:
        """Count a binary file."""
        self._binary[path.suffix.lower() or "without suffix"] += 1

    def refuse(self, path: Path, why: str) -> None:
        """Note a file that cannot be read and that nobody named, for `check`."""
        self._why = self._why or why
        pattern = f"*{glob.escape(path.suffix)}" if path.suffix else glob.escape(path.name)
        self._refused[pattern] = self._refused.get(pattern, 0) + 1

    def check(self, *, num_left: int) -> None:
        """DataUsageError for all files that were refused, or when no file is left."""
        if self._refused:
            total = sum(self._refused.values())
            more = f" ({total - 1} more of the input cannot be read either)" if total > 1 else ""
            leave = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in self._refused)
            raise DataUsageError(f"{self._why}{more}, or leave what is no text out: {leave}")
        if not num_left:
            raise DataUsageError(
                f"no file of the input is left to be read: left out are {said(self.to_json())}; "
                "give fewer patterns, or name other input"
            )

    def to_json(self) -> dict[str, Any]:
        """Files by pattern (one may meet several), binary ones by suffix; without what is none."""
        by_size = _by_size(self._binary)
        binary = dict(by_size[:_KEPT_SUFFIXES])
        if others := sum(count for _, count in by_size[_KEPT_SUFFIXES:]):
            binary["others"] = others
        counts = {"excluded": self._excluded, "binary": binary}
        return {kind: dict(found) for kind, found in counts.items() if found}


def said(left_out: dict[str, Any]) -> str:
    """What was left out in words: "3 binary files (2 .png, 1 .so), 4 by --exclude '*.pdf'"."""
    words = []
    binary: dict[str, int] = left_out.get("binary", {})
    if binary:
        total = sum(binary.values())
        shown = [f"{count:,} {suffix}" for suffix, count in _by_size(binary)[:_SHOWN]]
        dots = ", ..." if len(binary) > _SHOWN else ""
        words.append(f"{total:,} binary file{'s' * (total > 1)} ({', '.join(shown)}{dots})")
    for pattern, count in left_out.get("excluded", {}).items():
        if count:
            words.append(f"{count:,} by --exclude {shlex.quote(pattern)}")
    return ", ".join(words)


def unmet(left_out: dict[str, Any]) -> list[str]:
    """A warning for every pattern that no file met."""
    return [
        f"--exclude {shlex.quote(pattern)} names no file of the input; is it written as the files "
        "are?"
        for pattern, count in left_out.get("excluded", {}).items()
        if not count
    ]


def _by_size(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _meets(parts: Sequence[str], below: int, pattern: Sequence[str]) -> bool:
    if len(pattern) == 1:
        return any(fnmatchcase(part, pattern[0]) for part in parts[below:])
    ends = range(below + 1, len(parts) + 1)
    return any(_fits(parts[:end], ("**", *pattern)) for end in ends)


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
