"""Values that take seconds to make: made once per key, in a thread, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Once(Generic[K, V]):
    """`await once(key)` gives `make(key)`, however many ask at the same time. Used on one event loop.

    A caller that gives up does not stop the making, and a failure is not kept: the next caller tries again.
    """

    def __init__(self, make: Callable[[K], V]) -> None:
        self._make = make
        self._tasks: dict[K, asyncio.Task[V]] = {}

    async def __call__(self, key: K) -> V:
        task = self._tasks.get(key)
        if task is not None and task.done():
            if not task.cancelled() and task.exception() is None:
                return task.result()
            task = None
        if task is None:
            task = self._tasks[key] = asyncio.ensure_future(asyncio.to_thread(self._make, key))
        return await asyncio.shield(task)
