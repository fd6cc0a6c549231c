"""What a decision costs as the fleet grows: choice, booking and receipt, with all that a router knows of each pod.

In: options. Out: benchmarks/results/router.json, and a table. A warm prompt of 4,096 tokens is matched against an index
of 8, 64 and 256 pods, each of which reports its load and what becomes of its requests, as replicas do: 20 reports a
second and pod, so 5,000 a second at 256. CPU time of this one process; the pauses are the garbage collector's.

    decide     match, choose, sent, route, receipt: what the router does between a request's tokens and its answer
    catch up   what reports cost, for each decision at 100 decisions a second
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere

from benchmarks.overhead.environment import environment  # noqa: E402
from serve_app.blocks import KEY_BYTES  # noqa: E402
from serve_app.index.memory import MemoryIndex  # noqa: E402
from serve_app.routing.chooser import Chooser  # noqa: E402
from serve_app.routing.receipts import Receipts, last_expected, receipt, trail  # noqa: E402
from serve_app.types import (  # noqa: E402
    GPU,
    Domain,
    DomainId,
    EncodedKeys,
    EngineSpec,
    Epoch,
    Found,
    ModelId,
    PodId,
    PodLoad,
    Progress,
    Served,
    request_tag,
)

OUTPUT: Final = ROOT / "benchmarks/results/router.json"
BLOCK_SIZE: Final = 16
PROMPT_BLOCKS: Final = 256
PROMPTS: Final = 2000
MAX_ONGOING: Final = 256
HOLDERS: Final = 2  # pods that hold a prompt
DECISIONS_PER_S: Final = 100
REPORTS_PER_S: Final = 20
TARGETS_MS: Final = {64: 0.5, 256: 1.2}


def main(
    decisions: Annotated[int, typer.Option(min=200, help="At each size of the fleet.")] = 20_000,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of them.")] = False,
    output: Annotated[Path, typer.Option(help="Where to write the result.")] = OUTPUT,
) -> None:
    """Measure decisions. Takes two minutes; with --quick a tenth of that."""
    count = decisions // 10 if quick else decisions
    rows = [measure(pods, count) for pods in (8, 64, 256)]
    report = {"command": " ".join(sys.argv), **environment(ROOT), "decisions": count, "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    table = Table(title=f"a decision, {count:,} at each size (ms of CPU)")
    for name in ("pods", "decide p50", "p99", "target", "catch up", "longest pause"):
        table.add_column(name, justify="right")
    for row in rows:
        target = TARGETS_MS.get(row["pods"])
        table.add_row(
            str(row["pods"]),
            f"{row['decide_p50_ms']:.3f}",
            f"{row['decide_p99_ms']:.3f}",
            "" if target is None else f"{target}",
            f"{row['catch_up_ms']:.3f}",
            f"{row['longest_pause_ms']:.1f}",
        )
    Console().print(table)


def measure(count: int, decisions: int) -> dict[str, Any]:
    rng = random.Random(count)
    pods = [PodId(f"pod-{i:03}") for i in range(count)]
    index = MemoryIndex()
    for pod in pods:
        index.join(Domain(DomainId(pod), Epoch(1), EngineSpec(ModelId("m"), BLOCK_SIZE, ""), pod))
    prompts = [rng.randbytes(PROMPT_BLOCKS * KEY_BYTES) for _ in range(PROMPTS)]
    for keys in prompts:
        for pod in rng.sample(pods, HOLDERS):
            index.add(DomainId(pod), Epoch(1), GPU, keys[: rng.randrange(64, PROMPT_BLOCKS) * KEY_BYTES])
    chooser, receipts = Chooser(index.held), Receipts()
    running: dict[PodId, deque[bytes]] = {pod: deque() for pod in pods}
    pauses = Pauses()
    decide_ms, catch_up_ms = [], []
    now_s = 1000.0
    for number in range(decisions):
        now_s += 1 / DECISIONS_PER_S
        started_s = time.process_time()
        for _ in range(count * REPORTS_PER_S // DECISIONS_PER_S or 1):
            report(chooser, rng.choice(pods), running, now_s)
        catch_up_ms.append(1000 * (time.process_time() - started_s))
        keys, tag = rng.choice(prompts), request_tag(f"{number}")
        started_s = time.process_time()
        pod = decide(index, chooser, receipts, pods, keys, number, now_s)
        decide_ms.append(1000 * (time.process_time() - started_s))
        running[pod].append(tag)
        receipts.close(pod, Served(f"cmpl-{number}-0", PROMPT_BLOCKS * BLOCK_SIZE, 0, 0.0, 0.1))
    pauses.close()
    decide_ms.sort()
    return {
        "pods": count,
        "decide_p50_ms": round(statistics.median(decide_ms), 4),
        "decide_p99_ms": round(decide_ms[len(decide_ms) * 99 // 100], 4),
        "catch_up_ms": round(statistics.median(catch_up_ms), 4),
        "longest_pause_ms": round(pauses.longest_ms, 2),
        "collections": pauses.count,
    }


def report(chooser: Chooser, pod: PodId, running: dict[PodId, deque[bytes]], now_s: float) -> None:
    """A pod has accepted and prefilled everything that was sent to it, and ends all but its last eight requests."""
    mine = running[pod]
    ended = [mine.popleft() for _ in range(len(mine) - 8)]
    every = b"".join(mine)
    chooser.progress(pod, Progress(every, every, b"".join(ended)))
    chooser.loaded(pod, PodLoad(len(mine), now_s, 100))
    chooser.served(pod, [Served("x", 4096, 2048, 0.01, 0.2)] * len(ended))


def decide(
    index: MemoryIndex,
    chooser: Chooser,
    receipts: Receipts,
    pods: list[PodId],
    keys: bytes,
    number: int,
    now_s: float,
) -> PodId:
    tokens = PROMPT_BLOCKS * BLOCK_SIZE + 5
    found = Found([EncodedKeys(keys, tokens, tokens)], [index.match(keys, pods)], BLOCK_SIZE)
    choice = chooser.choose(pods, found, now_s)
    choice = choice.with_last([pod for pod, count in choice.loads.items() if count >= MAX_ONGOING])
    pod = choice.ranked[0]
    sent = chooser.sent(pod, found, choice, now_s, request_tag(f"{number}"))
    chooser.route(sent, found)
    receipts.open(
        receipt(f"{number}", "router", now_s, 0.001, pod, choice, found),
        last_expected(found, pod, choice),
        trail(found),
    )
    return pod


class Pauses:
    """How long the garbage collector holds everything."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self.count = 0
        self._started_s = 0.0
        gc.collect()
        gc.callbacks.append(self._note)

    def close(self) -> None:
        gc.callbacks.remove(self._note)

    def _note(self, phase: str, _: object) -> None:
        if phase == "start":
            self._started_s = time.perf_counter()
            return
        self.count += 1
        self.longest_ms = max(self.longest_ms, 1000 * (time.perf_counter() - self._started_s))


if __name__ == "__main__":
    typer.run(main)
