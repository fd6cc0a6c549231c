"""The stages of the read path as deployments: Tokenizer, PrefixStore, BlockIndex. Each is a plain class in a shell.

Scorer -> PrefixStore -> Tokenizer
       -> BlockIndex  -> Redis
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from serve_app.config import GraphArgs
from serve_app.deployments.ray_host import RayInstruments
from serve_app.errors import PromptError, StoreError
from serve_app.index.connection import connect
from serve_app.index.description import ages_s, describe
from serve_app.index.holdings import HoldingsReader
from serve_app.index.keyspace import Keyspace
from serve_app.index.mirror import Mirror
from serve_app.index.router_log import Kept, recent_receipts
from serve_app.metrics import IndexMetrics
from serve_app.once import Once
from serve_app.prompts.prefix_store import PrefixStore as Store
from serve_app.prompts.service import PromptService
from serve_app.prompts.tokenizer import Segment
from serve_app.prompts.tokenizer import Tokenizer as TokenizerModel
from serve_app.routing.choice import Cost
from serve_app.routing.chooser import Chooser
from serve_app.routing.desk import Desk, Standing
from serve_app.service.fleet import FleetView
from serve_app.service.views import Fleet
from serve_app.types import BlockKeys, EncodedKeys, EngineSpec, Found, ModelId, PodId, PodMatch, Tier, TokenizerSource


class Tokenizer:
    """Text segments -> token ids, in a process of its own."""

    def __init__(self) -> None:
        self._models: Once[TokenizerSource, TokenizerModel] = Once(TokenizerModel)

    async def encode_segments(self, source: TokenizerSource, segments: Sequence[Segment]) -> list[bytes]:
        """Packed token ids of each segment."""
        model = await self._models(source)
        return await asyncio.to_thread(model.encode_segments, segments)


class PrefixStore:
    """Request body -> block keys; only text that was not seen before goes to the Tokenizer."""

    def __init__(self, args: GraphArgs, tokenizer: DeploymentHandle[Any]) -> None:
        self._prompts = PromptService(Store(args.prefix_store_bytes), tokenizer.encode_segments.remote, inline_chars=0)

    async def encode(self, body: dict[str, Any], spec: EngineSpec) -> list[EncodedKeys] | PromptError:
        """Keys of every prompt. A PromptError is returned: Serve would log what is raised as a failure of ours."""
        try:
            return await self._prompts.encode(body, spec)
        except PromptError as error:
            return error


class BlockIndex:
    """Block keys -> matches, from a mirror of Redis.

    Its methods are coroutines that never wait: Serve runs plain ones in many threads, a Desk is for one.
    """

    def __init__(self, args: GraphArgs, redis_url: str) -> None:
        self._mirror = Mirror(
            redis_url,
            ModelId(args.model),
            max_blocks=args.max_blocks,
            tier_order=[Tier(tier) for tier in args.tier_order],
            bury=True,
        )
        self._mirror.start()
        self._model = ModelId(args.model)
        self._desk = Desk(self._mirror, Chooser(self._mirror.held, weights=args.cost.weights()))
        self._redis = connect(redis_url, name="kvcache-receipts", slot_of=Keyspace(self._model).receipts)
        self._fleet = FleetView(self._mirror, HoldingsReader(self._redis, self._model), self._standing)
        self._metrics = IndexMetrics(self._mirror, RayInstruments(args.model))

    async def spec(self) -> EngineSpec | None:
        return self._mirror.spec()

    async def match(
        self, keys: BlockKeys, pods: Sequence[PodId] | None, count_hits: bool, prompt_tokens: int | None = None
    ) -> dict[PodId, PodMatch]:
        return dict(self._mirror.match(keys, pods, count_hits=count_hits, prompt_tokens=prompt_tokens))

    async def costs(self, found: Found) -> dict[PodId, Cost]:
        """What the request would cost at each pod that was looked up, by what the pods have reported."""
        pods = list(found.matches[0]) if found.matches else []
        self._catch_up(pods)
        return self._desk.chooser.expected(pods, found, time.monotonic())

    async def receipts(self, count: int, after: str = "") -> list[Kept]:
        """The routers' last receipts, newest first; none while Redis is away."""
        return await recent_receipts(self._redis, self._model, count, after)

    async def fleet(self) -> Fleet:
        """The replicas, by what they have reported and what the routers have told each other."""
        return await self._fleet.look()

    async def holders(self, keys: BlockKeys) -> list[list[PodId]]:
        return self._mirror.holders(keys)

    async def describe(self) -> dict[str, Any]:
        """The index as people want to see it."""
        return describe(self._mirror)

    def _catch_up(self, pods: Sequence[PodId]) -> None:
        self._desk.chooser.keep_only(self._mirror.pods())
        self._desk.catch_up(pods)

    def _standing(self, pods: Sequence[PodId]) -> Mapping[PodId, Standing]:
        self._catch_up(pods)
        return self._desk.standing(pods, time.monotonic())

    async def ages_s(self) -> dict[str, float]:
        return ages_s(self._mirror)

    def check_health(self) -> None:
        """Only what a restart can mend: it brings no Redis back, and would lose the index that serves on meanwhile."""
        if not self._mirror.is_running:
            raise StoreError("the index no longer follows Redis")

    def __del__(self) -> None:
        if hasattr(self, "_mirror"):
            self._mirror.close()
