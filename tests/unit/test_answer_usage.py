"""What is read from the last bytes of an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve_app.service.usage import KEPT_BYTES, AnswerEnd, Usage

CHAT = {"prompt_tokens": 70, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 64}}


def read(*chunks: bytes) -> Usage:
    end = AnswerEnd()
    for chunk in chunks:
        end.passed(chunk)
    return end.usage()


def answer(usage: Any, **more: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": "hello"}}], "usage": usage, **more}).encode()


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (CHAT, Usage(70, 64)),
        ({"prompt_tokens": 70, "prompt_tokens_details": None}, Usage(70, None)),
        ({"input_tokens": 70, "input_tokens_details": {"cached_tokens": 64}}, Usage(70, 64)),  # /v1/responses
        ({"input_tokens": 6, "cache_read_input_tokens": 64, "output_tokens": 3}, Usage(70, 64)),  # /v1/messages
        ({"completion_tokens": 3}, Usage()),
        ({"prompt_tokens": "70", "prompt_tokens_details": []}, Usage()),
        ({"prompt_tokens": 70, "prompt_tokens_details": {"cached_tokens": -1}}, Usage(70, None)),
        (None, Usage()),
    ],
)
def test_shapes(usage: Any, expected: Usage) -> None:
    assert read(answer(usage)) == expected
    assert read(answer(usage, system_fingerprint=None, kv_transfer_params=None)) == expected


def test_chunks_may_be_cut_anywhere() -> None:
    whole = answer(CHAT)
    for cut in range(len(whole)):
        assert read(whole[:cut], whole[cut:]) == Usage(70, 64)
    assert read(*(whole[i : i + 1] for i in range(len(whole)))) == Usage(70, 64)


def test_the_last_event_that_names_one_counts() -> None:
    first, last = answer({"prompt_tokens": 70}), answer(CHAT)
    events = [b"data: " + one + b"\n\n" for one in (first, last, answer(None), b"[DONE]")]
    assert read(*events) == Usage(70, 64)


def test_a_text_about_usage_is_not_one() -> None:
    text = '"usage": {"prompt_tokens": 1}'
    assert read(json.dumps({"choices": [{"message": {"content": text}}]}).encode()) == Usage()
    assert read(json.dumps({"usage": CHAT, "choices": [{"message": {"content": text}}]}).encode()) == Usage(70, 64)


def test_no_more_is_kept_than_said() -> None:
    end = AnswerEnd()
    for size in (1, KEPT_BYTES - 1, KEPT_BYTES, 10 * KEPT_BYTES, 3):
        end.passed(b"x" * size)
        assert len(end._kept) <= KEPT_BYTES
    end.passed(b"\xff" * 100 + answer(CHAT))
    assert end.usage() == Usage(70, 64)


@pytest.mark.parametrize(
    "garbage", [b"", b'"usage"', b'"usage":', b'"usage": {', b'"usage":' + b"[" * 5000, b"\xff\xfe"]
)
def test_garbage_is_no_usage(garbage: bytes) -> None:
    assert read(garbage) == Usage()
