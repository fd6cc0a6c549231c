"""Loops that do not end: waits grow and differ, errors are counted and said once a minute a kind."""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import pairwise

import pytest

from serve_app.supervision import SAY_AGAIN_S, Backoff, ErrorLog, LoopGuard, keep_running

logger = logging.getLogger(__name__)


def test_waits_grow_to_a_limit_and_are_short_again_after_a_steady_run() -> None:
    backoff = Backoff(first_s=1, longest_s=30, steady_s=60, jitter=0)
    assert [backoff.after(0.5) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [backoff.after(ran_s) for ran_s in (60, 0.5, 59, 3600)] == [1, 2, 4, 1]
    backoff.reset()
    assert backoff.after() == 1


def test_those_who_fail_together_do_not_come_back_together() -> None:
    waits = sorted(Backoff(first_s=10).after() for _ in range(200))
    assert 8 <= waits[0] < 8.8
    assert 11.2 < waits[-1] <= 12
    assert max(later - earlier for earlier, later in pairwise(waits)) < 0.5


def test_errors_are_counted_by_kind_and_each_kind_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = LoopGuard("nothing is written", Backoff(1, 4, jitter=0), logger)
    waits = [guard.failed(error) for error in [ValueError("a"), KeyError("b"), ValueError("c"), ValueError("d")]]
    assert waits == [1, 2, 4, 4]
    assert guard.counters == {"errors": 4, "error_ValueError": 3, "error_KeyError": 1}
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "nothing is written (ValueError, 1 so far); again in 1.0 s",
        "nothing is written (KeyError, 1 so far); again in 2.0 s",
    ]
    assert all(record.exc_info for record in caplog.records)  # where it was
    guard.went_well()
    assert guard.failed(OSError()) == 1


def test_what_fails_for_every_request_is_said_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = ErrorLog("not scored", logger)
    for _ in range(1000):
        errors.failed(RecursionError("deep"))
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + SAY_AGAIN_S)
    errors.failed(RecursionError("deep"))
    assert [record.getMessage() for record in caplog.records] == [
        "not scored (RecursionError, 1 so far)",
        "not scored (RecursionError, 1001 so far)",
    ]


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

    task = asyncio.create_task(keep_running(run, Backoff(first_s=0.001, longest_s=0.001), "a part", logger))
    await asyncio.wait_for(through.wait(), 10)
    assert ran == 5
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
