"""The request router of the LLM deployment: one decision per request, on public Ray Serve hooks.

Serve calls `choose_replicas` in the process that routes: LLMRouter with direct streaming, otherwise the OpenAI
ingress. It must never raise and never wait long: whatever is missing, the request goes to the least-loaded replica,
and the decision is counted under the reason.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, ReplicaID
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import MultiplexMixin
from ray.serve.request_router import RequestRouter

from serve_app.config import RouterSettings
from serve_app.deployments import routed
from serve_app.deployments.embedded_redis import resolve_redis_url
from serve_app.deployments.metrics import IndexMetrics, RouterMetrics
from serve_app.deployments.stages import RemoteIndex, RemotePrompts, graph_handle, remote_tokenize
from serve_app.errors import IndexUnavailable, PromptError
from serve_app.index.mirror import Mirror
from serve_app.indexer import Indexer, IndexStage, LocalIndex, PromptStage, Scored
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.service import PromptService, Tokenize
from serve_app.selection import Choice, LoadLedger, Policy, Selector
from serve_app.types import ModelId, PodId, Tier

logger = logging.getLogger("ray.serve")


class KVCacheAwareRouter(MultiplexMixin, RequestRouter):
    """Sends each request to the replica that holds the longest part of its prompt in KV cache.

    Turn it on in the `deployment_config` of any Ray Serve LLM config (configs/serve-llm-drop-in.yaml). Its
    `request_router_kwargs` are a `RouterSettings`.
    """

    def initialize_state(self, **settings: Any) -> None:
        self._settings = RouterSettings(**settings)
        self._selector = Selector(self._settings.policy)
        self._ledger = LoadLedger()
        self._indexer: Indexer | None = None
        self._mirror: Mirror | None = None
        self._metrics: RouterMetrics | None = None
        self._background: set[asyncio.Task[Any]] = set()
        # Every proxy makes a router of its own that it hardly ever asks: there the heavy parts start on first use.
        if self._handle_source != DeploymentHandleSource.PROXY:
            self._start()

    def _start(self) -> None:
        settings = self._settings
        self._metrics = RouterMetrics(settings.model)
        if settings.policy is Policy.ROUND_ROBIN:
            return
        self._mirror = Mirror(
            resolve_redis_url(settings.redis_url),
            ModelId(settings.model),
            max_blocks=settings.max_blocks,
            tier_order=[Tier(tier) for tier in settings.tier_order],
        )
        self._mirror.start()
        self._index_metrics = IndexMetrics(self._mirror, settings.model)
        tokenize: Tokenize | None = None
        if settings.tokenization == "deployment":
            tokenize = remote_tokenize(graph_handle("Tokenizer", settings.graph_app))
        prompts: PromptStage = PromptService(
            PrefixStore(settings.prefix_store_bytes), tokenize, settings.tokenize_deadline_s
        )
        index: IndexStage = LocalIndex(self._mirror)
        if settings.prefix_lookup == "deployment":
            prompts = RemotePrompts(graph_handle("PrefixStore", settings.graph_app))
        if settings.index_query == "deployment":
            index = RemoteIndex(graph_handle("BlockIndex", settings.graph_app))
        self._indexer = Indexer(prompts, index, settings.strategy)
        if isinstance(prompts, PromptService) and settings.policy is Policy.KV_AWARE:
            self._keep(self._event_loop.create_task(self._load_tokenizer(self._mirror, prompts)))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All candidates, one per rank, best first."""
        if pending_request is not None:
            # Without it Serve asks again in a tight loop while every replica is full.
            pending_request.routing_context.should_backoff = True
        if self._metrics is None:
            self._start()
        start_s = time.perf_counter()
        replicas = {PodId(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        pods = sorted(replicas)
        scored, why = await self._score(pods, pending_request)
        now_s = time.monotonic()
        choice = self._selector.choose(
            pods, {pod: self._in_flight(pod, now_s) for pod in pods}, scored.scores if scored else None, why
        )
        if choice.ranked:
            self._ledger.sent(choice.ranked[0], now_s)
            self._count(choice, scored, time.perf_counter() - start_s)
        return [[replicas[pod]] for pod in choice.ranked]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._ledger.keep_only([PodId(replica.replica_id.unique_id) for replica in replicas])

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Remember who got the request, for the response header of the ordinary ingress."""
        routed.remember(pending_request.metadata.request_id, replica_id.unique_id)

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _score(self, pods: list[PodId], request: PendingRequest | None) -> tuple[Scored | None, str]:
        """Scores, or None and the reason why there are none; also why they are of a part of the prompt only."""
        if self._indexer is None or self._settings.policy is not Policy.KV_AWARE:
            return None, ""
        body = _body_of(request)
        if body is None:
            return None, "no_body"
        try:
            scored = await asyncio.wait_for(self._indexer.score(body, pods), self._settings.decision_deadline_s)
            return scored, scored.incomplete
        except PromptError as error:
            return None, error.reason
        except IndexUnavailable:
            return None, "no_index"
        except TimeoutError:
            return None, "deadline"
        except Exception:
            logger.exception("kvcache: a request could not be scored; it goes to the least-loaded replica")
            return None, "error"

    def _in_flight(self, pod: PodId, now_s: float) -> int:
        report = self._mirror.load(pod) if self._mirror is not None else None
        return self._ledger.in_flight(pod, report, now_s)

    def _count(self, choice: Choice, scored: Scored | None, total_s: float) -> None:
        assert self._metrics is not None
        self._metrics.decided(choice.outcome, choice.reason, total_s)
        if scored is not None:
            matched = scored.matched_tokens.get(choice.ranked[0], {})
            self._metrics.scored(scored.prompt_tokens, matched, scored.stage_s)

    async def _load_tokenizer(self, mirror: Mirror, prompts: PromptService) -> None:
        """Load the tokenizer as soon as an engine has said which, before the first request needs it."""
        while (spec := mirror.spec()) is None:  # noqa: ASYNC110  # it is a thread that sets it
            await asyncio.sleep(0.1)
        try:
            await prompts.encoder(spec)
        except Exception:
            logger.exception("kvcache: tokenizer %r cannot be loaded; requests are not scored", spec.tokenizer)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a task until it is done: the loop itself only has a weak reference."""
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _body_of(request: PendingRequest | None) -> Mapping[str, Any] | None:
    """The parsed OpenAI body. LLMRouter passes a namespace of it, the OpenAI ingress vLLM's request model."""
    if request is None or not request.args:
        return None
    payload = request.args[0]
    if hasattr(payload, "model_dump"):
        dumped: Mapping[str, Any] = payload.model_dump(exclude_unset=True)
        return dumped
    body = getattr(payload, "__dict__", None)
    return body if isinstance(body, dict) and ("messages" in body or "prompt" in body) else None
