"""A cache that forgets what was used longest ago."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """The state of a cache.

    Attributes:
        hits: look-ups that found something.
        misses: look-ups that did not.
        entries: what it holds now.
        weight: sum of the weights of its entries.
        capacity: the most that sum may be.
    """

    hits: int
    misses: int
    entries: int
    weight: int
    capacity: int


class LruCache(Generic[Key, Value]):
    """Holds values up to a total weight; safe to share by threads.

    Args:
        capacity: the most weight to hold; 0 switches the cache off.
        weigh: weight of a value, 1 each if not given.
    """

    def __init__(self, capacity: int, *, weigh: Callable[[Value], int] = lambda _: 1) -> None:
        self._capacity = capacity
        self._weigh = weigh
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._weight = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """The value of that key, or None."""
        with self._lock:
            value = self._values.get(key)
            if value is None:
                self._misses += 1
                return None
            self._hits += 1
            self._values.move_to_end(key)
            return value

    def put(self, key: Key, value: Value) -> None:
        """Store a value, forgetting others; one heavier than the capacity is not stored."""
        weight = self._weigh(value)
        with self._lock:
            self._remove(key)
            if weight > self._capacity:
                return
            self._values[key] = value
            self._weight += weight
            while self._weight > self._capacity:
                self._remove(next(iter(self._values)))

    def clear(self) -> None:
        """Forget all values; the counts stay."""
        with self._lock:
            self._values.clear()
            self._weight = 0

    def stats(self) -> CacheStats:
        """Counts and fill."""
        with self._lock:
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                entries=len(self._values),
                weight=self._weight,
                capacity=self._capacity,
            )

    def _remove(self, key: Key) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self._weight -= self._weigh(value)
