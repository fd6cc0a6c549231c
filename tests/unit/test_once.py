"""Made once however many ask, also when some give up; a failure is tried again, but not at once."""

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
    assert await asyncio.gather(*map(once, "aaba")) == ["A", "A", "B", "A"]
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


async def test_a_failure_stands_for_a_while_and_is_then_tried_again() -> None:
    made: list[str] = []

    def make(key: str) -> int:
        made.append(key)
        if len(made) == 1:
            raise ValueError("not yet")
        return 7

    once = Once(make, retry_s=0.2)
    for _ in range(3):
        with pytest.raises(ValueError, match="not yet"):
            await once("k")
    assert made == ["k"]
    await asyncio.sleep(0.25)
    assert await once("k") == 7
    assert made == ["k", "k"]


async def test_who_does_not_wait_finds_it_made_later() -> None:
    once: Once[int, int] = Once(lambda key: key + 1)
    making = once.start(1)
    assert not making.done()
    assert await once(1) == 2
    assert once.start(1) is making


async def test_only_the_last_ones_are_kept() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        made.append(key)
        return key

    once: Once[int, int] = Once(make, kept_max=2)
    for key in (1, 2, 1, 3):
        assert await once(key) == key
    assert await once(1) == 1
    assert made == [1, 2, 3]  # 2 had not been asked for the longest
    assert await once(2) == 2
    assert made == [1, 2, 3, 2]
    assert len(once._tasks) == 2
