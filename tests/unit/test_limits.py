"""What is beyond a limit is refused before it costs anything."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import PromptError
from serve_app.limits import LimitExceeded, Limits, Turnstile, check_ids, check_prompts, is_deeper, parse, read_body

VALUES = st.recursive(
    st.none() | st.text(alphabet='[]{}"\\ a\u00e9'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='[{"\\'), inner, max_size=3),
    max_leaves=20,
)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@given(VALUES, st.integers(0, 6))
def test_depth_is_that_of_the_parsed_value(value: Any, depth: int) -> None:
    assert is_deeper([value], depth + 1) == (depth_of([value]) > depth + 1)


@pytest.mark.parametrize(
    "parts",
    [(b'{"a": ', b"[", b""), (b'{"a": "', b'\\"', b'"}'), (b'{"a": [', b"[],", b"[]]}")],
)
def test_a_body_is_read_in_time_linear_in_its_length(parts: tuple[bytes, bytes, bytes]) -> None:
    """Compared with itself in one run: eight times the length takes about eight times as long."""
    start, middle, end = parts

    def taken_s(count: int) -> float:
        raw = start + middle * count + end
        gc.disable()  # what it takes depends on all that other tests have left
        started_s = time.thread_time()
        with contextlib.suppress(PromptError):
            parse(raw, Limits())
        taken = time.thread_time() - started_s
        gc.enable()
        return taken

    short_s, long_s = (min(taken_s(count) for _ in range(3)) for count in (100_000, 800_000))
    assert long_s < 40 * short_s + 0.01  # quadratic: 64 times


def test_token_ids_hide_nothing() -> None:
    deep = json.loads("[" * 70 + "]" * 70)
    ids = list(range(1000))
    assert not is_deeper({"prompt": ids}, 2)
    assert is_deeper({"prompt": [*ids, deep, *ids]}, 64)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"prompt": "' + b"x" * 1000 + b'"}', "body_too_long"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "body_too_deep"),
        (b'{"a": ' + b"[" * 450 + b"]" * 450 + b"}", "body_too_deep"),
        (b"[" * 900, "no_body"),
        (b"[1]", "no_body"),
        (b"\xff", "no_body"),
    ],
)
def test_a_body_beyond_a_limit_has_its_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(PromptError) as refused:
        parse(raw, Limits(body_bytes=1000))
    assert refused.value.reason == reason


async def test_no_more_than_the_limit_is_read() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 100

    for declared, chunks in ((None, 11), ("5", 11), ("junk", 11), ("1001", 0)):
        taken = 0
        with pytest.raises(LimitExceeded) as refused:
            await read_body(endless(), declared, Limits(body_bytes=1000))
        assert (refused.value.status, taken) == (413, chunks)


def test_prompts_and_ids() -> None:
    limits = Limits(prompts=2, id_chars=5)
    check_prompts({"prompt": ["a", "b"]}, limits)
    check_prompts({"prompt": [1, 2, 3]}, limits)  # one prompt's ids
    for field, value in (("prompt", ["a"] * 3), ("input", ["a"] * 3), ("prompt", [[1]] * 3)):
        with pytest.raises(PromptError, match="3 prompts"):
            check_prompts({field: value}, limits)
    check_ids(["12345"], limits)
    check_ids([], limits)
    for pods in (["123456"], ["a"] * 5000):
        with pytest.raises(LimitExceeded):
            check_ids(pods, limits)


def test_a_callers_rate_is_its_own() -> None:
    turnstile = Turnstile(Limits(scores_per_s=2))
    for _ in range(2):
        turnstile.enter("a", 0.0)
        turnstile.leave()
    with pytest.raises(LimitExceeded) as refused:
        turnstile.enter("a", 0.0)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 0.5)
    turnstile.enter("b", 0.0)
    turnstile.enter("a", 0.5)


def test_only_so_many_at_a_time() -> None:
    turnstile = Turnstile(Limits(renders=1))
    turnstile.enter("a", 0.0)
    with pytest.raises(LimitExceeded, match="being answered"):
        turnstile.enter("b", 0.0)
    turnstile.leave()
    turnstile.enter("b", 0.0)
