"""Our ingress request router: HAProxy asks it, for every POST to the application, which replica gets the request.

    HAProxy (Ray's Lua)  --POST /internal/route, the client's body-->  RouteEndpoint  -->  Decider
                         <--{"replica_id": ..., "request_headers": {...}}--

It takes the place of Ray's LLMRouter. Its answers come from an ASGI middleware in front of Serve's own request path,
on the event loop that the decider runs on: bytes, JSON, decision, bytes. Serve makes the deployment, starts and stops
it, checks its health, and tells the KVCacheAwareRouter in this process which replicas there are.

The wire, as ray/serve/_private/ingress_request_router.lua.tmpl of Ray 2.60 has it: headers `x-request-id`, the session
header, `x-body-truncated: have/whole`, and from our HAProxy (`serve_app/haproxy.py`) `x-kvcache-path`. A replica that
HAProxy does not know means: balance plainly.

What is private in Ray and used here: `Application._with_ingress_request_router`, `DeploymentHandle._init`, the
environment variables in `FAST`, and that HAProxy looks for `/internal/route`. `can_be_used` looks for them.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve import Application
from ray.serve._private.constants import SERVE_MULTIPLEXED_MODEL_ID
from ray.serve._private.http_util import _matches_session_id_header
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.decider import Asked, Decision
from serve_app.deployments import rank_header, routed
from serve_app.deployments.request_router import KVCacheAwareRouter
from serve_app.errors import IndexUnavailable
from serve_app.prompts.forms import GENERATION_PATHS
from serve_app.types import PodId

logger = logging.getLogger("ray.serve")

ROUTE_PATH = "/internal/route"
PATH_HEADER = b"x-kvcache-path"
_TRUNCATED_HEADER = b"x-body-truncated"
_REQUEST_ID_HEADER = b"x-request-id"
_RAY_VERSION = "2.60."
_BALANCE_PLAINLY = b'{"replica_id": "none"}'
_ANSWER_HEADERS = [(b"content-type", b"application/json")]

# Of the router's own processes. Serve answers `/internal/route` on the loop that everything else here runs on, and
# nothing is handed over to another thread.
FAST = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.deployments.ingress_router.middlewares",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}

_NOT_IN_LUA = frozenset('"\\{}')  # by which its patterns find the headers in the answer, without reading JSON
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class IngressRouter:
    """The deployment.

    Args:
        server: the LLM deployment, whose router class is KVCacheAwareRouter.
        base_model: see `with_ingress_router`.
    """

    def __init__(self, server: DeploymentHandle[Any], base_model: str = "") -> None:
        self._server = server
        server._init()  # makes the KVCacheAwareRouter of this process
        routed.base_model = base_model

    def check_health(self) -> None:
        router = routed.router()
        if router is None:
            raise IndexUnavailable("the router of this process is not there")
        router.decider.check_alive()

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """For people: what HAProxy asks, the middleware has answered before."""

        async def health(_: Request) -> Response:
            self.check_health()
            return PlainTextResponse("ok\n")

        return Starlette(routes=[Route("/health", health)])


class RouteEndpoint:
    """ASGI middleware in front of Serve's request path. It answers what HAProxy asks, and hands on everything else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != ROUTE_PATH:
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # HAProxy has gone
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        answer = await _answer(scope["headers"], b"".join(parts))
        await send({"type": "http.response.start", "status": 200, "headers": _ANSWER_HEADERS})
        await send({"type": "http.response.body", "body": answer})


def middlewares() -> list[Middleware]:
    """What Serve puts in front of the HTTP server of a process that has `FAST` in its environment."""
    return [Middleware(RouteEndpoint)]


def can_be_used() -> str:
    """Why it cannot, with this Ray; empty: it can."""
    if not ray.__version__.startswith(_RAY_VERSION):
        return f"it is made for Ray {_RAY_VERSION}x, and this is {ray.__version__}"
    for owner, name in ((Application, "_with_ingress_request_router"), (DeploymentHandle, "_init")):
        if not hasattr(owner, name):
            return f"this Ray has no {owner.__name__}.{name}"
    return ""


def with_ingress_router(application: Application, base_model: str = "") -> Application:
    """The same application, with IngressRouter in the place of its LLMRouter.

    Args:
        application: of `ray.serve.llm.build_openai_app`, with direct streaming.
        base_model: model id of the base, if adapters are loaded at need; empty: they are not.
    """
    router = serve.deployment(
        name="IngressRouter",
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": FAST}},
        logging_config={"enable_access_log": False},
    )(serve.ingress()(IngressRouter))
    return application._with_ingress_request_router(router.bind(application, base_model))


async def _answer(headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bytes:
    router = routed.router()
    replicas = router.running() if router is not None else {}
    if router is None or not replicas:
        return _BALANCE_PLAINLY
    try:
        asked, is_generation = _asked(headers, body)
        if not is_generation:
            return _encode(replicas[router.decider.least_loaded(replicas)].replica_id.to_full_id_str(), {})
        decision = await router.decider.decide(router.room, asked)
        best = next(iter(decision.best))
        return _encode(replicas[best].replica_id.to_full_id_str(), _request_headers(router, decision, best, asked))
    except Exception as error:
        router.decider.failed(error)
        return _BALANCE_PLAINLY


def _asked(headers: Sequence[tuple[bytes, bytes]], body: bytes) -> tuple[Asked, bool]:
    """The request, and whether it is one that makes tokens, as far as its path tells."""
    request_id = session = path = ""
    truncated = False
    for name, value in headers:
        if name == _REQUEST_ID_HEADER:
            request_id = value.decode("latin-1")
        elif name == PATH_HEADER:
            path = value.decode("latin-1")
        elif name == _TRUNCATED_HEADER:
            truncated = True
        elif _matches_session_id_header(name.decode("latin-1")):
            session = value.decode("latin-1")
    is_generation = not path or path.rstrip("/").endswith(GENERATION_PATHS)
    if truncated:
        return Asked(request_id, session=session, why_no_body="body_too_long"), is_generation
    try:
        return Asked(request_id, session=session, body=_decode(body)), is_generation
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return Asked(request_id, session=session), is_generation


def _request_headers(router: KVCacheAwareRouter, decision: Decision, best: PodId, asked: Asked) -> Mapping[str, str]:
    """What HAProxy is to set on the request to the replica."""
    headers: dict[str, str] = {}
    if (rank := router.decider.ranks.rank(decision.best[best])) is not None:
        headers[rank_header.ENGINE_HEADER] = str(rank)
    if adapter := _adapter(asked.body):
        headers[SERVE_MULTIPLEXED_MODEL_ID] = adapter
    if router.explains:
        headers |= decision.explained(best)
    return headers


def _adapter(body: Mapping[str, Any] | None) -> str:
    """The adapter that the request names, if the replicas load adapters at need: `base:adapter`, as Ray names them."""
    base, model = routed.base_model, body.get("model") if body is not None else None
    if not base or not isinstance(model, str) or not model.startswith(f"{base}:"):
        return ""
    return "" if _NOT_IN_LUA.intersection(model) else model


def _encode(replica: str, request_headers: Mapping[str, str]) -> bytes:
    """Flat, as the Lua's patterns need it."""
    answer: dict[str, Any] = {"replica_id": replica}
    if request_headers:
        answer["request_headers"] = request_headers
    return msgspec.json.encode(answer)
