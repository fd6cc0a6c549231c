"""Ingress of the graph: the Score API over HTTP.

POST /kvcache/v1/score   an OpenAI request body, plus optional `pods` and `strategy`  ->  ScoreAnswer
PUT  /kvcache/v1/score   the same. With direct streaming, Ray's HAProxy has the LLM router decide on every POST that it
                         sees, whatever its path: as a PUT, a question to the Score API is not taken for a request.
GET  /kvcache/v1/pods    what the index knows of every pod
GET  /kvcache/health
"""

from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config import GraphArgs
from serve_app.deployments.stages import RemoteIndex, RemotePrompts
from serve_app.errors import IndexUnavailable, PromptError
from serve_app.indexer import Indexer
from serve_app.scoring import Strategy
from serve_app.types import PodId

app = FastAPI(title="KVCache Manager")


class PodScore(BaseModel):
    score: float
    matched_tokens: dict[str, int] = Field(description="Contiguous prefix by tier, fastest tier first.")


class ScoreAnswer(BaseModel):
    model: str
    strategy: Strategy
    prompt_tokens: int
    block_size: int
    complete: bool = Field(description="False: some text could not be tokenized, and only what is known is scored.")
    scores: dict[str, float]
    pods: dict[str, PodScore]


class _Extra(BaseModel):
    """What the Score API takes beside the OpenAI fields; they are removed before the prompt is looked at."""

    pods: list[str] | None = None
    strategy: Strategy | None = None


# Above the class: serve.ingress pickles the endpoints with what they refer to at that moment.
def _error(status: int, code: str, message: str) -> JSONResponse:
    """OpenAI's error shape."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": code}}, status)


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
        except (msgspec.DecodeError, ValidationError) as error:
            return _error(400, "invalid_request", str(error))
        pods = None if extra.pods is None else [PodId(pod) for pod in extra.pods]
        try:
            scored = await self._indexer.score(body, pods, extra.strategy)
        except PromptError as error:
            return _error(400, error.reason, str(error))
        except IndexUnavailable as error:
            return _error(503, "index_unavailable", str(error))
        return ScoreAnswer(
            model=self._model,
            strategy=extra.strategy or self._indexer.strategy,
            prompt_tokens=scored.prompt_tokens,
            block_size=scored.block_size,
            complete=scored.complete,
            scores={str(pod): value for pod, value in scored.scores.items()},
            pods={
                str(pod): PodScore(
                    score=value, matched_tokens={str(tier): n for tier, n in scored.matched_tokens[pod].items()}
                )
                for pod, value in scored.scores.items()
            },
        )

    @app.get("/v1/pods")
    async def pods(self) -> dict[str, Any]:
        """What the index knows of every pod."""
        answer: dict[str, Any] = await self._block_index.describe.remote()
        return {"model": self._model, **answer}

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}
