"""The read path in one place: Score(request, pods) -> {pod: score}.

    find    request body -> prompts.encode -> block keys -> index.match -> matched tokens per pod and tier
    score   what was found -> one number per pod

A stage is anything that keeps the protocol below: in this process (`PromptService`, `LocalIndex`), or a call to a
deployment (`serve_app.deployments.stages`). The order of the stages and what flows between them is only here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.accounting import is_one_sequence
from serve_app.errors import IndexUnavailable
from serve_app.index.mirror import Mirror
from serve_app.scoring import Strategy, score_all
from serve_app.types import BlockKeys, EncodedKeys, EngineSpec, Found, PodId, PodMatch

Body = Mapping[str, Any]
"""A parsed /v1/chat/completions or /v1/completions request."""


class PromptStage(Protocol):
    """Turns a request into block keys."""

    async def encode(self, body: Body, spec: EngineSpec) -> list[EncodedKeys]:
        """Block keys of every prompt in the request.

        Raises:
            PromptError: there is nothing that can be scored.
        """
        ...


class IndexStage(Protocol):
    """Says what each pod holds of the keys."""

    async def spec(self) -> EngineSpec | None:
        """What the model's engines agree on; None while there is no engine."""
        ...

    async def match(
        self, keys: BlockKeys, pods: Sequence[PodId] | None, *, count_hits: bool, prompt_tokens: int | None = None
    ) -> Mapping[PodId, PodMatch]: ...


@dataclass(frozen=True, slots=True)
class Scored:
    """The answer, with what it rests on. For a request of several prompts, all numbers are sums over them."""

    scores: dict[PodId, float]
    found: Found


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

    async def find(self, body: Body, pods: Sequence[PodId] | None = None, strategy: Strategy | None = None) -> Found:
        """The request's prompts, and what each of `pods` (None: all live pods) holds of them.

        Raises:
            PromptError: the request has no prompt that can be scored.
            IndexUnavailable: no engine of the model has registered.
        """
        counts_hits = (strategy or self.strategy).counts_hits
        start_s = time.perf_counter()
        spec = await self._index.spec()
        if spec is None:
            raise IndexUnavailable("no replica of the model has registered in Redis yet")
        prompts = await self._prompts.encode(body, spec)
        encoded_s = time.perf_counter()
        matches = [await self._match(prompt, pods, count_hits=counts_hits) for prompt in prompts]
        stage_s = {"prompt": encoded_s - start_s, "index": time.perf_counter() - encoded_s}
        return Found(prompts, matches, spec.block_size, stage_s, is_one_sequence(body))

    async def _match(
        self, prompt: EncodedKeys, pods: Sequence[PodId] | None, *, count_hits: bool
    ) -> Mapping[PodId, PodMatch]:
        tokens = prompt.token_count if prompt.complete else None
        return await self._index.match(prompt.keys, pods, count_hits=count_hits, prompt_tokens=tokens)

    async def score(self, body: Body, pods: Sequence[PodId] | None = None, strategy: Strategy | None = None) -> Scored:
        """Score `pods` for a request; errors as in `find`."""
        found = await self.find(body, pods, strategy)
        return Scored(score_all(found, strategy or self.strategy), found)


class LocalIndex:
    """IndexStage on a mirror in this process."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    async def spec(self) -> EngineSpec | None:
        return self._mirror.spec()

    async def match(
        self, keys: BlockKeys, pods: Sequence[PodId] | None, *, count_hits: bool, prompt_tokens: int | None = None
    ) -> Mapping[PodId, PodMatch]:
        return self._mirror.match(keys, pods, count_hits=count_hits, prompt_tokens=prompt_tokens)
