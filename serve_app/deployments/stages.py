"""The Indexer's stages as calls to the graph's deployments."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from serve_app.errors import PromptError
from serve_app.indexer import Body, EncodedKeys
from serve_app.types import BlockKey, EngineSpec, PodId, PodMatch

_SPEC_MAX_AGE_S = 1.0


class RemotePrompts:
    """PromptStage: the PrefixStore deployment."""

    def __init__(self, prefix_store: DeploymentHandle[Any]) -> None:
        self._handle = prefix_store

    async def encode(self, body: Body, spec: EngineSpec) -> list[EncodedKeys]:
        answer: list[EncodedKeys] | PromptError = await self._handle.encode.remote(dict(body), spec)
        if isinstance(answer, PromptError):
            raise answer
        return answer


class RemoteIndex:
    """IndexStage: the BlockIndex deployment. The engine spec is asked for once per second."""

    def __init__(self, block_index: DeploymentHandle[Any]) -> None:
        self._handle = block_index
        self._spec: EngineSpec | None = None
        self._spec_until_s = 0.0

    async def spec(self) -> EngineSpec | None:
        if self._spec is None or time.monotonic() > self._spec_until_s:
            self._spec = await self._handle.spec.remote()
            self._spec_until_s = time.monotonic() + _SPEC_MAX_AGE_S
        return self._spec

    async def match(
        self, keys: Sequence[BlockKey], pods: Sequence[PodId] | None, *, count_hits: bool
    ) -> Mapping[PodId, PodMatch]:
        answer: Mapping[PodId, PodMatch] = await self._handle.match.remote(b"".join(keys), pods, count_hits)
        return answer
