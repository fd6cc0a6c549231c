"""ASGI middleware for `vllm --middleware`: answers carry the engine's name, as this project's replicas do."""

from __future__ import annotations

import os
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.config import REPLICA_HEADER

NAME_VARIABLE: Final = "KVCACHE_BENCH_ENGINE"
FOLDER_VARIABLE: Final = "KVCACHE_BENCH_FOLDER"  # where ray_prefix.py writes ports


class NamedEngine:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._header = (REPLICA_HEADER.encode(), os.environ[NAME_VARIABLE].encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), self._header]
            await send(message)

        await self._app(scope, receive, send_named if scope["type"] == "http" else send)
