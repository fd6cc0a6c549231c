"""A load client that costs little: prepared requests over kept-alive connections, on asyncio's protocols and uvloop.

In: jobs (where to, which body), and how many may be under way at once. Out: the latency of each, from the first byte
sent to the last byte received, who answered, and the time that all of them took. `floor.py` measures what the client
itself costs.
"""

from __future__ import annotations

import asyncio
import gc
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

_NAME = re.compile(rb'"system_fingerprint": ?"([^"]+)"')
_END_OF_CHUNKS: Final = b"\r\n0\r\n\r\n"
_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Job:
    endpoint: Endpoint
    body: bytes


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a block of jobs, in their order."""

    latencies_s: list[float]
    engines: list[str]
    seconds: float

    def percentile_ms(self, percent: int) -> float:
        return statistics.quantiles(self.latencies_s, n=100, method="inclusive")[percent - 1] * 1e3

    @property
    def requests_per_s(self) -> float:
        return len(self.latencies_s) / self.seconds


class RequestFailed(Exception):
    """An answer that is not 200, or none."""


class _Connection(asyncio.Protocol):
    """One request at a time. An answer ends where its length says, or with its last chunk."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._expected = -1  # bytes of head and body; -1: not known yet, -2: chunks
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so

    def ask(self, request: bytes) -> asyncio.Future[bytes]:
        assert self._transport is not None
        self._received.clear()
        self._expected = -1
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._expected == -1:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._received[:end]).lower()
            length = re.search(rb"\r\ncontent-length: *(\d+)", head)
            self._expected = end + 4 + int(length[1]) if length else -2
        done = (
            self._received.endswith(_END_OF_CHUNKS) if self._expected == -2 else len(self._received) >= self._expected
        )
        if done and self._answer is not None and not self._answer.done():
            self._answer.set_result(bytes(self._received))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(RequestFailed(f"the connection ended: {exc}"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def run(jobs: Sequence[Job], concurrency: int, path: str = "/v1/chat/completions") -> Measured:
    """Send the jobs in order, `concurrency` at a time; the first ones open the connections, outside the clock.

    Raises:
        RequestFailed: any of them was not answered with 200.
    """
    loop = asyncio.get_running_loop()
    endpoints = {job.endpoint for job in jobs}
    requests = [_request(job, path) for job in jobs]
    latencies = [0.0] * len(jobs)
    answers = [b""] * len(jobs)
    order = iter(range(len(jobs)))

    async def connect() -> dict[Endpoint, _Connection]:
        made: dict[Endpoint, _Connection] = {}
        for endpoint in endpoints:
            _, made[endpoint] = await loop.create_connection(_Connection, endpoint.host, endpoint.port)
        return made

    async def work(connections: dict[Endpoint, _Connection]) -> None:
        for i in order:
            start_s = time.perf_counter()
            answers[i] = await connections[jobs[i].endpoint].ask(requests[i])
            latencies[i] = time.perf_counter() - start_s

    workers = [await connect() for _ in range(min(concurrency, len(jobs)))]
    gc.collect()
    gc.disable()
    try:
        start_s = time.perf_counter()
        await asyncio.wait_for(asyncio.gather(*(work(connections) for connections in workers)), _TIMEOUT_S)
        seconds = time.perf_counter() - start_s
    finally:
        gc.enable()
        for connections in workers:
            for connection in connections.values():
                connection.close()
    return Measured(latencies, [_engine(answer) for answer in answers], seconds)


def _request(job: Job, path: str) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: {job.endpoint.host}:{job.endpoint.port}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(job.body)}\r\n\r\n"
    ).encode() + job.body


def _engine(answer: bytes) -> str:
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RequestFailed(answer[:2000].decode(errors="replace"))
    name = _NAME.search(answer)
    return name[1].decode() if name else ""
