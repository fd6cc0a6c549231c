"""What keeps a publisher running: how long to wait before the next attempt, and the loop around the attempts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

logger = logging.getLogger("ray.serve")

FIRST_S = 1.0
LONGEST_S = 30.0
STEADY_S = 60.0  # what ran for so long was well: the next wait is short again


class Backoff:
    """Seconds to wait before the next attempt: twice as many each time, up to a limit."""

    def __init__(self, first_s: float = FIRST_S, longest_s: float = LONGEST_S, steady_s: float = STEADY_S) -> None:
        self._first_s, self._longest_s, self._steady_s = first_s, longest_s, steady_s
        self._next_s = first_s

    def after(self, ran_s: float) -> float:
        """The wait after an attempt that ended after `ran_s`."""
        wait_s = self._first_s if ran_s >= self._steady_s else self._next_s
        self._next_s = min(2 * wait_s, self._longest_s)
        return wait_s


async def keep_running(run: Callable[[], Awaitable[None]], backoff: Backoff) -> None:
    """Run it again whenever it ends, however it does, until cancelled."""
    while True:
        started_s = time.monotonic()
        try:
            await run()
        except Exception:
            logger.exception("kvcache: no publisher can be run, so nobody learns what this replica holds")
        wait_s = backoff.after(time.monotonic() - started_s)
        logger.warning("kvcache: a publisher is started again in %.0f s", wait_s)
        await asyncio.sleep(wait_s)
