"""Ingress of the graph: the Score API over HTTP.

POST /kvcache/v1/score     an OpenAI request body, plus optional `pods` and `strategy`  ->  ScoreAnswer
PUT  /kvcache/v1/score     the same. With direct streaming, Ray's HAProxy has the LLM router decide on every POST,
                           whatever its path: as a PUT, a question to the Score API is not taken for a request.
GET  /kvcache/v1/pods      what the index knows of every pod
GET  /kvcache/v1/receipts  the routers' last decisions, each with what came of it
GET  /kvcache/health

Errors have OpenAI's shape: 400 where the request is to blame, 503 where it is a part of the graph.
"""

import logging
import pickle
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

from serve_app.config import GraphArgs
from serve_app.deployments.stages import RemoteIndex, RemotePrompts
from serve_app.errors import IndexUnavailable, PromptError
from serve_app.index.router_log import RECEIPTS_MAX
from serve_app.indexer import Indexer
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
def _error(status: int, code: str, message: str) -> JSONResponse:
    """OpenAI's error shape."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": code}}, status)


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
        self._block_index = block_index
        self._indexer = Indexer(RemotePrompts(lambda: prefix_store), RemoteIndex(lambda: block_index), args.strategy)

    @app.post("/v1/score", response_model=ScoreAnswer)
    @app.put("/v1/score", response_model=ScoreAnswer)
    async def score(self, request: Request) -> ScoreAnswer | JSONResponse:
        """Score the pods for the prompt in an OpenAI request body."""
        try:
            body = msgspec.json.decode(await request.body(), type=dict[str, Any])
            extra = _Extra.model_validate({k: body.pop(k) for k in _Extra.model_fields if k in body})
        except (msgspec.DecodeError, ValidationError, RecursionError) as error:
            return _error(400, "invalid_request", str(error))
        strategy = extra.strategy or self._indexer.strategy
        pods = None if extra.pods is None else [PodId(pod) for pod in extra.pods]
        try:
            found = await self._indexer.find(body, pods, strategy)
            scores, costs = await self._scores(found, strategy)
        except PromptError as error:
            return _error(503 if error.reason in PromptError.NOT_NOW else 400, error.reason, str(error))
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

    @app.get("/v1/pods")
    async def pods(self) -> dict[str, Any]:
        """What the index knows of every pod."""
        answer: dict[str, Any] = await self._block_index.describe.remote()
        return {"model": self._model, **answer}

    @app.get("/v1/receipts")
    async def receipts(self, limit: Annotated[int, Query(ge=1, le=RECEIPTS_MAX)] = 50) -> list[dict[str, Any]]:
        """The last decisions that are complete, newest first."""
        encoded: list[bytes] = await self._block_index.receipts.remote(limit)
        return [msgspec.json.decode(one, type=dict[str, Any]) for one in encoded]

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}
