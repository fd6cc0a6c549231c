"""Ray's PrefixCacheAffinityRouter as it is, and around it what the benchmark needs to look inside.

It learns in `on_request_routed`, which Serve calls in the ordinary ingress only; with direct streaming it would never
learn. So this stack runs without, and then a replica has no HTTP server that an engine could be reset through: it gets
one of its own, and writes its port into the folder that FOLDER_VARIABLE names.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import uvicorn
from ray import serve
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.request_router import PrefixCacheAffinityRouter

from benchmarks.real.named_engine import FOLDER_VARIABLE, NAME_VARIABLE, NamedEngine
from serve_app.deployments import routed


class RayRouter(PrefixCacheAffinityRouter):
    """Remembers who got a request, for KVCacheIngress to say so in a header."""

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        super().on_request_routed(pending_request, replica_id, result)
        routed.remember(pending_request.metadata.request_id, replica_id.unique_id)


class RayReplica(LLMServer):
    async def __init__(self, llm_config: Any, **kwargs: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        await super().__init__(llm_config, **kwargs)
        name = serve.get_replica_context().replica_id.unique_id
        os.environ[NAME_VARIABLE] = name
        assert self.engine is not None
        app = await self.engine.build_asgi_app()
        app.middleware_stack = None  # vLLM has built it already; Starlette builds it again with ours
        app.add_middleware(NamedEngine)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]  # those are Ray's
        self._http = asyncio.create_task(server.serve([listener]))
        _tell_port(name, listener.getsockname()[1])


def _tell_port(name: str, port: int) -> None:
    Path(os.environ[FOLDER_VARIABLE], f"{name}.port").write_text(str(port))
