"""LLMRouter for engines with data parallel ranks: its answer to HAProxy also names the rank.

HAProxy asks `POST /internal/route` where a request goes, and sets the headers that the answer has in `request_headers`
on the request to the replica (ray/serve/_private/ingress_request_router.lua.tmpl). LLMRouter of Ray 2.60 names headers
of its own only, so this takes its place. `Application` has no public way to do that.
"""

from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from ray.llm._internal.serve.core.ingress.router import LLMRouter
from ray.serve import Application
from ray.serve._private.common import ReplicaID

from serve_app.deployments import routed
from serve_app.deployments.rank_header import ENGINE_HEADER
from serve_app.types import PodId

_PlainRouter: Any = LLMRouter.__bases__[0]  # the class that Ray has made an ingress of

app = FastAPI()


@serve.ingress(app)
class RankNamingRouter(_PlainRouter):  # type: ignore[misc]  # see above
    """The KVCacheAwareRouter in this process leaves the rank of each decision in `routed`."""

    async def __init__(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        routed.hand_over_ranks()
        await super().__init__(*args, **kwargs)

    @app.post("/internal/route")
    async def route(self, request: Request) -> dict[str, Any]:
        answer: dict[str, Any] = await super().route(request)
        replica = ReplicaID.from_full_id_str(answer["replica_id"]).unique_id
        rank = routed.take_rank(serve.context._get_serve_request_context().request_id, PodId(replica))
        if rank is not None:
            answer.setdefault("request_headers", {})[ENGINE_HEADER] = str(rank)
        return answer

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}


def with_rank_names(application: Application) -> Application:
    """The same application, with RankNamingRouter in the place of its LLMRouter."""
    router = application._ingress_request_router
    assert router is not None  # direct streaming has one
    named = Application(router._bound_deployment.options(func_or_class=RankNamingRouter))
    return application._with_ingress_request_router(named)
