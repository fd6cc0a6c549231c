"""What an engine takes of what it holds, and how an error is counted. The engine's own word: tests/integration."""

from typing import Any

import pytest

from serve_app.accounting import error_blocks, is_one_sequence, reads_cache, usable_tokens
from serve_app.types import CPU, GPU, Tier

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("held", "prompt_tokens", "usable"),
    [
        ({}, 100, {}),
        ({GPU: 64}, 100, {GPU: 64}),
        ({GPU: 96}, 96, {GPU: 64}),  # held whole: the last block is computed again
        ({GPU: 96}, 97, {GPU: 96}),
        ({GPU: 32}, 32, {GPU: 0}),
        ({GPU: 32, CPU: 64}, 96, {GPU: 32, CPU: 32}),  # the last block is the slower tier's
        ({GPU: 96, CPU: 0}, 96, {GPU: 64, CPU: 0}),
        ({GPU: 0, CPU: 32}, 1, {GPU: 0, CPU: 0}),
        ({GPU: 0}, 0, {GPU: 0}),
    ],
)
def test_the_last_token_is_always_computed(held: dict[Tier, int], prompt_tokens: int, usable: dict[Tier, int]) -> None:
    assert usable_tokens(held, prompt_tokens, 32) == usable


@pytest.mark.parametrize(
    ("predicted", "actual", "error"),
    [(64, 64, 0), (96, 64, 1), (64, 96, -1), (64, 65, -1), (65, 64, 1), (0, 97, -4), (128, 0, 4)],
)
def test_a_part_of_a_block_counts_as_one(predicted: int, actual: int, error: int) -> None:
    assert error_blocks(predicted, actual, 32) == error


@pytest.mark.parametrize(
    ("body", "reads"),
    [
        (CHAT, True),
        (CHAT | {"logprobs": True, "top_logprobs": 3}, True),
        (CHAT | {"prompt_logprobs": 0}, False),
        (CHAT | {"echo": True}, False),  # top_logprobs is 0 if not given
        (CHAT | {"echo": True, "top_logprobs": None}, True),
        ({"prompt": "hi", "echo": True}, True),
        ({"prompt": "hi", "echo": True, "logprobs": 0}, False),
        ({"prompt": "hi", "logprobs": 2}, True),
    ],
)
def test_prompt_logprobs_are_computed_with_the_prompt(body: dict[str, Any], reads: bool) -> None:
    assert reads_cache(body) is reads


@pytest.mark.parametrize(
    ("body", "one"),
    [
        (CHAT, True),
        (CHAT | {"n": 1}, True),
        (CHAT | {"n": 2}, False),
        ({"prompt": "hi"}, True),
        ({"prompt": [1, 2, 3]}, True),
        ({"prompt": ["hi"]}, True),
        ({"prompt": [[1, 2]]}, True),
        ({"prompt": ["hi", "ho"]}, False),
        ({"prompt": [[1], [2]]}, False),
        ({"prompt": "hi", "n": None}, True),
    ],
)
def test_usage_speaks_for_one_sequence(body: dict[str, Any], one: bool) -> None:
    assert is_one_sequence(body) is one


def test_sampling_parameters_of_a_generate_request() -> None:
    def body(**sampling: object) -> dict[str, object]:
        return {"token_ids": [1], "sampling_params": sampling}

    assert reads_cache(body())
    assert not reads_cache(body(prompt_logprobs=0))
    assert is_one_sequence(body(n=1))
    assert not is_one_sequence(body(n=2))


def test_several_inputs_are_several_sequences() -> None:
    assert not is_one_sequence({"input": ["a", "b"]})
    assert is_one_sequence({"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
