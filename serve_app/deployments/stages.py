"""The Indexer's stages as calls to the graph's deployments."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.errors import PromptError
from serve_app.indexer import Body
from serve_app.prompts.service import Tokenize
from serve_app.prompts.tokenizer import Segment
from serve_app.types import BlockKeys, EncodedKeys, EngineSpec, PodId, PodMatch, TokenizerSource

GetHandle = Callable[[], DeploymentHandle[Any]]

_SPEC_MAX_AGE_S = 1.0


def graph_handle(deployment: str, app: str) -> GetHandle:
    """A handle for use on a request router's event loop, made at the first call.

    The graph need not be there before the router is. And Serve makes a handle's own router on the event loop of all
    routers, and waits for it; on that very loop it would wait for ever, so this one is told to stay on the caller's.
    """
    made: list[DeploymentHandle[Any]] = []

    def get() -> DeploymentHandle[Any]:
        if not made:
            handle = serve.get_deployment_handle(deployment, app)
            handle._init(_run_router_in_separate_loop=False)
            made.append(handle)
        return made[0]

    return get


def remote_tokenize(tokenizer: GetHandle) -> Tokenize:
    """The Tokenizer deployment, for a PromptService."""

    async def tokenize(source: TokenizerSource, segments: Sequence[Segment]) -> list[bytes]:
        ids: list[bytes] = await tokenizer().encode_segments.remote(source, segments)
        return ids

    return tokenize


class RemotePrompts:
    """PromptStage: the PrefixStore deployment."""

    def __init__(self, prefix_store: GetHandle) -> None:
        self._prefix_store = prefix_store

    async def encode(self, body: Body, spec: EngineSpec) -> list[EncodedKeys]:
        answer: list[EncodedKeys] | PromptError = await self._prefix_store().encode.remote(dict(body), spec)
        if isinstance(answer, PromptError):
            raise answer
        return answer


class RemoteIndex:
    """IndexStage: the BlockIndex deployment. The engine spec is asked for once per second."""

    def __init__(self, block_index: GetHandle) -> None:
        self._block_index = block_index
        self._spec: EngineSpec | None = None
        self._spec_until_s = 0.0

    async def spec(self) -> EngineSpec | None:
        if self._spec is None or time.monotonic() > self._spec_until_s:
            self._spec = await self._block_index().spec.remote()
            self._spec_until_s = time.monotonic() + _SPEC_MAX_AGE_S
        return self._spec

    async def match(
        self, keys: BlockKeys, pods: Sequence[PodId] | None, *, count_hits: bool, prompt_tokens: int | None = None
    ) -> Mapping[PodId, PodMatch]:
        answer: Mapping[PodId, PodMatch] = await self._block_index().match.remote(keys, pods, count_hits, prompt_tokens)
        return answer
