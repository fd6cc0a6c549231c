"""Made once however many ask, also when some give up; a failure is tried again."""

import asyncio
import time

import pytest

from serve_app.once import Once


async def test_concurrent_callers_share_one_making() -> None:
    made: list[str] = []

    def make(key: str) -> str:
        time.sleep(0.05)
        made.append(key)
        return key.upper()

    once = Once(make)
    assert await asyncio.gather(once("a"), once("a"), once("b"), once("a")) == ["A", "A", "B", "A"]
    assert await once("a") == "A"
    assert sorted(made) == ["a", "b"]


async def test_a_caller_that_gives_up_does_not_stop_it() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        time.sleep(0.1)
        made.append(key)
        return key

    once = Once(make)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(once(1), 0.01)
    assert await once(1) == 1
    assert made == [1]


async def test_a_failure_is_not_kept() -> None:
    answers = iter([ValueError("not yet"), 7])

    def make(_: str) -> int:
        answer = next(answers)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    once = Once(make)
    with pytest.raises(ValueError, match="not yet"):
        await once("k")
    assert await once("k") == 7
