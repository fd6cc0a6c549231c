"""Real vLLM engines behind this project's router, its baselines, Ray's PrefixCacheAffinityRouter and vllm-router.

In: options. Out: benchmarks/results/real.json, a table on the terminal, and the table as Markdown beside the JSON.

Engines (SmolLM2-135M on CPU) whose caches together just hold the documents that are talked about, and the same requests
to every system. Before each scenario every engine's cache is emptied, and asked to prove it, and no router knows of a
request yet; the documents of a scenario are in no other. See `real/workload.py` for the scenarios.

A cell is one system in one scenario. The result is written after each; one that fails is in it with its reason, and the
others go on. `--resume` keeps the cells that the result file has, and runs those that are missing or failed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere

from benchmarks.overhead.environment import environment as about_machine  # noqa: E402
from benchmarks.overhead.router_venv import NotInstallable, RouterInstall, install_router  # noqa: E402
from benchmarks.real.cells import Cell, Pace, Results, plan  # noqa: E402
from benchmarks.real.report import details, print_report, row  # noqa: E402
from benchmarks.real.run import run_scenario  # noqa: E402
from benchmarks.real.systems import MODEL, Stack, System, environment, plain_stack, serve_stack  # noqa: E402
from benchmarks.real.workload import ANSWER_TOKENS, BLOCK_SIZE, Name, Size, oracle, scenarios  # noqa: E402
from serve_app.model import fast_dtype, resolve_model  # noqa: E402

OUTPUT: Final = ROOT / "benchmarks/results/real.json"
_SLOW_START_EVERY_S: Final = 6.0  # in float32 a document takes that long
_NOTES: Final = (
    "Client, router and engines share the machine's cores; TTFT is as the client saw it.",
    (
        "The oracle is one cache that never forgets; prompts only, whole blocks. After a reset it has lost what, under "
        "this system, only that engine held. A system can be a little above it: at times an engine "
        "generates the very text that stands in the history."
    ),
    "Round robin and least loaded know nothing of caches: of the scenarios they run base and zipf only.",
    (
        "Ray's router runs behind Serve's ordinary ingress: with direct streaming Serve never tells it who got a "
        "request. It keeps its tree in an actor that outlives the ingress, and all ingresses share: a restart costs it "
        "nothing."
    ),
    "After a reset one short request goes to that engine directly: vLLM tells of a reset with its next step only.",
)

console = Console(highlight=False, soft_wrap=True)


def main(
    systems: Annotated[list[System] | None, typer.Option(help="Only these; repeat the option. Default: all.")] = None,
    only: Annotated[list[Name] | None, typer.Option("--scenarios", help="Only these; repeat. Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half the documents and caches, fewer turns.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the result file has, run what it lacks.")] = False,
    turns: Annotated[int | None, typer.Option(min=4, help="Questions per conversation in `base`.")] = None,
    start_every: Annotated[
        float | None, typer.Option(min=0, help="Seconds from one conversation's start to the next; default: 2.5, or 6.")
    ] = None,
    router_venv: Annotated[
        Path, typer.Option(help="Environment of vllm-router; made, and the package installed, if it is absent.")
    ] = Path("/tmp/kvcache-vllm-router"),
    output: Annotated[Path, typer.Option(help="Where to write the result.")] = OUTPUT,
) -> None:
    """Compare routers on real engines. Takes about 40 minutes on two quiet cores."""
    # Both end in an exception, so that what was started is stopped; a background shell hands on an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    size = Size.quick() if quick else Size()
    if turns is not None:
        size = replace(size, turns=turns)
    if start_every is not None or fast_dtype() != "bfloat16":
        size = replace(size, start_every_s=_SLOW_START_EVERY_S if start_every is None else start_every)
    model_path = resolve_model(f"builtin:{MODEL}")
    every = scenarios(size, model_path)
    titles = {each.name.value: each.title for each in every}
    workload = {
        **asdict(size),
        "dtype": fast_dtype(),
        "block_size": BLOCK_SIZE,
        "answer_tokens": ANSWER_TOKENS,
        "shapes": {each.name.value: asdict(each.shape) for each in every},
        "scenarios": titles,
        "notes": list(_NOTES),
    }
    command = "make bench-real" if len(sys.argv) == 1 else f"benchmarks/bench_real.py {' '.join(sys.argv[1:])}"
    results = Results(output, {"command": command, **about_machine(ROOT), "workload": workload}, titles)
    if resume:
        results.take_over()
    cells = plan(
        [each for each in System if not systems or each in systems],
        [each for each in every if not only or each.name in only],
    )
    cells = [cell for cell in cells if not results.has(cell)]

    router: RouterInstall | None = None
    if any(cell.system.vllm_router for cell in cells):
        try:
            router = install_router(router_venv, _say)
            results.about["versions"]["vllm-router"] = router.version
        except NotInstallable as error:
            _say(f"[red]{escape(str(error))}[/red]")
            for cell in [cell for cell in cells if cell.system.vllm_router]:
                results.failed(cell, error)
            cells = [cell for cell in cells if not cell.system.vllm_router]

    pace = Pace(cells)
    with environment() as folder:

        def start(cell: Cell) -> AbstractContextManager[Stack]:
            shape = cell.scenario.shape
            if cell.system.vllm_router:
                assert router is not None
                return plain_stack(shape, router, model_path, size.kv_blocks, folder, _say)
            return serve_stack(cell.system, shape, model_path, size.kv_blocks, folder, _say)

        def run(stack: Stack, cell: Cell) -> None:
            began_s = time.monotonic()
            with stack.fleet(cell.system) as fleet:
                outcome = run_scenario(fleet, cell.system, cell.scenario)
            best = oracle(cell.scenario, model_path, MODEL, outcome.lost)
            done = row(outcome, best, time.monotonic() - began_s)
            results.done(cell, done, details(outcome))
            _say(
                f"{cell}: mean {done.mean_ttft_s:.2f} s, cached {done.cached_share:.3f} "
                f"(oracle {done.oracle_share:.3f}), failed {done.failed}, {done.took_s:.0f} s"
            )

        for _, group in groupby(cells, key=lambda cell: cell.stack):
            _run_group(list(group), start, run, results, pace)
    print_report(console, results.rows, results.failures, titles)
    _say(f"written: {output} and {output.with_suffix('.md')}")
    if results.failures:
        raise typer.Exit(1)


def _run_group(
    cells: list[Cell],
    start: Callable[[Cell], AbstractContextManager[Stack]],
    run: Callable[[Stack, Cell], None],
    results: Results,
    pace: Pace,
) -> None:
    """Cells of one stack. A failed cell may leave it in any state: the next one gets a new stack."""
    left = list(cells)
    while left:
        cell = left[0]
        try:
            _say(f"{pace.left()} starting a stack for {cell}")
            with start(cell) as stack:
                while left:
                    cell = left.pop(0)
                    _say(f"{pace.left()} {cell}")
                    run(stack, cell)
                    pace.passed(cell)
        except Exception as error:  # of whatever kind: one cell that fails shall not cost what the others show
            pace.passed(cell)
            _say(f"[red]{cell} failed: {escape(repr(error)[:600])}[/red]")
            results.failed(cell, error)
            if cell in left:  # the stack did not start, and would not for the others either
                for other in left[1:]:
                    results.failed(other, error)
                left.clear()


def _say(message: str) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {message}")


if __name__ == "__main__":
    typer.run(main)
