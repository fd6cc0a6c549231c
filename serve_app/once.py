"""Values that take seconds to make: made once per key, in a thread, off the event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

KEPT_MAX = 8  # tokenizers, of which each takes some 100 MB; keys come from records that anybody in Redis may write
RETRY_S = 30.0  # what failed would fail again, after seconds of work that others need


class Once(Generic[K, V]):
    """`await once(key)` gives `make(key)`, however many ask at the same time. Used on one event loop.

    A caller that gives up does not stop the making. A failure is kept for `retry_s`; who asks later tries again. The
    last `kept_max` that were asked for are kept.
    """

    def __init__(self, make: Callable[[K], V], retry_s: float = RETRY_S, kept_max: int = KEPT_MAX) -> None:
        self._make = make
        self._kept_max = kept_max
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
        task = self._tasks.pop(key)
        self._tasks[key] = task  # the last one asked for
        if len(self._tasks) > self._kept_max:
            self._forget_oldest()
        return task

    def _forget_oldest(self) -> None:
        """Of those that are made; what is being made somebody waits for."""
        oldest = next((key for key, task in self._tasks.items() if task.done()), None)
        if oldest is not None:
            del self._tasks[oldest]
            self._retry_at_s.pop(oldest, None)

    def _done(self, key: K, task: asyncio.Task[V]) -> None:
        if self._tasks.get(key) is not task:
            return
        if task.cancelled():
            self._retry_at_s[key] = -math.inf
        elif task.exception() is not None:
            self._retry_at_s[key] = time.monotonic() + self._retry_s
