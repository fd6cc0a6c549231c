"""A loop that is held is noticed, with who holds it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from serve_app.loop_watch import HELD_S, PERIOD_S, LoopWatch

logger = logging.getLogger("watched")


def hold_the_loop(seconds: float) -> None:
    time.sleep(seconds)


async def test_who_holds_the_loop_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = LoopWatch(logger)
    for _ in range(2):
        hold_the_loop(PERIOD_S + 4 * HELD_S)
        await asyncio.sleep(2 * PERIOD_S)
    assert watch.take_worst() > 2 * HELD_S
    watch.close()
    (told,) = caplog.messages
    assert "hold_the_loop" in told


async def test_a_loop_that_is_free_is_not_late(caplog: pytest.LogCaptureFixture) -> None:
    watch = LoopWatch(logger)
    await asyncio.sleep(5 * PERIOD_S)
    assert watch.take_worst() < HELD_S + PERIOD_S
    watch.close()
    assert "hold_the_loop" not in caplog.text


def test_it_ends_with_the_loop() -> None:
    async def watched() -> None:
        LoopWatch(logger)
        await asyncio.sleep(0)

    asyncio.run(watched())
    time.sleep(3 * PERIOD_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "kvcache-loop-watch"]
