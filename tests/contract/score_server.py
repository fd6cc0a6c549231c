"""A score service on the test's event loop: what its tests share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import httpx

from serve_app.service.config import parse_config
from serve_app.service.server import ScoreServer
from tests.contract.serve_router import MODEL, TOKENS

PROMPT = {"model": MODEL, "prompt": TOKENS}


class Service:
    """One that runs on the test's event loop."""

    def __init__(self, redis_url: str, **settings: Any) -> None:
        given = {
            "redis_url": redis_url,
            "models": [{"model": MODEL}],
            "http": "127.0.0.1:0",
            "grpc": "127.0.0.1:0",
            "drain_s": 1,
            **settings,
        }
        self.server = ScoreServer(parse_config(given, "the test"))
        self._running = asyncio.create_task(self.server.run())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.http_port}"

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.server.grpc_port}")

    async def started(self) -> None:
        async with httpx.AsyncClient() as client:
            await until(lambda: self.server.grpc_port > 0)
            await self._until_alive(client)

    async def _until_alive(self, client: httpx.AsyncClient) -> None:
        for _ in range(500):
            try:
                assert (await client.get(f"{self.url}/healthz")).status_code == 200
                return
            except httpx.TransportError:
                await asyncio.sleep(0.02)
        raise TimeoutError("the service does not answer")

    async def ready(self, pods: int) -> None:
        """So many pods are known, and it says that it is ready."""
        await self.started()
        async with httpx.AsyncClient(base_url=self.url) as client:
            for _ in range(1000):
                if (await client.get("/readyz")).status_code == 200:
                    known = (await client.get("/v1/pods")).json()["pods"]
                    if sum(pod["live"] for pod in known) == pods:
                        return
                await asyncio.sleep(0.02)
        raise TimeoutError(f"{pods} pods are not there")

    async def close(self) -> None:
        self.server.stop()
        await asyncio.wait_for(self._running, 20)


async def until(check: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)
