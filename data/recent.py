"""The values used last, by key: a bound on open files and parsed indexes, whatever the data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The values used last, made on demand and let go when there are too many."""

    def __init__(self, limit: int, *, drop: Callable[[Value], None] | None = None) -> None:
        self._limit = limit
        self._drop = drop
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[Key], Value]) -> Value:
        """The value of a key, made by `make` unless it was used lately."""
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = make(key)
            if len(self._values) > self._limit:
                self._forget()
        self._values.move_to_end(key)
        return value

    def __del__(self) -> None:
        while self._values:
            self._forget()

    def _forget(self) -> None:
        _, value = self._values.popitem(last=False)
        if self._drop is not None:
            self._drop(value)
