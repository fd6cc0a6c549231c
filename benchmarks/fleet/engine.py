"""What a simulated engine is made of besides its cache: parameters, what it tells the outside, its state per request.

In: nothing. Out: types only, for replica.py and who configures it. Names and defaults are vLLM's where it has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from benchmarks.fleet.cache import CacheEvent
from benchmarks.fleet.requests import BLOCK_SIZE_TOKENS, Record
from serve_app.types import BlockKey, Tier


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a step takes. Default: Qwen3-32B, tensor parallel 2, H100."""

    base_s: float = 0.011  # any step
    decode_step_s: float = 0.0  # more for a step in which somebody decodes
    prefill_step_s: float = 0.0  # more for a step in which a prompt is computed, however long
    context_s_per_token: float = 4.0e-8  # for every token of context in the step
    prefill_tokens_per_s: float = 15_926.0
    load_tokens_per_s: float = 200_000.0  # CPU tier to GPU: 16 GB/s or so; 64 layers x 8 heads x 128 x 2 x bf16 / token


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    kv_tokens: int = 307_328  # GPU memory for KV
    block_size_tokens: int = BLOCK_SIZE_TOKENS
    max_num_seqs: int = 1_024
    max_num_batched_tokens: int = 8_192
    max_waiting: int | None = None  # requests that may wait; None: any number
    cpu_tokens: int = 0  # CPU tier; 0: none
    timing: Timing = field(default_factory=Timing)
    step_by_step: bool = False  # no tight loop; for the test that both are the same


class What(Enum):
    FIRST_TOKEN = 0
    FINISHED = 1


class Outcome(NamedTuple):
    time_s: float
    what: What
    record: Record


class LogEntry(NamedTuple):
    time_s: float  # end of the step, when vLLM publishes
    tier: Tier
    events: list[CacheEvent]


@dataclass(slots=True, eq=False)
class EngineRequest:
    """A request inside the engine."""

    record: Record
    blocks: list[int] = field(default_factory=list)
    computed: int = 0  # tokens; kept up to date only while the prompt is computed
    target: int = (
        0  # tokens to compute before the next token is known: the prompt, and after preemption the answer so far
    )
    answered: int = 0  # tokens of the answer, up to when decoding (re)started
    decode_from: int = 0  # number of the step that ended the prompt
    phase: int = 0  # it needs a new block in steps with this number modulo block size
    end_step: int = 0  # number of the step that gives the last token
    running: bool = False

    def key(self, index: int) -> BlockKey:
        prompt = self.record.request.prompt_keys
        return prompt[index] if index < len(prompt) else self.record.request.answer_keys[index - len(prompt)]

    def keys(self, count: int) -> Sequence[BlockKey]:
        """At least the first `count` keys."""
        request = self.record.request
        if count <= len(request.prompt_keys):
            return request.prompt_keys
        return (*request.prompt_keys, *request.answer_keys)
