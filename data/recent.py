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

    def find(self, key: Key) -> Value | None:
        """The value of a key, if it was used lately."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> None:
        """The value of a key from now on."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._limit:
            self._forget()

    def forget(self, key: Key) -> None:
        """Let go of the value of a key, if it is there."""
        value = self._values.pop(key, None)
        if value is not None and self._drop is not None:
            self._drop(value)

    def __del__(self) -> None:
        while self._values:
            self._forget()

    def _forget(self) -> None:
        _, value = self._values.popitem(last=False)
        if self._drop is not None:
            self._drop(value)
