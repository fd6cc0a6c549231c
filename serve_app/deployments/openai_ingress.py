"""The OpenAI ingress for when direct streaming is off: Ray Serve LLM's own, plus the header that names the replica."""

from typing import Any

from fastapi import Request, Response
from ray import serve
from ray.serve.llm.ingress import OpenAiIngress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

from serve_app.config import REPLICA_HEADER
from serve_app.deployments import routed


class KVCacheIngress(OpenAiIngress):
    """`ingress_cls_config.ingress_cls` of a Ray Serve LLM application.

    Args:
        redis: is deployed with this one.
    """

    def __init__(self, *args: Any, redis: object = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        return _named(await super().chat(body, request))

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        return _named(await super().completions(body, request))


def _named(response: Response) -> Response:
    """The first chunk is there, so the request has been routed, by a router in this process."""
    request_id = serve.context._get_serve_request_context().request_id
    replica = routed.replica_of(request_id)
    if replica is not None:
        response.headers[REPLICA_HEADER] = replica
    response.headers.update(routed.explanation(request_id))
    return response
