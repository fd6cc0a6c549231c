"""How late an event loop is, and what holds it.

A thread asks the loop for a sign ten times a second. Its answer is late by as long as something else had the loop; when
that is longer than `HELD_S`, the loop's thread is looked at, and the log says where it is.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from types import FrameType

PERIOD_S = 0.1
HELD_S = 0.1
SAY_AGAIN_S = 60.0
_FRAMES = 6  # of the stack, the innermost ones


class LoopWatch:
    """Watches the loop that it is made on, until `close`.

    Args:
        logger: where a loop that is held is told of, once a minute.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._logger = logger
        self._answered = threading.Event()
        self._stop = threading.Event()
        self._worst_s = 0.0
        self._said_at_s = -SAY_AGAIN_S
        self._thread = threading.Thread(target=self._run, name="kvcache-loop-watch", daemon=True)
        self._thread.start()

    def take_worst(self) -> float:
        """The latest answer since this was asked last, in seconds."""
        worst_s, self._worst_s = self._worst_s, 0.0
        return worst_s

    def close(self) -> None:
        self._stop.set()
        self._answered.set()
        self._thread.join(timeout=2 * PERIOD_S)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            asked_s = time.monotonic()
            self._answered.clear()
            try:
                self._loop.call_soon_threadsafe(self._answered.set)
            except RuntimeError:  # the loop is closed
                return
            if not self._answered.wait(HELD_S):
                where = self._where()
                self._answered.wait()
                self._say(time.monotonic() - asked_s, where)
            self._worst_s = max(self._worst_s, time.monotonic() - asked_s)

    def _where(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._loop_thread)
        return "".join(traceback.format_stack(frame)[-_FRAMES:]) if frame is not None else ""

    def _say(self, held_s: float, where: str) -> None:
        if self._stop.is_set() or time.monotonic() - self._said_at_s < SAY_AGAIN_S:
            return
        self._said_at_s = time.monotonic()
        self._logger.warning(
            "kvcache: the event loop was held for %.0f ms, and every request waited; after %.0f ms it was here:\n%s",
            1000 * held_s,
            1000 * HELD_S,
            where,
        )
