"""What an engine takes from its cache, of what it holds; and how far a prediction was from what it took.

In: a match (held tokens per tier, fastest first), a request. Out: the figure that vLLM will report as
`usage.prompt_tokens_details.cached_tokens`. Pure functions, for everybody who compares the two.

vLLM's rules (v1/core/kv_cache_manager.py `get_computed_blocks`, v1/core/sched/scheduler.py, 0.29):
- Whole blocks only, the longest unbroken prefix of them.
- At least one token is computed, for its logits; so of a prompt that is held whole, the last block is computed again:

      blocks of 32, all held    prompt of 96 tokens -> 64 cached     97 -> 96     65 -> 64     32 -> 0

- What another tier has (LMCache, CPU offload) is added to the GPU's. LMCache loads a prompt that it holds whole but for
  its last *token*, up to one block more than is said here.
- The figure is that of the first time the prefill is scheduled: a preemption later changes nothing.
- A request for logprobs of its prompt reads nothing, for they are computed with the prompt.
- A request of several prompts, or of several answers (`n`), reports one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.types import Tier


def usable_tokens(held: Mapping[Tier, int], prompt_tokens: int, block_size: int) -> dict[Tier, int]:
    """Tokens that the engine will take from its cache, by tier, of those it holds.

    Args:
        held: matched prefix by tier, fastest first (`PodMatch.tokens`).
        prompt_tokens: length of the whole prompt.
        block_size: tokens per block of the engine.
    """
    left = most_usable_tokens(prompt_tokens, block_size)
    usable: dict[Tier, int] = {}
    for tier, count in held.items():
        usable[tier] = min(count, left)
        left -= usable[tier]
    return usable


def most_usable_tokens(prompt_tokens: int, block_size: int) -> int:
    """What it takes of a prompt that it holds whole."""
    return max(prompt_tokens - 1, 0) // block_size * block_size


def error_blocks(predicted_tokens: int, actual_tokens: int, block_size: int) -> int:
    """Signed error in blocks, a part of a block counting as one; more than zero: too much was predicted."""
    difference = predicted_tokens - actual_tokens
    blocks = -(-abs(difference) // block_size)
    return blocks if difference > 0 else -blocks


def reads_cache(body: Mapping[str, Any]) -> bool:
    """Whether vLLM looks into its cache for this request: not if logprobs of the prompt are asked for."""
    if _sampling(body).get("prompt_logprobs") is not None:
        return False
    if not body.get("echo"):
        return True
    asked = body.get("top_logprobs", 0) if "messages" in body else body.get("logprobs")
    return asked is None


def is_one_sequence(body: Mapping[str, Any]) -> bool:
    """Whether the request has one prompt and one answer, so that its `cached_tokens` is that prompt's."""
    prompt = body.get("prompt") or body.get("input")
    several = isinstance(prompt, list) and (len(prompt) != 1 if _holds_prompts(prompt) else False)
    return not several and (_sampling(body).get("n") or 1) == 1


def _sampling(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the sampling parameters are: in the request, or in a field of `/inference/v1/generate`."""
    given = body.get("sampling_params")
    return given if "token_ids" in body and isinstance(given, Mapping) else body


def _holds_prompts(prompt: list[Any]) -> bool:
    """A list of prompts, and not the token ids of one."""
    return bool(prompt) and isinstance(prompt[0], (str, list))
