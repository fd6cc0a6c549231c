"""A publisher that cannot be run is tried again, ever less often, and not given up."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.events.restarts import Backoff, keep_running


def test_waits_grow_to_a_limit_and_are_short_again_after_a_steady_run() -> None:
    backoff = Backoff(first_s=1, longest_s=30, steady_s=60)
    assert [backoff.after(0.5) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [backoff.after(ran_s) for ran_s in (60, 0.5, 59, 3600)] == [1, 2, 4, 1]


async def test_whatever_ends_it_it_is_run_again_until_cancelled() -> None:
    ends = [OSError("fork refused"), ValueError("two nodes just then"), None, MemoryError()]
    ran, through = 0, asyncio.Event()

    async def run() -> None:
        nonlocal ran
        ran += 1
        if not ends:
            through.set()
            await asyncio.sleep(3600)
        if (end := ends.pop(0)) is not None:
            raise end

    task = asyncio.create_task(keep_running(run, Backoff(first_s=0.001, longest_s=0.001)))
    await asyncio.wait_for(through.wait(), 10)
    assert ran == 5
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
