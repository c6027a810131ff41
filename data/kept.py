"""Checked chunks that stay in memory: those used last, of all the sources of a process together.

Limit: three quarters of a window of the default order, so a reader alone reads one sample in four
a second time, and all others once. Memory: 192 MiB of tokens of two bytes, 384 MiB of four. Copies
sent to another process arrive empty there, and as one object where they were one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from numpy.typing import NDArray

from data.order import WINDOW_TOKENS

KEPT_TOKENS = WINDOW_TOKENS // 4 * 3


class KeptChunks:
    """The chunks used last, by key, KEPT_TOKENS of them at most."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[Hashable, NDArray[Any]] = OrderedDict()
        self.tokens = 0
        """That are held now."""

    def get(self, key: Hashable) -> NDArray[Any] | None:
        """The chunk of a key; None when it is not held."""
        chunk = self._chunks.get(key)
        if chunk is not None:
            self._chunks.move_to_end(key)
        return chunk

    def add(self, key: Hashable, chunk: NDArray[Any]) -> None:
        """Hold a chunk that is not held, and let go of those that were used longest ago."""
        self._chunks[key] = chunk
        self.tokens += chunk.size
        while self.tokens > KEPT_TOKENS:
            self.tokens -= self._chunks.popitem(last=False)[1].size

    def __reduce__(self) -> tuple[type[KeptChunks], tuple[()]]:
        return KeptChunks, ()
