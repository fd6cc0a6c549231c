"""What every background loop does about a turn that fails: count it by kind, log each kind once a minute, wait, go on.

    guard = LoopGuard("kvcache: receipts are not kept", Backoff(0.5, 8.0), logger)
    while not stop.is_set():
        try:
            turn()
            guard.went_well()
        except Exception as error:
            stop.wait(guard.failed(error))

Waits grow, up to a limit, and differ by a fifth at random: what fails for all at once is not tried again by all at once
("Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

FIRST_S = 1.0
LONGEST_S = 30.0
STEADY_S = 60.0  # what ran for so long was well: the next wait is short again
SAY_AGAIN_S = 60.0
_JITTER = 0.2


class Backoff:
    """Seconds to wait before the next attempt: twice as many each time, up to a limit, and a fifth more or less."""

    def __init__(
        self,
        first_s: float = FIRST_S,
        longest_s: float = LONGEST_S,
        steady_s: float = STEADY_S,
        jitter: float = _JITTER,
    ) -> None:
        self._first_s, self._longest_s, self._steady_s = first_s, longest_s, steady_s
        self._jitter = jitter
        self._next_s = first_s

    def after(self, ran_s: float = 0.0) -> float:
        """The wait after an attempt that ended after `ran_s`."""
        wait_s = self._first_s if ran_s >= self._steady_s else self._next_s
        self._next_s = min(2 * wait_s, self._longest_s)
        return wait_s * random.uniform(1 - self._jitter, 1 + self._jitter)  # no secret

    def reset(self) -> None:
        self._next_s = self._first_s


class ErrorLog:
    """Counts errors by kind, and logs each kind once a minute, with where it was.

    Args:
        consequence: what did not happen; the log line begins with it.
        logger: of the caller.
        counters: where errors are counted, as `errors` and as `error_<class>`; None: its own.
    """

    def __init__(self, consequence: str, logger: logging.Logger, counters: Counter[str] | None = None) -> None:
        self._consequence = consequence
        self._logger = logger
        self.counters: Counter[str] = Counter() if counters is None else counters
        self._said_at_s: dict[str, float] = {}

    def failed(self, error: Exception, then: str = "") -> None:
        """Args: then: what follows, for the log."""
        kind = type(error).__name__
        self.counters["errors"] += 1
        self.counters[f"error_{kind}"] += 1
        now_s = time.monotonic()
        if now_s - self._said_at_s.get(kind, float("-inf")) >= SAY_AGAIN_S:
            self._said_at_s[kind] = now_s
            count = self.counters[f"error_{kind}"]
            self._logger.error("%s (%s, %d so far)%s", self._consequence, kind, count, then, exc_info=error)


class LoopGuard:
    """Of one loop, used by its thread or task alone.

    Args:
        consequence: what does not happen while turns fail.
        backoff: of the waits.
        logger: of the loop.
        counters: see ErrorLog.
    """

    def __init__(
        self, consequence: str, backoff: Backoff, logger: logging.Logger, counters: Counter[str] | None = None
    ) -> None:
        self._errors = ErrorLog(consequence, logger, counters)
        self._backoff = backoff

    @property
    def counters(self) -> Counter[str]:
        return self._errors.counters

    def failed(self, error: Exception) -> float:
        """Count and log it. Returns the seconds to wait before the next turn."""
        wait_s = self._backoff.after()
        self._errors.failed(error, f"; again in {wait_s:.1f} s")
        return wait_s

    def went_well(self) -> None:
        self._backoff.reset()


async def keep_running(run: Callable[[], Awaitable[None]], backoff: Backoff, what: str, logger: logging.Logger) -> None:
    """Run it again whenever it ends, however it does, until cancelled.

    Args:
        run: what is to run for ever.
        backoff: of the waits.
        what: its name, for the log.
        logger: of the caller.
    """
    while True:
        started_s = time.monotonic()
        try:
            await run()
        except Exception:
            logger.exception("kvcache: %s cannot be run", what)
        wait_s = backoff.after(time.monotonic() - started_s)
        logger.warning("kvcache: %s is started again in %.0f s", what, wait_s)
        await asyncio.sleep(wait_s)
