"""One visit to one system: its requests and direct calls to the same engines, in turns, at every size and concurrency.

In: a running system. Out: a `Cell` per size, concurrency and target, with the conversations' bodies the same for the
system and for its baselines:

    system A B C ...   baseline A B C ...   system D E F ...   baseline D E F ...

Before that every conversation is begun, through the system, and the engines are given time to tell of its blocks. What
is timed are the turns that follow, so all of them are warm, and each brings some text that nobody has seen.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.overhead.client import Endpoint, Job, Measured, run
from benchmarks.overhead.systems import MODEL, Running
from benchmarks.overhead.workload import TURN_BYTES, Conversation

SYSTEM: Final = "system"  # the target that is not a baseline
_SETTLE_S: Final = 0.5  # KV events to whoever follows them
_LEARN_TIMEOUT_S: Final = 300.0
_WARM_UP_CONCURRENCY: Final = 4


@dataclass(frozen=True, slots=True)
class Load:
    """How much is sent for one size."""

    body_bytes: int  # about, in the middle of the run
    conversations: int  # more than are ever under way at once
    requests: dict[int, int]  # concurrency -> requests in one sub-block
    sub_blocks: int

    @property
    def turns(self) -> float:
        return self.sub_blocks * sum(self.requests.values()) / self.conversations


@dataclass(frozen=True, slots=True)
class Cell:
    """One target at one size and concurrency, in one visit."""

    body_bytes: int
    concurrency: int
    target: str
    requests: int
    mean_body_bytes: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    requests_per_s: float
    same_engine_share: float  # of the requests, went to the engine that has their conversation

    def to_json(self) -> dict[str, Any]:
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


class Visit:
    """See the module.

    Args:
        running: the system.
        seed: another one gives other conversations.
    """

    def __init__(self, running: Running, seed: str) -> None:
        self._running = running
        self._seed = seed
        self._sent = running.learned()

    async def measure(self, load: Load, done: Callable[[], None]) -> list[Cell]:
        """All concurrencies of one size; `done` is called after each."""
        start_bytes = max(load.body_bytes - round(load.turns * TURN_BYTES / 2), load.body_bytes // 2)
        conversations = [
            Conversation(MODEL, start_bytes, f"{self._seed} {load.body_bytes} {i}") for i in range(load.conversations)
        ]
        homes = await self._begin(conversations)
        cells: list[Cell] = []
        at = 0
        for concurrency, count in load.requests.items():
            measured: dict[str, list[Measured]] = {}
            sizes: list[int] = []
            expected: list[str] = []
            for _ in range(load.sub_blocks):
                turn = [(at + i) % load.conversations for i in range(count)]
                at += count
                bodies = [conversations[i].next_body() for i in turn]
                engines = [homes[i] for i in turn]
                sizes += map(len, bodies)
                expected += engines
                for target, jobs in self._targets(bodies, engines):
                    measured.setdefault(target, []).append(await self._run(jobs, concurrency))
            cells += [
                _cell(load.body_bytes, concurrency, target, parts, sizes, expected)
                for target, parts in measured.items()
            ]
            done()
        return cells

    async def _begin(self, conversations: Sequence[Conversation]) -> list[str]:
        """The first turn of each, through the system; who answered has the conversation."""
        jobs = [Job(self._running.endpoint, conversation.next_body()) for conversation in conversations]
        homes = (await self._run(jobs, _WARM_UP_CONCURRENCY)).engines
        for endpoints in self._running.baselines.values():  # so that these servers have been used once, too
            again = [Job(endpoints[home], job.body) for home, job in zip(homes, jobs, strict=True)]
            await self._run(again[:8], _WARM_UP_CONCURRENCY)
        return homes

    def _targets(self, bodies: Sequence[bytes], engines: Sequence[str]) -> Iterator[tuple[str, list[Job]]]:
        yield SYSTEM, [Job(self._running.endpoint, body) for body in bodies]
        for name, endpoints in self._running.baselines.items():
            yield name, [Job(endpoints[engine], body) for body, engine in zip(bodies, engines, strict=True)]

    async def _run(self, jobs: list[Job], concurrency: int) -> Measured:
        """Send the jobs, and wait until the engines' cores have nothing left to do."""
        measured = await run(jobs, concurrency)
        self._sent += len(jobs)
        deadline_s = asyncio.get_running_loop().time() + _LEARN_TIMEOUT_S
        while self._running.learned() < self._sent:
            if asyncio.get_running_loop().time() > deadline_s:
                raise TimeoutError(f"the engines have learned {self._running.learned()} of {self._sent} requests")
            await asyncio.sleep(0.05)
        await asyncio.sleep(_SETTLE_S)
        return measured


def _cell(
    body_bytes: int,
    concurrency: int,
    target: str,
    parts: Sequence[Measured],
    sizes: Sequence[int],
    expected: Sequence[str],
) -> Cell:
    whole = Measured(
        [latency for part in parts for latency in part.latencies_s],
        [engine for part in parts for engine in part.engines],
        sum(part.seconds for part in parts),
    )
    same = sum(engine == home for engine, home in zip(whole.engines, expected, strict=True))
    return Cell(
        body_bytes,
        concurrency,
        target,
        len(whole.latencies_s),
        round(statistics.mean(sizes)),
        whole.percentile_ms(50),
        whole.percentile_ms(90),
        whole.percentile_ms(99),
        whole.requests_per_s,
        same / len(expected),
    )


async def measure_floor(endpoint: Endpoint, load: Load, concurrency: int) -> Cell:
    """The client against a server that does nothing."""
    conversations = [Conversation(MODEL, load.body_bytes, f"floor {i}") for i in range(load.conversations)]
    jobs = [Job(endpoint, conversations[i % len(conversations)].next_body()) for i in range(load.requests[concurrency])]
    return _cell(
        load.body_bytes,
        concurrency,
        "floor",
        [await run(jobs, concurrency)],
        [len(job.body) for job in jobs],
        ["floor"] * len(jobs),
    )
