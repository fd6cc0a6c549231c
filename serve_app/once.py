"""Values that take seconds to make: made once per key, in a thread, off the event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

RETRY_S = 30.0  # what failed would fail again, after seconds of work that others need


class Once(Generic[K, V]):
    """`await once(key)` gives `make(key)`, however many ask at the same time. Used on one event loop.

    A caller that gives up does not stop the making. A failure is kept for `retry_s`; who asks later tries again.
    """

    def __init__(self, make: Callable[[K], V], retry_s: float = RETRY_S) -> None:
        self._make = make
        self._retry_s = retry_s
        self._tasks: dict[K, asyncio.Task[V]] = {}
        self._retry_at_s: dict[K, float] = {}  # of those that failed

    async def __call__(self, key: K) -> V:
        return await asyncio.shield(self.start(key))

    def start(self, key: K) -> asyncio.Task[V]:
        """The making of `key`, begun if need be; for who does not want to wait. Do not cancel it."""
        if key not in self._tasks or time.monotonic() >= self._retry_at_s.get(key, math.inf):
            self._retry_at_s.pop(key, None)
            self._tasks[key] = asyncio.ensure_future(asyncio.to_thread(self._make, key))
            self._tasks[key].add_done_callback(lambda task: self._done(key, task))
        return self._tasks[key]

    def _done(self, key: K, task: asyncio.Task[V]) -> None:
        if task.cancelled():
            self._retry_at_s[key] = -math.inf
        elif task.exception() is not None:
            self._retry_at_s[key] = time.monotonic() + self._retry_s
