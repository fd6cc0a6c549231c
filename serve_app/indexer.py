"""The read path in one place: Score(request, pods) -> {pod: score}.

    request body -> prompts.encode -> block keys -> index.match -> matched tokens per pod and tier -> score

A stage is anything that keeps the protocol below: in this process (`PromptService`, `LocalIndex`), or a call to a
deployment (`serve_app.deployments.stages`). The order of the stages and what flows between them is only here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve_app.errors import IndexUnavailable
from serve_app.index.mirror import Mirror
from serve_app.scoring import Strategy, score
from serve_app.types import BlockKeys, EncodedKeys, EngineSpec, PodId, PodMatch, Tier

Body = Mapping[str, Any]
"""A parsed /v1/chat/completions or /v1/completions request."""


class PromptStage(Protocol):
    async def encode(self, body: Body, spec: EngineSpec) -> list[EncodedKeys]:
        """Block keys of every prompt in the request.

        Raises:
            PromptError: there is nothing that can be scored.
        """
        ...


class IndexStage(Protocol):
    async def spec(self) -> EngineSpec | None:
        """What the model's engines agree on; None while there is no engine."""
        ...

    async def match(
        self, keys: BlockKeys, pods: Sequence[PodId] | None, *, count_hits: bool
    ) -> Mapping[PodId, PodMatch]: ...


@dataclass(frozen=True, slots=True)
class Scored:
    """The answer, with what it rests on. For a request of several prompts, all numbers are sums over them."""

    scores: dict[PodId, float]
    matched_tokens: dict[PodId, Mapping[Tier, int]]
    prompt_tokens: int
    known_tokens: int
    block_size: int
    incomplete: str = ""  # why only the known beginning of some prompt is scored: tokens_late, media
    stage_s: dict[str, float] = field(default_factory=dict)  # seconds by stage: prompt, index, score


class Indexer:
    """Score requests with the given stages.

    Args:
        prompts: request -> block keys.
        index: block keys -> matches.
        strategy: match -> score.
    """

    def __init__(self, prompts: PromptStage, index: IndexStage, strategy: Strategy = Strategy.LONGEST_PREFIX) -> None:
        self._prompts = prompts
        self._index = index
        self.strategy = strategy

    async def score(self, body: Body, pods: Sequence[PodId] | None = None, strategy: Strategy | None = None) -> Scored:
        """Score `pods` (None: all live pods) for a request.

        Raises:
            PromptError: the request has no prompt that can be scored.
            IndexUnavailable: no engine of the model has registered.
        """
        strategy = strategy or self.strategy
        start_s = time.perf_counter()
        spec = await self._index.spec()
        if spec is None:
            raise IndexUnavailable("no replica of the model has registered in Redis yet")
        prompts = await self._prompts.encode(body, spec)
        encoded_s = time.perf_counter()
        matches = [await self._index.match(prompt.keys, pods, count_hits=strategy.counts_hits) for prompt in prompts]
        matched_s = time.perf_counter()
        scores: dict[PodId, float] = {}
        tokens: dict[PodId, Mapping[Tier, int]] = {}
        for prompt, match in zip(prompts, matches, strict=True):
            for pod, found in match.items():
                scores[pod] = scores.get(pod, 0.0) + score(found, prompt.token_count, strategy)
                tokens[pod] = _sum(tokens[pod], found.tokens) if pod in tokens else found.tokens
        return Scored(
            scores,
            tokens,
            sum(prompt.token_count for prompt in prompts),
            sum(prompt.known_token_count for prompt in prompts),
            spec.block_size,
            next((prompt.incomplete for prompt in prompts if prompt.incomplete), ""),
            {
                "prompt": encoded_s - start_s,
                "index": matched_s - encoded_s,
                "score": time.perf_counter() - matched_s,
            },
        )


def _sum(one: Mapping[Tier, int], other: Mapping[Tier, int]) -> dict[Tier, int]:
    return {tier: one.get(tier, 0) + other.get(tier, 0) for tier in {**one, **other}}


class LocalIndex:
    """IndexStage on a mirror in this process."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    async def spec(self) -> EngineSpec | None:
        return self._mirror.spec()

    async def match(
        self, keys: BlockKeys, pods: Sequence[PodId] | None, *, count_hits: bool
    ) -> Mapping[PodId, PodMatch]:
        return self._mirror.match(keys, pods, count_hits=count_hits)
