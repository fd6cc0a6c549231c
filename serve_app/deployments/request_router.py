"""The request router of the LLM deployment on public Ray Serve hooks: Serve asks `choose_replicas` for every request.

It does so in the process that routes: LLMRouter with direct streaming, otherwise the OpenAI ingress. Beside our own
ingress request router (`ingress_router.py`) it is only told which replicas there are. What is decided, and how, is in
`serve_app/decider.py`.
"""

import logging
from collections.abc import Mapping
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, ReplicaID
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import MultiplexMixin
from ray.serve.request_router import RequestRouter

from serve_app.config import RouterSettings
from serve_app.decider import Asked, Decider
from serve_app.deployments import rank_header, routed
from serve_app.deployments.ray_host import RayHost
from serve_app.types import PodId

logger = logging.getLogger("ray.serve")


class KVCacheAwareRouter(MultiplexMixin, RequestRouter):
    """Sends each request to the replica that holds the longest part of its prompt in KV cache.

    Turn it on in the `deployment_config` of any Ray Serve LLM config (configs/serve-llm-drop-in.yaml). Its
    `request_router_kwargs` are a `RouterSettings`.
    """

    def initialize_state(self, **settings: Any) -> None:
        router = RouterSettings(**settings)
        self.explains = router.explain
        self.decider = Decider(router, self._event_loop, RayHost(router))
        self._told_of_ranks = False
        self._running: dict[PodId, RunningReplica] = {}
        self.room: dict[PodId, int] = {}  # requests that each of them may have at once
        # Every proxy makes a router of its own that it hardly ever asks: there the heavy parts start on first use.
        if self._handle_source != DeploymentHandleSource.PROXY:
            self.decider.start()
            routed.set_router(self)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All candidates, one after the other, best first. Where they have data parallel ranks, these are compared."""
        if pending_request is not None:
            # Without it Serve asks again in a tight loop while every replica is full.
            pending_request.routing_context.should_backoff = True
        replicas = {PodId(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        room = {name: replica.max_ongoing_requests for name, replica in replicas.items()}
        decision = await self.decider.decide(room, _asked(pending_request))
        self._name_ranks(decision.best, pending_request)
        if self.explains and pending_request is not None and decision.best:
            routed.explain(pending_request.metadata.request_id, decision.explained(next(iter(decision.best))))
        return [[replicas[replica]] for replica in decision.best]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._running = {PodId(replica.replica_id.unique_id): replica for replica in replicas}
        self.room = {name: replica.max_ongoing_requests for name, replica in self._running.items()}
        self.decider.keep_only(list(self._running))

    def running(self) -> dict[PodId, RunningReplica]:
        """The replicas that Serve has told of."""
        return self._running

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Remember who got the request: for the header of the ordinary ingress, and if the first choice refused it."""
        metadata, replica = pending_request.metadata, PodId(replica_id.unique_id)
        pod = self.decider.taken(metadata.internal_request_id, metadata.request_id, replica)
        routed.remember(metadata.request_id, pod if rank_header.can_name(pending_request) else replica)

    def _name_ranks(self, best: Mapping[PodId, PodId], request: PendingRequest | None) -> None:
        """Tell the engine which of its ranks was chosen, whichever replica takes the request."""
        ranks = {replica: rank for replica, pod in best.items() if (rank := self.decider.ranks.rank(pod)) is not None}
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


def _asked(request: PendingRequest | None) -> Asked | None:
    if request is None:
        return None
    # Ray's own id as the key: a client may give several requests the same x-request-id.
    metadata = request.metadata
    return Asked(metadata.request_id, metadata.internal_request_id, metadata.session_id, _body_of(request))


def _body_of(request: PendingRequest) -> Mapping[str, Any] | None:
    """The parsed OpenAI body. LLMRouter passes a namespace of it, the OpenAI ingress vLLM's request model."""
    if not request.args:
        return None
    payload = request.args[0]
    if hasattr(payload, "model_dump"):
        dumped: Mapping[str, Any] = payload.model_dump(exclude_unset=True)
        return dumped
    body = getattr(payload, "__dict__", None)
    return body if isinstance(body, dict) and ("messages" in body or "prompt" in body) else None
