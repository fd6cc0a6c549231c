"""What a score costs, by the way that it is asked: in process, over HTTP and gRPC, in Ray's graph.

In: options. Out: benchmarks/results/score.json, and a table. One Valkey, to which 8 and then 64 pods have published;
the same prompts in every row. The service is `kvcache serve-scores`; the client is another process, with raw sockets
and kept connections, so that little of the time is its own. "warm": the prompt is in the prefix store; "cold": it was
never seen. Rates: 16 questions at a time, warm 9,000 tokens. Memory: the service's, with 1M blocks; the prefix store
comes on top, up to its cap.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before tokenizers is imported

import grpc
import psutil
import typer
from rich.console import Console
from rich.table import Table

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere

from benchmarks.overhead.environment import environment  # noqa: E402
from serve_app.index.keyspace import HeartbeatRecord  # noqa: E402
from serve_app.index.mirror import Mirror  # noqa: E402
from serve_app.index.redis_writer import RedisWriter  # noqa: E402
from serve_app.index.valkey import ValkeyProcess  # noqa: E402
from serve_app.indexer import Indexer, LocalIndex  # noqa: E402
from serve_app.model import resolve_model  # noqa: E402
from serve_app.ports import free_ports  # noqa: E402
from serve_app.prompts.encoder import PromptEncoder  # noqa: E402
from serve_app.prompts.prefix_store import PrefixStore  # noqa: E402
from serve_app.prompts.service import PromptService  # noqa: E402
from serve_app.protos import kvcache_pb2, kvcache_pb2_grpc  # noqa: E402
from serve_app.types import GPU, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId  # noqa: E402

OUTPUT: Final = ROOT / "benchmarks/results/score.json"
MODEL: Final = ModelId("bench")
BLOCK_SIZE: Final = 16
SIZES: Final = {"1k": 1_000, "9k": 9_000, "60k": 60_000}
WORDS: Final = Path(__file__).read_text().split()
AT_ONCE: Final = 16
BATCH: Final = 32
MILLION: Final = 1_000_000

Ask = Callable[[bytes], Awaitable[Any]]
"""A question as JSON -> its answer, which is checked."""


def main(
    repeats: Annotated[int, typer.Option(min=20, help="Questions of each row.")] = 400,
    seconds: Annotated[float, typer.Option(help="Of each rate.")] = 5.0,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth, without the graph and memory.")] = False,
    graph: Annotated[bool, typer.Option(help="Ray's graph too; it takes half a minute to start.")] = True,
    output: Annotated[Path, typer.Option(help="Where to write the result.")] = OUTPUT,
) -> None:
    """Measure scores. Takes four minutes."""
    if quick:
        repeats, seconds, graph = 40, 1.0, False
    rows: list[dict[str, Any]] = []
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        valkey = ValkeyProcess(Path(folder) / "valkey" / "socket")
        try:
            url = f"unix://{folder}/valkey/socket"
            fleet = Fleet(url)
            for pods in (8, 64):
                fleet.join(pods)
                rows += asyncio.run(measure(fleet, pods, repeats, seconds, graph=graph and pods == 8))
            if not quick:
                memory = asyncio.run(measure_memory(fleet))
        finally:
            valkey.stop()
    report = {"command": " ".join(sys.argv), **environment(ROOT), "rows": rows, "memory_mb": memory}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    show(rows, memory)


class Fleet:
    """Pods that have published, and the prompts that they hold."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spec = EngineSpec(MODEL, BLOCK_SIZE, resolve_model("builtin:smollm2-135m-instruct"))
        self._encoder = PromptEncoder(self.spec, PrefixStore(1 << 29))
        self.writer = RedisWriter(url, MODEL, lease_ttl_s=3600)
        self.bodies = {name: body(tokens, random.Random(name)) for name, tokens in SIZES.items()}
        self._epochs: dict[str, Epoch] = {}

    def join(self, count: int) -> None:
        """So many pods; the i-th holds a share of each prompt."""
        for i in range(len(self._epochs), count):
            pod, epoch = f"pod-{i:02}", Epoch(time.time_ns() // 1_000_000)
            self._epochs[pod] = epoch
            self.writer.join(Domain(DomainId(pod), epoch, self.spec, PodId(pod), address=f"10.0.0.{i}:8000"))
            for asked in self.bodies.values():
                keys = self.keys(asked)
                self.writer.add(DomainId(pod), epoch, GPU, keys[: len(keys) // 8 * (i + 1) // count * 8])
            self.writer.flush()
            self.writer.heartbeat(DomainId(pod), HeartbeatRecord(epoch))

    def fill(self, blocks: int) -> None:
        """So many more blocks at the first pod."""
        rng, pod = random.Random(0), "pod-00"
        for _ in range(blocks // 10_000):
            self.writer.add(DomainId(pod), self._epochs[pod], GPU, rng.randbytes(80_000))
            self.writer.flush()

    def keys(self, asked: bytes) -> bytes:
        (prepared,) = self._encoder.prepare(json.loads(asked))
        return self._encoder.finish(prepared, self._encoder.tokenize(prepared.missing)).block_keys


def body(tokens: int, rng: random.Random) -> bytes:
    """A chat of about so many tokens."""
    words, turns = rng.choices(WORDS, k=tokens // 3), []
    for start in range(0, len(words), 300):
        role = "user" if len(turns) % 2 == 0 else "assistant"
        turns.append({"role": role, "content": " ".join(words[start : start + 300])})
    return json.dumps({"model": MODEL, "messages": turns[: len(turns) - (len(turns) + 1) % 2]}).encode()


# -- the ways to ask --------------------------------------------------------------------------------------------------


async def measure(fleet: Fleet, pods: int, repeats: int, seconds: float, *, graph: bool) -> list[dict[str, Any]]:
    rows = []
    async with contextlib.AsyncExitStack() as stack:
        ways: dict[str, list[Ask]] = {"library": [await stack.enter_async_context(library(fleet))]}
        http_port, grpc_port = free_ports(2)
        stack.enter_context(service(fleet.url, http_port, grpc_port))
        await until_ready(http_port, pods)
        ways["HTTP"] = [await stack.enter_async_context(http(http_port, "/v1/score")) for _ in range(AT_ONCE)]
        ways["gRPC"] = [await stack.enter_async_context(grpc_way(grpc_port)) for _ in range(AT_ONCE)]
        if graph:
            port = stack.enter_context(ray_graph(fleet.url))
            await until_ready(port, pods, "/kvcache/v1/score", fleet.bodies["1k"])
            ways["graph"] = [await stack.enter_async_context(http(port, "/kvcache/v1/score")) for _ in range(AT_ONCE)]
        for way, asks in ways.items():
            for name, asked in fleet.bodies.items():
                rows.append(
                    {"way": way, "pods": pods, "what": f"warm {name}", **await timed(asks[0], [asked] * repeats)}
                )
            rng = random.Random(way)
            cold = [body(9_000, rng) for _ in range(max(5, repeats // 20))]
            rows.append({"way": way, "pods": pods, "what": "cold 9k", **await timed(asks[0], cold, warm_up=False)})
            if way != "library":
                rate = await questions_per_s(asks, fleet.bodies["9k"], seconds)
                rows.append({"way": way, "pods": pods, "what": f"warm 9k, {AT_ONCE} at once", "per_s": round(rate)})
        batch = await stack.enter_async_context(http(http_port, "/v1/score/batch"))
        question = b'{"requests":[' + b",".join([fleet.bodies["1k"]] * BATCH) + b"]}"
        taken = await timed(batch, [question] * max(5, repeats // 10))
        rows.append({"way": "HTTP", "pods": pods, "what": f"warm 1k, batch of {BATCH}", **taken})
    return rows


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


# -- what is measured -------------------------------------------------------------------------------------------------


async def timed(ask: Ask, questions: Sequence[bytes], *, warm_up: bool = True) -> dict[str, float]:
    if warm_up:
        for asked in questions[:5]:
            await ask(asked)
    taken_ms = []
    for asked in questions:
        started = time.perf_counter()
        await ask(asked)
        taken_ms.append(1000 * (time.perf_counter() - started))
    taken_ms.sort()
    return {
        "p50_ms": round(statistics.median(taken_ms), 3),
        "p99_ms": round(taken_ms[len(taken_ms) * 99 // 100], 3),
    }


async def questions_per_s(asks: Sequence[Ask], asked: bytes, seconds: float) -> float:
    until_s, count = time.perf_counter() + seconds, 0

    async def one(ask: Ask) -> None:
        nonlocal count
        while time.perf_counter() < until_s:
            await ask(asked)
            count += 1

    started = time.perf_counter()
    await asyncio.gather(*map(one, asks))
    return count / (time.perf_counter() - started)


async def measure_memory(fleet: Fleet) -> dict[str, float]:
    """The service's RSS: as it starts, and with 1M blocks more."""
    http_port, grpc_port = free_ports(2)
    with service(fleet.url, http_port, grpc_port) as process:
        await until_ready(http_port, 64)
        found = {"64 pods": rss_mb(process)}
        fleet.fill(MILLION)
        await asyncio.sleep(3)
        found["1M blocks more"] = rss_mb(process)
    return found


def rss_mb(process: psutil.Process) -> float:
    return round(process.memory_info().rss / 1e6, 1)


def show(rows: Sequence[dict[str, Any]], memory: dict[str, float]) -> None:
    table = Table(title="a score (ms, or a second)")
    for name in ("way", "pods", "question", "p50", "p99", "per s"):
        table.add_column(name, justify="left" if name in ("way", "question") else "right")
    for row in rows:
        figures = (str(row.get(name, "")) for name in ("p50_ms", "p99_ms", "per_s"))
        table.add_row(row["way"], str(row["pods"]), row["what"], *figures)
    Console().print(table)
    if memory:
        print("memory of the service, MB:", memory)


if __name__ == "__main__":
    typer.run(main)
