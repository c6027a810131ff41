"""Document ids inside a shard: one line of UTF-8 for each document of a chunk, in a member of its
own (KEY.ids.txt), so that a training step leads back to the page or file that it came from.

What would break a line or is no character, and the backslash, is written as \\uXXXX, so every id
comes back exactly. Cost: its bytes and one more for each document, and 512 to 1,023 for each
chunk, which is checked whole when one of its ids is asked for; training never reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_UNPRINTED = re.compile("[\\\\\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u([0-9a-f]{4})")


def lines_of(names: Iterable[str]) -> bytes:
    """The member for these ids."""
    escaped = (_UNPRINTED.sub(lambda match: f"\\u{ord(match[0]):04x}", name) for name in names)
    return "".join(f"{name}\n" for name in escaped).encode()


def names_of(lines: bytes) -> list[str]:
    """The ids of a member."""
    raw = lines.decode().split("\n")[:-1]
    return [_ESCAPED.sub(lambda match: chr(int(match[1], 16)), line) for line in raw]
