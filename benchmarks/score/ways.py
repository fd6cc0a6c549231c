"""The ways to ask for a score. Each is a context; what it gives asks one question, and checks that it was answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.score.fleet import MODEL, Fleet
from serve_app.index.mirror import Mirror
from serve_app.indexer import Indexer, LocalIndex
from serve_app.ports import free_ports
from serve_app.prompts.prefix_store import PrefixStore
from serve_app.prompts.service import PromptService
from serve_app.protos import kvcache_pb2, kvcache_pb2_grpc

ROOT: Final = Path(__file__).resolve().parents[2]

Ask = Callable[[bytes], Awaitable[Any]]
"""A question as JSON -> its answer."""


@contextlib.asynccontextmanager
async def library(fleet: Fleet) -> AsyncIterator[Ask]:
    mirror = Mirror(fleet.url, MODEL)
    mirror.start()
    indexer = Indexer(PromptService(PrefixStore(1 << 29)), LocalIndex(mirror))
    while mirror.spec() is None or not mirror.wait_ready(1):  # noqa: ASYNC110  # it is a thread that sets it
        await asyncio.sleep(0.05)

    async def ask(asked: bytes) -> None:
        assert max((await indexer.score(json.loads(asked))).scores.values()) >= 0

    yield ask
    mirror.close()


@contextlib.contextmanager
def service(url: str, http_port: int, grpc_port: int) -> Iterator[psutil.Process]:
    command = [sys.executable, "-m", "serve_app.cli", "serve-scores", "--model", MODEL, "--redis", url]
    at = ["--http", f"127.0.0.1:{http_port}", "--grpc", f"127.0.0.1:{grpc_port}"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, *at], env=environ, stderr=subprocess.DEVNULL)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def ray_graph(url: str) -> Iterator[int]:
    port = free_ports(1)[0]
    application = {
        "name": "kvcache",
        "route_prefix": "/kvcache",
        "import_path": "serve_app.app:build_kvcache",
        "args": {"model": MODEL, "redis_url": url, "limits": {"scores_per_s": 100_000}},
    }
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        command = [str(Path(sys.executable).with_name("serve")), "run", "--address", "local", str(path)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield port
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@contextlib.asynccontextmanager
async def http(port: int, path: str) -> AsyncIterator[Ask]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: ".encode()

    async def ask(asked: bytes) -> bytes:
        writer.write(head + str(len(asked)).encode() + b"\r\n\r\n" + asked)
        answer = await reader.readuntil(b"\r\n\r\n")
        if b"content-length:" not in answer.lower():
            raise RuntimeError("the application is not there yet")
        length = int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        content = await reader.readexactly(length)
        if b" 200 " not in answer.split(b"\r\n")[0]:
            raise RuntimeError(content[:500].decode())
        return content

    yield ask
    writer.close()


@contextlib.asynccontextmanager
async def grpc_way(port: int) -> AsyncIterator[Ask]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = kvcache_pb2_grpc.KVCacheStub(channel)

        async def ask(asked: bytes) -> None:
            await stub.Score(kvcache_pb2.ScoreRequest(prompt=kvcache_pb2.Prompt(request_json=asked)))

        yield ask


@contextlib.asynccontextmanager
async def grpc_health(port: int) -> AsyncIterator[Ask]:
    """What gRPC itself takes: the health service answers the same to every question."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def ask(_: bytes) -> None:
            await stub.Check(health_pb2.HealthCheckRequest())

        yield ask


async def until_ready(port: int, pods: int, path: str = "/v1/score", asked: bytes | None = None) -> None:
    """It answers for so many pods."""
    asked = asked or json.dumps({"model": MODEL, "prompt": "x"}).encode()
    deadline_s = time.monotonic() + 120
    while True:
        try:
            async with http(port, path) as ask:
                if len(json.loads(await ask(asked))["pods"]) == pods:
                    return
        except (OSError, RuntimeError, asyncio.IncompleteReadError):
            if time.monotonic() > deadline_s:
                raise
        await asyncio.sleep(0.2)
