"""What a score costs, by the way that it is asked: in process, over HTTP and gRPC, in Ray's graph.

In: options. Out: benchmarks/results/score.json, and a table. One Valkey, to which 8 and then 64 pods have published;
the same prompts in every row. The service is `kvcache serve-scores`; the client is another process, with raw sockets
and kept connections, so that little of the time is its own. "warm": the prompt is in the prefix store; "cold": it was
never seen. Rates: 16 questions at a time, warm 9,000 tokens. Memory: the service's, with 1M blocks more, and with a
prefix store that is full.

Beside it, if `ai-dynamo-runtime` is there (`make bench-score` sees to that): NVIDIA Dynamo's standalone KV indexer,
which holds the same blocks. It is asked with token ids, so the service is too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before tokenizers is imported

import psutil
import typer
from rich.console import Console
from rich.table import Table

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere

from benchmarks.overhead.environment import environment  # noqa: E402
from benchmarks.score import dynamo  # noqa: E402
from benchmarks.score.fleet import MODEL, Fleet, body  # noqa: E402
from benchmarks.score.ways import Ask, grpc_health, grpc_way, http, library, ray_graph, service, until_ready  # noqa: E402
from serve_app.config import DEFAULT_PREFIX_STORE_BYTES  # noqa: E402
from serve_app.index.valkey import ValkeyProcess  # noqa: E402
from serve_app.ports import free_ports  # noqa: E402

OUTPUT: Final = ROOT / "benchmarks/results/score.json"
AT_ONCE: Final = 16
BATCH: Final = 32
MILLION: Final = 1_000_000


class Way(NamedTuple):
    """A way to ask."""

    opened: Callable[[], AbstractAsyncContextManager[Ask]]  # for one who asks
    questions: Mapping[str, bytes]
    is_cold_asked: bool = True  # a question of token ids has nothing to tokenize
    is_rated: bool = True


def main(
    repeats: Annotated[int, typer.Option(min=20, help="Questions of each row.")] = 400,
    seconds: Annotated[float, typer.Option(help="Of each rate.")] = 5.0,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth, without the graph and memory.")] = False,
    graph: Annotated[bool, typer.Option(help="Ray's graph too; it takes half a minute to start.")] = True,
    output: Annotated[Path, typer.Option(help="Where to write the result.")] = OUTPUT,
) -> None:
    """Measure scores. Takes ten minutes."""
    if quick:
        repeats, seconds, graph = 40, 1.0, False
    rows: list[dict[str, Any]] = []
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        valkey = ValkeyProcess(Path(folder) / "valkey" / "socket")
        try:
            fleet = Fleet(f"unix://{folder}/valkey/socket")
            for pods in (8, 64):
                fleet.join(pods)
                with fleet.alive():
                    rows += asyncio.run(measure(fleet, pods, repeats, seconds, Path(folder), graph=graph and pods == 8))
            if not quick:
                memory = asyncio.run(measure_memory(fleet))
        finally:
            valkey.stop()
    report = {"command": " ".join(sys.argv), **environment(ROOT), "rows": rows, "memory_mb": memory}
    report["versions"][dynamo.PACKAGE] = dynamo.installed() or "not here"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    show(rows, memory)


async def measure(
    fleet: Fleet, pods: int, repeats: int, seconds: float, folder: Path, *, graph: bool
) -> list[dict[str, Any]]:
    rows = []
    async with contextlib.AsyncExitStack() as stack:
        http_port, grpc_port = free_ports(2)
        stack.enter_context(service(fleet.url, http_port, grpc_port))
        await until_ready(http_port, pods)
        ids = fleet.token_ids()
        ids_asked = {name: json.dumps({"model": MODEL, "prompt": prompt}).encode() for name, prompt in ids.items()}

        score = partial(http, http_port, "/v1/score")
        ways = {
            "library": Way(partial(library, fleet), fleet.bodies, is_rated=False),
            "HTTP": Way(score, fleet.bodies),
            "gRPC": Way(partial(grpc_way, grpc_port), fleet.bodies),
            "HTTP, token ids": Way(score, ids_asked, is_cold_asked=False),
        }
        if dynamo.installed():
            async with score() as ask:
                ours = {name: matched_tokens(await ask(question)) for name, question in ids_asked.items()}
            port = stack.enter_context(dynamo.dynamo_indexer(fleet, folder, ours))
            theirs = {name: json.dumps(dynamo.asked(prompt)).encode() for name, prompt in ids.items()}
            ways["Dynamo's indexer, token ids"] = Way(partial(http, port, "/query"), theirs, is_cold_asked=False)
        if graph:
            port = stack.enter_context(ray_graph(fleet.url))
            await until_ready(port, pods, "/kvcache/v1/score", fleet.bodies["1k"])
            ways["graph"] = Way(partial(http, port, "/kvcache/v1/score"), fleet.bodies)
        for name, way in ways.items():
            async for row in measure_way(name, way, repeats, seconds):
                rows.append({"way": name, "pods": pods, **row})
        check = await stack.enter_async_context(grpc_health(grpc_port))
        rows.append({"way": "gRPC", "pods": pods, "what": "health check", **await timed(check, [b""] * repeats)})
        batch = await stack.enter_async_context(http(http_port, "/v1/score/batch"))
        question = b'{"requests":[' + b",".join([fleet.bodies["1k"]] * BATCH) + b"]}"
        taken = await timed(batch, [question] * max(5, repeats // 10))
        rows.append({"way": "HTTP", "pods": pods, "what": f"warm 1k, batch of {BATCH}", **taken})
    return rows


def matched_tokens(answer: bytes) -> dict[str, int]:
    """By pod."""
    return {pod: one["matched_tokens"].get("gpu", 0) for pod, one in json.loads(answer)["pods"].items()}


async def measure_way(name: str, way: Way, repeats: int, seconds: float) -> AsyncIterator[dict[str, Any]]:
    async with way.opened() as ask:
        for prompt, asked in way.questions.items():
            yield {"what": f"warm {prompt}", **await timed(ask, [asked] * repeats)}
        if way.is_cold_asked:
            rng = random.Random(name)
            cold = [body(9_000, rng) for _ in range(max(5, repeats // 20))]
            yield {"what": "cold 9k", **await timed(ask, cold, warm_up=False)}
    if way.is_rated:
        async with contextlib.AsyncExitStack() as stack:
            asks = [await stack.enter_async_context(way.opened()) for _ in range(AT_ONCE)]
            rate = await questions_per_s(asks, way.questions["9k"], seconds)
        yield {"what": f"warm 9k, {AT_ONCE} at once", "per_s": round(rate)}


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
    """The service's RSS: as it starts, with 1M blocks more, and then with a full prefix store."""
    http_port, grpc_port = free_ports(2)
    with service(fleet.url, http_port, grpc_port) as process:
        await until_ready(http_port, len(fleet.held))
        found = {f"{len(fleet.held)} pods": rss_mb(process)}
        fleet.fill(MILLION)
        await asyncio.sleep(3)
        found["1M blocks more"] = rss_mb(process)
        async with http(http_port, "/v1/score") as ask:
            rng = random.Random(0)
            for _ in range(DEFAULT_PREFIX_STORE_BYTES // fleet.stored_bytes(body(9_000, rng)) + 1):
                asked = body(9_000, rng)
                while not json.loads(await ask(asked))["complete"]:  # its tokens are late, and stored when they come
                    pass
        found["prefix store full"] = rss_mb(process)
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
