"""The service over HTTP.

POST /v1/score        an OpenAI request body, plus optional `pods` and `strategy`         -> ScoreAnswer
PUT  /v1/score        the same, for HAProxy as Ray runs it (without `kvcache-haproxy`): that has the LLM router decide
                      on every POST, whatever its path, and a question would be taken for a request.
POST /v1/score/batch  {"requests": [...]}, each as above                                   -> BatchAnswer
POST /v1/choose       the same body, plus `pods`, `request_id`, `session`, `lease_s`, ...  -> ChooseAnswer
POST /v1/done         what has become of a choice                                          -> Done
POST /v1/explain      what a choice would rest on                                          -> Explanation
GET  /v1/pods         what the index knows of every pod
GET  /v1/receipts     the last decisions, each with what came of it
GET  /v1/overview     the fleet at a glance                                                -> Overview
GET  /v1/decisions    the last decisions, or those `after` one, with their conversations   -> Decisions
GET  /                a page that shows these two (service/page.py); its files are below /page
GET  /healthz, /health, /readyz, /metrics, /openapi.json

Errors have OpenAI's shape. With keys all but the page and the last row want one (serve_app/access.py); limits
hold always.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp

from serve_app.access import Caller
from serve_app.index.router_log import RECEIPTS_MAX
from serve_app.limits import read_body
from serve_app.service.answers import Health
from serve_app.service.backend import Backend, LocalBackend
from serve_app.service.live import Live
from serve_app.service.openapi import document
from serve_app.service.page import page_routes
from serve_app.service.refused import Refused, refusing
from serve_app.service.score_service import ScoreService
from serve_app.service.views import Decisions, Overview
from serve_app.supervision import ErrorLog

_encode = msgspec.json.Encoder(enc_hook=str).encode
_SHOWN_RECEIPTS = 50

Answer = TypeVar("Answer")
Failure = Callable[[Exception], Refused | None]
"""An error that the layers below do not name -> what is answered; None: it is ours."""


def http_app(
    service: ScoreService,
    *,
    logger: logging.Logger,
    metrics: Callable[[], bytes] | None = None,
    failure: Failure = lambda _: None,
    also_below: str = "",
) -> ASGIApp:
    """Args:
    metrics: Prometheus' text; None: they are shown elsewhere.
    failure: of the backends.
    also_below: a path below which everything is there once more.
    """
    routes = _Endpoints(service, logger, metrics, failure).routes()
    return Starlette(routes=[*routes, Mount(also_below, routes=routes)] if also_below else routes)


class _Endpoints:
    def __init__(
        self,
        service: ScoreService,
        logger: logging.Logger,
        metrics: Callable[[], bytes] | None,
        failure: Failure,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._failure = failure
        self._errors = ErrorLog("kvcache: a question could not be answered", logger)
        self._live = {model.model: Live(model, [str(one.model) for one in service.models]) for model in service.models}
        self._document = document(choices=any(isinstance(model, LocalBackend) for model in service.models))

    def routes(self) -> list[BaseRoute]:
        service = self._service
        asked = self._asked
        routes: list[BaseRoute] = [
            Route("/v1/score", asked(service.score), methods=["POST", "PUT"]),
            Route("/v1/score/batch", asked(service.score_batch), methods=["POST"]),
            Route("/v1/choose", asked(service.choose), methods=["POST"]),
            Route("/v1/explain", asked(service.explain), methods=["POST"]),
            Route("/v1/done", asked(lambda raw, _: service.done(raw)), methods=["POST"]),
            Route("/v1/pods", self._shown(self._pods)),
            Route("/v1/receipts", self._shown(self._receipts)),
            Route("/v1/overview", self._shown(self._overview)),
            Route("/v1/decisions", self._shown(self._decisions)),
            *page_routes(),
            Route("/healthz", self._health),
            Route("/health", self._health),
            Route("/readyz", self._ready),
            Route("/openapi.json", self._openapi),
        ]
        if self._metrics is not None:
            routes.append(Route("/metrics", self._prometheus))
        return routes

    def _asked(self, answer: Callable[[bytes, Caller], Awaitable[Answer]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that takes a body."""

        async def endpoint(request: Request) -> Response:
            try:
                with self._service.enter(request.headers) as caller:
                    return _json(await answer(await self._body(request), caller))
            except ClientDisconnect:
                return Response(status_code=400)
            except Exception as error:
                return self._refusal(error)

        return endpoint

    def _shown(self, answer: Callable[[Request], Awaitable[object]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for admins."""

        async def endpoint(request: Request) -> Response:
            try:
                self._service.check_admin(request.headers)
                return _json(await answer(request))
            except Exception as error:
                return self._refusal(error)

        return endpoint

    async def _body(self, request: Request) -> bytes:
        with refusing():
            return await read_body(request.stream(), request.headers.get("content-length"), self._service.limits)

    def _refusal(self, error: Exception) -> Response:
        refused = error if isinstance(error, Refused) else self._failure(error)
        if refused is None:
            self._errors.failed(error)
            refused = Refused(500, "internal", "this question could not be answered; the service's log says why")
        return Response(refused.body, refused.status, refused.headers, "application/json")

    async def _pods(self, request: Request) -> dict[str, Any]:
        model = self._model(request)
        return {"model": model.model, **await model.describe()}

    async def _receipts(self, request: Request) -> list[dict[str, Any]]:
        given = request.query_params.get("limit", str(_SHOWN_RECEIPTS))
        if not given.isdecimal() or not 1 <= int(given[:10]) <= RECEIPTS_MAX:
            raise Refused(422, "invalid_field", f"limit must be 1 to {RECEIPTS_MAX}", field="limit")
        kept = await self._model(request).receipts(int(given))
        return [msgspec.json.decode(one.receipt, type=dict[str, Any]) for one in kept]

    async def _overview(self, request: Request) -> Overview:
        return await self._live_of(request).overview()

    async def _decisions(self, request: Request) -> Decisions:
        asked = request.query_params
        return await self._live_of(request).decisions(asked.get("after", ""), asked.get("limit", str(_SHOWN_RECEIPTS)))

    def _live_of(self, request: Request) -> Live:
        return self._live[self._model(request).model]

    def _model(self, request: Request) -> Backend:
        return self._service.model(request.query_params.get("model", ""))

    async def _health(self, _: Request) -> Response:
        return _json(Health("ok"))

    async def _ready(self, _: Request) -> Response:
        whys = {
            str(model.model): model.why_not_ready() if isinstance(model, LocalBackend) else ""
            for model in self._service.models
        }
        not_yet = {model: {"not_ready": why} for model, why in whys.items() if why}
        return _json(Health("not ready" if not_yet else "ready", not_yet), 503 if not_yet else 200)

    async def _openapi(self, _: Request) -> Response:
        return Response(self._document, media_type="application/json")

    async def _prometheus(self, _: Request) -> Response:
        assert self._metrics is not None
        return Response(self._metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _json(answer: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_encode(answer), status, headers, "application/json")
