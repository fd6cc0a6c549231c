"""Ingress of the graph: the Score API over HTTP.

POST /kvcache/v1/score     an OpenAI request body, plus optional `pods` and `strategy`  ->  ScoreAnswer
PUT  /kvcache/v1/score     the same, for HAProxy as Ray runs it (without `kvcache-haproxy`): that has the LLM router
                           decide on every POST, whatever its path, and a question would be taken for a request.
GET  /kvcache/v1/pods      what the index knows of every pod
GET  /kvcache/v1/receipts  the routers' last decisions, each with what came of it
GET  /kvcache/health

Errors have OpenAI's shape: 4xx where the request or its key is to blame, 503 where it is a part of the graph.
With `auth.keys_file` all but /health want a key (serve_app/access.py); the limits hold always (serve_app/limits.py).
"""

import logging
import math
import pickle
import time
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.access import Access, AccessDenied, Caller, check_admin, check_salt
from serve_app.config import GraphArgs
from serve_app.deployments.listening import reachable_host
from serve_app.deployments.stages import RemoteIndex, RemotePrompts
from serve_app.errors import IndexUnavailable, PromptError
from serve_app.index.router_log import RECEIPTS_MAX
from serve_app.indexer import Indexer
from serve_app.limits import LimitExceeded, Turnstile, check_ids, check_prompts, parse, read_body
from serve_app.routing.choice import Cost
from serve_app.scoring import Strategy, score_all
from serve_app.types import Found, PodId, Trust

logger = logging.getLogger("ray.serve")

app = FastAPI(title="KVCache Manager")


class PodScore(BaseModel):
    score: float
    matched_tokens: dict[str, int] = Field(description="Contiguous prefix by tier, fastest tier first.")
    trust: Trust = Field(description="exact; degraded: some events were lost; stale: news are overdue.")
    cost_s: dict[str, float] | None = Field(
        None, description="With `expected_ttft`: the terms of the cost, in seconds (serve_app/routing/choice.py)."
    )


class ScoreAnswer(BaseModel):
    model: str
    strategy: Strategy
    prompt_tokens: int
    block_size: int
    complete: bool = Field(
        description="False: only the known beginning of the prompt is scored, up to an image or to text that is new."
    )
    scores: dict[str, float] = Field(
        description="The best is the largest. With `expected_ttft` it is minus the expected cost in seconds."
    )
    pods: dict[str, PodScore]


class _Extra(BaseModel):
    """What the Score API takes beside the OpenAI fields; they are removed before the prompt is looked at."""

    pods: list[str] | None = None
    strategy: Strategy | None = None


# Above the class: serve.ingress pickles the endpoints with what they refer to at that moment.
def _error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """OpenAI's error shape."""
    error = {"error": {"message": message, "type": "invalid_request_error", "code": code}}
    return JSONResponse(error, status, headers)


def _denied(error: AccessDenied) -> JSONResponse:
    return _error(error.status, error.code, str(error), {"www-authenticate": "Bearer"} if error.status == 401 else None)


def _beyond(error: LimitExceeded) -> JSONResponse:
    headers = {"retry-after": str(math.ceil(error.retry_after_s))} if error.status == 429 else None
    return _error(error.status, error.code, str(error), headers)


_TOO_MUCH = {"body_too_long": 413, "body_too_deep": 422, "many_prompts": 422}
"""Statuses of a PromptError's reasons that are limits."""


def _stage_failed(error: Exception) -> JSONResponse:
    """A deployment did not answer, or failed; its own log has the whole story."""
    logger.warning("kvcache: a stage of the graph failed: %r", error)
    return _error(503, "stage_failed", "a deployment of the graph is not available or has failed; its log says why")


@serve.ingress(app)
class Scorer:
    """`redis`, the embedded Valkey's handle, is not called: binding it here makes it part of the application."""

    def __init__(
        self,
        args: GraphArgs,
        prefix_store: DeploymentHandle[Any],
        block_index: DeploymentHandle[Any],
        redis: DeploymentHandle[Any] | None = None,
    ) -> None:
        self._model = args.model
        self._limits = args.limits
        self._turnstile = Turnstile(args.limits)
        self._access = Access(args.auth.keys_file)
        if self._access.is_open and (host := reachable_host()):
            logger.warning(
                "kvcache: the Score API listens on %s without keys: whoever reaches it can find out which prompts are "
                "cached, and read receipts; set auth.keys_file, or http_options.host to 127.0.0.1",
                host,
            )
        self._block_index = block_index
        self._indexer = Indexer(RemotePrompts(lambda: prefix_store), RemoteIndex(lambda: block_index), args.strategy)

    @app.post("/v1/score", response_model=ScoreAnswer)
    @app.put("/v1/score", response_model=ScoreAnswer)
    async def score(self, request: Request) -> ScoreAnswer | JSONResponse:
        """Score the pods for the prompt in an OpenAI request body."""
        try:
            caller = self._access.caller(request.headers, time.monotonic())
            self._turnstile.enter(caller.name, time.monotonic())
        except AccessDenied as error:
            return _denied(error)
        except LimitExceeded as error:
            return _beyond(error)
        try:
            return await self._answer(request, caller)
        finally:
            self._turnstile.leave()

    async def _answer(self, request: Request, caller: Caller) -> ScoreAnswer | JSONResponse:
        try:
            declared = request.headers.get("content-length")
            body = parse(await read_body(request.stream(), declared, self._limits), self._limits)
            check_salt(caller, body)
            check_prompts(body, self._limits)
            extra = _Extra.model_validate({k: body.pop(k) for k in _Extra.model_fields if k in body})
            check_ids(extra.pods, self._limits)
        except AccessDenied as error:
            return _denied(error)
        except LimitExceeded as error:
            return _beyond(error)
        except PromptError as error:
            status = _TOO_MUCH.get(error.reason, 400)
            return _error(status, error.reason if status != 400 else "invalid_request", str(error))
        except ValidationError as error:
            return _error(400, "invalid_request", str(error))
        strategy = extra.strategy or self._indexer.strategy
        pods = None if extra.pods is None else [PodId(pod) for pod in extra.pods]
        try:
            found = await self._indexer.find(body, pods, strategy)
            scores, costs = await self._scores(found, strategy)
        except PromptError as error:
            status = 503 if error.reason in PromptError.NOT_NOW else _TOO_MUCH.get(error.reason, 400)
            return _error(status, error.reason, str(error))
        except IndexUnavailable as error:
            return _error(503, "index_unavailable", str(error))
        except (RecursionError, pickle.PicklingError):  # it could be decoded, and not be sent to the next stage
            return _error(400, "invalid_request", "the body is nested too deeply")
        except (RayError, RayServeException) as error:
            return _stage_failed(error)
        return ScoreAnswer(
            model=self._model,
            strategy=strategy,
            prompt_tokens=found.prompt_tokens,
            block_size=found.block_size,
            complete=found.complete,
            scores={str(pod): value for pod, value in scores.items()},
            pods={
                str(pod): PodScore(
                    score=value,
                    matched_tokens={str(tier): n for tier, n in found.matched_tokens(pod).items()},
                    trust=found.trust(pod),
                    cost_s=costs[pod]._asdict() if pod in costs else None,
                )
                for pod, value in scores.items()
            },
        )

    async def _scores(self, found: Found, strategy: Strategy) -> tuple[dict[PodId, float], Mapping[PodId, Cost]]:
        """A score for each pod, and where it is made of costs, these."""
        if strategy is not Strategy.EXPECTED_TTFT:
            return score_all(found, strategy), {}
        costs: Mapping[PodId, Cost] = await self._block_index.costs.remote(found)
        return {pod: -cost.total_s for pod, cost in costs.items()}, costs

    @app.get("/v1/pods", response_model=None)
    async def pods(self, request: Request) -> dict[str, Any] | JSONResponse:
        """What the index knows of every pod."""
        if (refused := self._refused(request)) is not None:
            return refused
        answer: dict[str, Any] = await self._block_index.describe.remote()
        return {"model": self._model, **answer}

    @app.get("/v1/receipts", response_model=None)
    async def receipts(
        self, request: Request, limit: Annotated[int, Query(ge=1, le=RECEIPTS_MAX)] = 50
    ) -> list[dict[str, Any]] | JSONResponse:
        """The last decisions that are complete, newest first."""
        if (refused := self._refused(request)) is not None:
            return refused
        encoded: list[bytes] = await self._block_index.receipts.remote(limit)
        return [msgspec.json.decode(one, type=dict[str, Any]) for one in encoded]

    def _refused(self, request: Request) -> JSONResponse | None:
        """The answer to who may not see everybody's."""
        try:
            check_admin(self._access.caller(request.headers, time.monotonic()))
        except AccessDenied as error:
            return _denied(error)
        return None

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}
