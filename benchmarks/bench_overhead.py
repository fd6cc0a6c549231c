"""What routing costs on the HTTP path: latency added over a direct call, and requests per second.

In front of two simulated engines that speak vLLM's KV events stand, one after the other: this project (local stages;
every stage as a deployment; behind the ordinary Serve ingress) and vllm-router from PyPI (`cache_aware`, `kv_aware`).

In: options. Out: benchmarks/results/overhead.json, and tables on the terminal.

Every visit to a system measures direct calls to its engines in the same minute, in turns with it; the systems are gone
through in rounds, so that whatever else the machine does hits all of them. See `overhead/measure.py` for what is sent.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere

from benchmarks.overhead.client import RequestFailed  # noqa: E402
from benchmarks.overhead.environment import environment  # noqa: E402
from benchmarks.overhead.floor import floor_server  # noqa: E402
from benchmarks.overhead.measure import Cell, Load, Visit, measure_floor  # noqa: E402
from benchmarks.overhead.report import KIB, Record, print_report, rows, verdicts  # noqa: E402
from benchmarks.overhead.router_venv import NotInstallable, RouterInstall, install_router  # noqa: E402
from benchmarks.overhead.systems import BLOCK_SIZE, ENGINES, MODEL, System, start  # noqa: E402
from serve_app.errors import KVCacheError  # noqa: E402
from serve_app.model import resolve_model  # noqa: E402

# By size in KiB: conversations, and requests of one sub-block by concurrency. Bodies of 2 KiB grow by half in a visit.
_LOADS: Final = {
    2: (384, {1: 200, 8: 320, 32: 512}),
    32: (80, {1: 100, 8: 160, 32: 256}),
    256: (40, {1: 30, 8: 64, 32: 96}),
}
_SUB_BLOCKS: Final = 2
_QUICK_DIVISOR: Final = 2
OUTPUT: Final = ROOT / "benchmarks/results/overhead.json"
_NOTES: Final = (
    "Client, router, engines and their cores share the machine's cores.",
    (
        "A system gets new text, its direct calls the same bodies after it: what the engine's core, the publisher "
        "and the mirror do with new text is charged to the system, to every system alike."
    ),
    (
        "vllm-router 0.1.17 asks every engine's /render for token ids on each request with cache_aware and kv_aware; "
        "that is vLLM's own code here, on the same cores. round_robin shows what its forwarding alone costs; it has no "
        "target."
    ),
)

console = Console(stderr=False)


def main(
    system: Annotated[list[System] | None, typer.Option(help="Only these; repeat the option. Default: all.")] = None,
    size: Annotated[list[int] | None, typer.Option(help="Only these body sizes, in KiB: 2, 32, 256.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Only these numbers at once: 1, 8, 32.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often to go through the systems.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run: one round, half the requests.")] = False,
    router_venv: Annotated[
        Path, typer.Option(help="Environment of vllm-router; made, and the package installed, if it is absent.")
    ] = Path("/tmp/kvcache-vllm-router"),
    output: Annotated[Path, typer.Option(help="Where to write the result.")] = OUTPUT,
) -> None:
    """Measure what routing adds to a request. Takes about half an hour; with --quick a third of that."""
    # Both end in an exception, so that what was started is stopped; a background shell hands on an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    started_s = time.monotonic()
    rounds = 1 if quick else rounds
    about = environment(ROOT)
    model_path = resolve_model(f"builtin:{MODEL}")
    loads = _loads(size or list(_LOADS), concurrency or [1, 8, 32], _QUICK_DIVISOR if quick else 1)
    systems = list(system or System)
    failures: list[dict[str, Any]] = []
    router: RouterInstall | None = None
    if not all(each.ours for each in systems):
        try:
            router = install_router(router_venv, _say)
            about["versions"]["vllm-router"] = router.version
        except NotInstallable as error:
            failures = [{"system": each.value, "error": str(error)} for each in systems if not each.ours]
            systems = [each for each in systems if each.ours]
            _say(f"[red]{error}[/red]")

    floor = _run(_floor(loads))
    records: list[Record] = []
    cells = sum(len(load.requests) for load in loads)
    with _progress(rounds * len(systems) * cells) as (progress, task):
        for i in range(rounds):
            # Every round begins with another system, so that none always follows the same neighbour.
            for each in systems[i % len(systems) :] + systems[: i % len(systems)]:
                progress.update(task, description=f"round {i + 1} {each.value}")
                _say(f"round {i + 1} of {rounds}: {each.value}")
                try:
                    with start(each, model_path, router, _say) as running:
                        visit = Visit(running, f"round {i}")
                        for load in loads:
                            found = _run(visit.measure(load, lambda: progress.advance(task)))
                            records += [Record(i, each, cell) for cell in found]
                except (KVCacheError, RequestFailed, TimeoutError) as error:
                    # One visit that fails shall not cost what the others have shown.
                    _say(f"[red]{each.value} failed: {escape(str(error)[:300])}[/red]")
                    failures.append({"system": each.value, "round": i, "error": str(error)[-2000:]})
    measured = rows(records)
    judged = verdicts(measured)
    result = {
        "command": "make bench-overhead"
        if len(sys.argv) == 1
        else f"benchmarks/bench_overhead.py {' '.join(sys.argv[1:])}",
        "took_s": round(time.monotonic() - started_s),
        **about,
        "workload": {
            "engines": ENGINES,
            "block_size": BLOCK_SIZE,
            "rounds": rounds,
            "sub_blocks": _SUB_BLOCKS,
            "endpoint": "/v1/chat/completions, not streamed",
            "notes": _NOTES,
            "warm_share": 1.0,
            "warm": "every timed request is the next turn of a conversation whose earlier turns were sent before; "
            "about 200 bytes of each are new",
            "loads": [
                {"body_bytes": load.body_bytes, "conversations": load.conversations, "requests": load.requests}
                for load in loads
            ],
        },
        "targets": judged,
        "failures": failures,
        "medians": [row.to_json() for row in measured],
        "client_floor": [cell.to_json() for cell in floor],
        "rounds": [
            {"round": record.round, "system": record.system.value, **record.cell.to_json()} for record in records
        ],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print_report(console, measured, judged)
    _say(f"written: {output}")


def _loads(sizes: list[int], concurrencies: list[int], divisor: int) -> list[Load]:
    loads = []
    for size in sizes:
        conversations, requests = _LOADS.get(size, _LOADS[256])
        chosen = {n: max(requests.get(n, requests[32]) // divisor, 2 * n) for n in concurrencies}
        loads.append(Load(size * KIB, max(conversations // divisor, 40), chosen, _SUB_BLOCKS))
    return loads


async def _floor(loads: list[Load]) -> list[Cell]:
    with floor_server() as endpoint:
        return [await measure_floor(endpoint, load, n) for load in loads for n in load.requests]


def _run(work: Any) -> Any:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


@contextmanager
def _progress(total: int) -> Iterator[tuple[Progress, Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress, progress.add_task("", total=total)


def _say(message: str) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {message}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
