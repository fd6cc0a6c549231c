"""The request router of the LLM deployment: one decision per request, on public Ray Serve hooks.

Serve calls `choose_replicas` in the process that routes: LLMRouter with direct streaming, otherwise the OpenAI
ingress. It must never raise and never wait long: whatever is missing, the request goes to the least-loaded replica,
and the decision is counted under the reason.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from cachetools import LRUCache
from ray.serve._private.common import DeploymentHandleSource, ReplicaID
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import MultiplexMixin
from ray.serve.request_router import RequestRouter

from serve_app.accounting import reads_cache
from serve_app.config import RouterSettings
from serve_app.deployments import rank_header, routed
from serve_app.deployments.embedded_redis import resolve_redis_url
from serve_app.deployments.metrics import IndexMetrics, RouterMetrics
from serve_app.deployments.stages import RemoteIndex, RemotePrompts, graph_handle, remote_tokenize
from serve_app.errors import IndexUnavailable, PromptError
from serve_app.index.mirror import Mirror
from serve_app.index.router_log import RouterLog
from serve_app.indexer import Indexer, IndexStage, LocalIndex, PromptStage
from serve_app.limits import check_prompts
from serve_app.loop_watch import LoopWatch
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.service import PromptService, Tokenize
from serve_app.routing.choice import Choice, Outcome, Policy
from serve_app.routing.chooser import Chooser, Sent
from serve_app.routing.desk import Desk
from serve_app.routing.ranks import Ranks
from serve_app.routing.receipts import last_expected, receipt
from serve_app.supervision import Backoff, ErrorLog, LoopGuard
from serve_app.types import BlockKeys, Found, ModelId, PodId, Tier, short_id

logger = logging.getLogger("ray.serve")

_CATCH_UP_S = 0.25  # without a decision; with each it is done anyway
_REMEMBERED_DECISIONS = 1024  # until Serve says who got the request; with direct streaming it never does


class _Decision(NamedTuple):
    sent: Sent
    found: Found | None
    choice: Choice


class KVCacheAwareRouter(MultiplexMixin, RequestRouter):
    """Sends each request to the replica that holds the longest part of its prompt in KV cache.

    Turn it on in the `deployment_config` of any Ray Serve LLM config (configs/serve-llm-drop-in.yaml). Its
    `request_router_kwargs` are a `RouterSettings`.
    """

    def initialize_state(self, **settings: Any) -> None:
        self._settings = RouterSettings(**settings)
        self._id = uuid.uuid4().hex[:12]
        self._chooser = Chooser(
            self._held, self._settings.policy, self._settings.strategy, self._settings.cost.weights()
        )
        self._ranks = Ranks()
        self._told_of_ranks = False
        self._failures = ErrorLog("kvcache: a request could not be scored; it goes to the least-loaded replica", logger)
        self._ranks_as_of = -1  # joins and loads that the mirror had seen
        self._sent: LRUCache[str, _Decision] = LRUCache(_REMEMBERED_DECISIONS)  # by Ray's id of the request
        self._started = False
        self._indexer: Indexer | None = None
        self._mirror: Mirror | None = None
        self._desk: Desk | None = None
        self._log: RouterLog | None = None
        self._metrics: RouterMetrics | None = None
        self._background: set[asyncio.Task[Any]] = set()
        # Every proxy makes a router of its own that it hardly ever asks: there the heavy parts start on first use.
        if self._handle_source != DeploymentHandleSource.PROXY:
            self._start()

    def _start(self) -> None:
        """What fails here is tried again with the next request."""
        if self._metrics is None:  # it has a thread of its own: one is enough, however often this is tried
            self._metrics = RouterMetrics(self._settings.model)
        if self._settings.policy is not Policy.ROUND_ROBIN:
            self._follow_index()
        self._started = True

    def _follow_index(self) -> None:
        settings = self._settings
        self._mirror = Mirror(
            resolve_redis_url(settings.redis_url),
            ModelId(settings.model),
            max_blocks=settings.max_blocks,
            tier_order=[Tier(tier) for tier in settings.tier_order],
            bury=True,
        )
        self._mirror.start()
        self._index_metrics = IndexMetrics(self._mirror, settings.model)
        self._desk = Desk(self._mirror, self._chooser, self._id)
        self._log = RouterLog(resolve_redis_url(settings.redis_url), ModelId(settings.model), self._id)
        self._log.start()
        self._keep(self._event_loop.create_task(self._catch_up_when_idle()))
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
        """All candidates, one after the other, best first. Where they have data parallel ranks, these are compared."""
        if pending_request is not None:
            # Without it Serve asks again in a tight loop while every replica is full.
            pending_request.routing_context.should_backoff = True
        replicas = {PodId(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        try:
            ranked = await self._decide(replicas, pending_request)
        except Exception as error:
            self._failures.failed(error)
            ranked = self._least_loaded(self._pods(replicas))
        best = self._ranks.best(ranked)
        self._name_ranks(best, pending_request)
        return [[replicas[replica]] for replica in best]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        there = [PodId(replica.replica_id.unique_id) for replica in replicas]
        self._ranks.keep_only(there)
        self._ranks_as_of = -1  # those of a new replica may have joined before Serve has told of it
        self._chooser.keep_only(self._pods(there))

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Remember who got the request: for the header of the ordinary ingress, and if the first choice refused it."""
        request_id, replica = pending_request.metadata.request_id, PodId(replica_id.unique_id)
        decision = self._sent.pop(pending_request.metadata.internal_request_id, None)
        pod = replica if decision is None else self._ranks.best(decision.choice.ranked).get(replica, replica)
        routed.remember(request_id, pod if rank_header.can_name(pending_request) else replica)
        if decision is not None and decision.sent.pod != pod:
            self._chooser.withdraw(decision.sent)
            self._chooser.sent(pod, decision.found, decision.choice, time.monotonic())
            if self._desk is not None:
                self._desk.receipts.moved(short_id(request_id), pod)

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _decide(
        self, replicas: Mapping[PodId, RunningReplica], request: PendingRequest | None
    ) -> Sequence[PodId]:
        """All of them, best first; the first has the request booked."""
        if not self._started:
            self._start()
        start_s = time.perf_counter()
        self._learn_ranks()
        pods = self._pods(replicas)
        found, why = await self._find(pods, request)
        self._catch_up(pods)
        now_s = time.monotonic()
        session = short_id(request.metadata.session_id) if request is not None else ""
        choice = self._chooser.choose(pods, found, now_s, why=why, session=session)
        choice = choice.with_last(self._full(replicas, now_s))
        if choice.ranked:
            self._book(choice, found, request, now_s, time.perf_counter() - start_s)
        return choice.ranked

    def _least_loaded(self, pods: Iterable[PodId]) -> Sequence[PodId]:
        """A choice that rests on nothing that is known of the request."""
        now_s = time.monotonic()
        choice = self._chooser.choose(sorted(pods), None, now_s, why="error")
        if self._metrics is not None:
            self._metrics.decided(Outcome.FALLBACK, "error", 0.0)
        if choice.ranked:
            self._chooser.sent(choice.ranked[0], None, choice, now_s)
        return choice.ranked

    async def _find(self, pods: list[PodId], request: PendingRequest | None) -> tuple[Found | None, str]:
        """What is known, or None and the reason why nothing is; also why it is of a part of the prompt only."""
        if self._indexer is None or self._settings.policy is not Policy.KV_AWARE:
            return None, ""
        body = _body_of(request)
        if body is None:
            return None, "no_body"
        try:
            check_prompts(body, self._settings.limits)
            found = await asyncio.wait_for(self._indexer.find(body, pods), self._settings.decision_deadline_s)
            return found if reads_cache(body) else found.without_matches(), found.incomplete
        except PromptError as error:
            return None, error.reason
        except IndexUnavailable:
            return None, "no_index"
        except TimeoutError:
            return None, "deadline"
        except Exception as error:
            self._failures.failed(error)
            return None, "error"

    def _book(
        self, choice: Choice, found: Found | None, request: PendingRequest | None, now_s: float, decision_s: float
    ) -> None:
        """The first of the ranked pods gets the request: note it where it counts."""
        assert self._metrics is not None
        pod = choice.ranked[0]
        # Ray's own id: a client may give several requests the same x-request-id.
        before = self._sent.pop(request.metadata.internal_request_id, None) if request is not None else None
        if before is not None:  # Serve asks again when every replica was full
            self._chooser.withdraw(before.sent)
        sent = self._chooser.sent(pod, found, choice, now_s)
        if before is None:
            self._metrics.decided(choice.outcome, choice.reason, decision_s)
            if found is not None:
                self._metrics.found(found.prompt_tokens, found.matched_tokens(pod), found.stage_s)
        if request is None or self._desk is None or self._log is None:
            return
        self._sent[request.metadata.internal_request_id] = _Decision(sent, found, choice)
        if found is not None and (before is None or before.sent.pod != pod):
            for route in self._chooser.route(sent, found):
                self._log.routed(route)
        if choice.outcome is not Outcome.BASELINE:
            new = receipt(short_id(request.metadata.request_id), self._id, time.time(), decision_s, pod, choice, found)
            expected = last_expected(found, pod, choice)
            if (oldest := self._desk.receipts.open(new, expected, again=before is not None)) is not None:
                self._log.receipt(msgspec.json.encode(oldest))

    def _full(self, replicas: Mapping[PodId, RunningReplica], now_s: float) -> set[PodId]:
        """What is behind replicas that have as many requests as they may have."""
        full: set[PodId] = set()
        for name, replica in replicas.items():
            pods = self._ranks.pods(name)
            if sum(self._chooser.in_flight.count(pod, now_s) for pod in pods) >= replica.max_ongoing_requests:
                full.update(pods)
        return full

    def _pods(self, replicas: Iterable[PodId]) -> list[PodId]:
        """What can be chosen: replicas, or where they have any, their data parallel ranks."""
        return sorted(pod for replica in replicas for pod in self._ranks.pods(replica))

    def _learn_ranks(self) -> None:
        """Take in which pods are behind which replica, if a record has come since this was done last."""
        if self._mirror is None:
            return
        as_of = self._mirror.counters["join"] + self._mirror.counters["loads"]
        if as_of != self._ranks_as_of:
            self._ranks.learn(domain for domain, _, _ in self._mirror.domains())
            self._ranks_as_of = as_of

    def _name_ranks(self, best: Mapping[PodId, PodId], request: PendingRequest | None) -> None:
        """Tell the engine which of its ranks was chosen, whichever replica takes the request."""
        ranks = {replica: rank for replica, pod in best.items() if (rank := self._ranks.rank(pod)) is not None}
        if not ranks or request is None:
            return
        if rank_header.can_name(request):
            rank_header.name(request, ranks)
        elif not self._told_of_ranks:
            self._told_of_ranks = True
            logger.warning(
                "kvcache: data parallel ranks cannot be named to the engine on this way in, so it takes one itself, "
                "and a replica counts as its best rank (README, `Data parallel ranks`)"
            )

    def _held(self, pods: Sequence[PodId], keys: BlockKeys) -> list[bool]:
        return self._mirror.held(pods, keys) if self._mirror is not None else [False] * len(pods)

    def _catch_up(self, pods: Sequence[PodId]) -> None:
        if self._desk is None or self._log is None or self._metrics is None:
            return
        for complete in self._desk.catch_up(pods):
            self._log.receipt(msgspec.json.encode(complete))
            self._metrics.served(complete)

    async def _catch_up_when_idle(self) -> None:
        assert self._metrics is not None
        self._metrics.watch(LoopWatch(logger))
        guard = LoopGuard("kvcache: the router could not take in what is new", Backoff(_CATCH_UP_S), logger)
        wait_s = _CATCH_UP_S
        while True:
            await asyncio.sleep(wait_s)
            wait_s = _CATCH_UP_S
            try:
                self._catch_up(())
                if self._desk is not None and self._log is not None:
                    self._log.distrust(self._desk.distrusted())
                guard.went_well()
            except Exception as error:  # whatever it is, the next turn may do without
                wait_s = guard.failed(error)

    async def _load_tokenizer(self, mirror: Mirror, prompts: PromptService) -> None:
        """Load the tokenizer as soon as an engine has said which, before the first request needs it."""
        while (spec := mirror.spec()) is None:  # noqa: ASYNC110  # it is a thread that sets it
            await asyncio.sleep(0.1)
        with contextlib.suppress(Exception):  # it has said why itself; a request tries again
            await prompts.encoder(spec)

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
