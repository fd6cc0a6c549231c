"""Ingress of the graph: the Score API over HTTP, below the application's route prefix.

POST /kvcache/v1/score     an OpenAI request body, plus optional `pods` and `strategy`  ->  scores
GET  /kvcache/v1/pods      what the index knows of every pod
GET  /kvcache/v1/receipts  the routers' last decisions, each with what came of it
GET  /kvcache/             a page for people: fleet, decisions, health
GET  /kvcache/health

The endpoints are those of the score service (serve_app/service/http.py), on the graph's other deployments.
"""

import logging
import pickle
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve_app.access import Access
from serve_app.config import GraphArgs
from serve_app.deployments.listening import reachable_host
from serve_app.deployments.stages import RemoteIndex, RemotePrompts
from serve_app.index.router_log import Kept
from serve_app.indexer import Body, Indexer
from serve_app.routing.choice import Cost
from serve_app.routing.receipts import Open
from serve_app.scoring import Strategy
from serve_app.service.http import http_app
from serve_app.service.refused import Refused
from serve_app.service.score_service import ScoreService
from serve_app.service.views import Fleet
from serve_app.types import BlockKeys, Found, ModelId, PodId

logger = logging.getLogger("ray.serve")

_AGES_MAX_AGE_S = 1.0


class GraphBackend:
    """The model's index in the graph's deployments."""

    def __init__(
        self, model: str, prefix_store: DeploymentHandle[Any], block_index: DeploymentHandle[Any], strategy: Strategy
    ) -> None:
        self.model = ModelId(model)
        self._block_index = block_index
        self._ages: Mapping[str, float] = {}
        self._ages_until_s = 0.0
        self._indexer = Indexer(RemotePrompts(lambda: prefix_store), RemoteIndex(lambda: block_index), strategy)

    def knows(self, name: str) -> bool:
        """Every name: the graph is of one model, and what is not the base is one of its adapters."""
        return True

    async def find(self, body: Body, pods: Sequence[PodId] | None, strategy: Strategy) -> Found:
        return await self._indexer.find(body, pods, strategy)

    async def costs(self, found: Found) -> Mapping[PodId, Cost]:
        costs: Mapping[PodId, Cost] = await self._block_index.costs.remote(found)
        return costs

    async def ages_s(self) -> Mapping[str, float]:
        """As they were a second ago at most: a question would take one more hop for them."""
        now_s = time.monotonic()
        if now_s > self._ages_until_s:
            self._ages = await self._block_index.ages_s.remote()
            self._ages_until_s = now_s + _AGES_MAX_AGE_S
        return self._ages

    async def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = await self._block_index.describe.remote()
        return described

    async def receipts(self, count: int, after: str = "") -> Sequence[Kept]:
        kept: Sequence[Kept] = await self._block_index.receipts.remote(count, after)
        return kept

    def open_receipts(self, count: int) -> list[Open]:
        """None: decisions are made in the routers' processes, which tell of them when the engine has."""
        return []

    async def fleet(self) -> Fleet:
        fleet: Fleet = await self._block_index.fleet.remote()
        return fleet

    async def holders(self, keys: BlockKeys) -> list[list[PodId]]:
        holders: list[list[PodId]] = await self._block_index.holders.remote(keys)
        return holders


@serve.ingress()
class Scorer:
    """`redis`, the embedded Valkey's handle, is not called: binding it here makes it part of the application."""

    def __init__(
        self,
        args: GraphArgs,
        prefix_store: DeploymentHandle[Any],
        block_index: DeploymentHandle[Any],
        redis: DeploymentHandle[Any] | None = None,
    ) -> None:
        self._service = ScoreService(
            [GraphBackend(args.model, prefix_store, block_index, args.strategy)],
            access=Access(args.auth.keys_file),
            limits=args.limits,
            strategy=args.strategy,
        )
        if self._service.access.is_open and (host := reachable_host()):
            logger.warning(
                "kvcache: the Score API listens on %s without keys: whoever reaches it can find out which prompts are "
                "cached, and read receipts; set auth.keys_file, or http_options.host to 127.0.0.1",
                host,
            )

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        return http_app(self._service, logger=logger, failure=_of_a_stage)


def _of_a_stage(error: Exception) -> Refused | None:
    """A deployment did not answer, or failed; its own log has the whole story."""
    if isinstance(error, (RecursionError, pickle.PicklingError)):  # it could be decoded, and not be sent on
        return Refused(400, "invalid_request", "the body is nested too deeply")
    if not isinstance(error, (RayError, RayServeException)):
        return None
    logger.warning("kvcache: a stage of the graph failed: %r", error)
    return Refused(503, "stage_failed", "a deployment of the graph is not available or has failed; its log says why")
