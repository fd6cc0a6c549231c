"""Real vLLM engines behind this project's router, its baselines, Ray's PrefixCacheAffinityRouter and vllm-router.

In: options. Out: benchmarks/results/real.json, a table on the terminal, and the table as Markdown beside the JSON.

Two engines (SmolLM2-135M on CPU) whose caches together just hold the documents that are talked about, and the same
requests to every system. Before each scenario every engine's cache is emptied, and asked to prove it, and the router
starts anew; the documents of a scenario are in no other. See `real/workload.py` for the scenarios.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import openai
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the script runs from anywhere

from benchmarks.overhead.environment import environment as about_machine  # noqa: E402
from benchmarks.overhead.router_venv import NotInstallable, RouterInstall, install_router  # noqa: E402
from benchmarks.real.report import Row, details, markdown, print_report, row  # noqa: E402
from benchmarks.real.run import NotReady, run_scenario  # noqa: E402
from benchmarks.real.systems import (  # noqa: E402
    MODEL,
    Fleet,
    PlainEngines,
    System,
    environment,
    serve_fleet,
    vllm_router_fleet,
)
from benchmarks.real.workload import ANSWER_TOKENS, BLOCK_SIZE, ENGINES, Name, Size, oracle, scenarios  # noqa: E402
from serve_app.errors import KVCacheError  # noqa: E402
from serve_app.model import resolve_model  # noqa: E402

OUTPUT: Final = ROOT / "benchmarks/results/real.json"
_NOTES: Final = (
    "Client, router and both engines share the machine's cores; TTFT is as the client saw it.",
    "The oracle is one cache that never forgets, not even when an engine is reset; prompts only, whole blocks. "
    "A system can be a little above it: at times an engine generates the very text that stands in the history.",
    "Round robin and least loaded know nothing of caches: of the scenarios they run base and zipf only.",
    "Ray's router runs behind Serve's ordinary ingress: with direct streaming Serve never tells it who got a request.",
)
_BLIND_RUN: Final = {Name.BASE, Name.ZIPF}

console = Console(highlight=False)


def main(
    systems: Annotated[list[System] | None, typer.Option(help="Only these; repeat the option. Default: all.")] = None,
    only: Annotated[list[Name] | None, typer.Option("--scenarios", help="Only these; repeat. Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half the documents and caches, fewer turns.")] = False,
    turns: Annotated[int | None, typer.Option(min=4, help="Questions per conversation in `base`.")] = None,
    router_venv: Annotated[
        Path, typer.Option(help="Environment of vllm-router; made, and the package installed, if it is absent.")
    ] = Path("/tmp/kvcache-vllm-router"),
    output: Annotated[Path, typer.Option(help="Where to write the result.")] = OUTPUT,
) -> None:
    """Compare routers on real engines. Takes about 25 minutes; with --quick a third of that."""
    # Both end in an exception, so that what was started is stopped; a background shell hands on an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    started_s = time.monotonic()
    size = Size.quick() if quick else Size()
    if turns is not None:
        size = Size(**{**asdict(size), "turns": turns})
    about = about_machine(ROOT)
    model_path = resolve_model(f"builtin:{MODEL}")
    chosen = [each for each in scenarios(size, model_path) if not only or each.name in only]
    best = {each.name: oracle(each, model_path, MODEL) for each in chosen}
    titles = {each.name.value: each.title for each in chosen}
    wanted = [each for each in System if not systems or each in systems]

    failures: list[dict[str, str]] = []
    router: RouterInstall | None = None
    if any(each.vllm_router for each in wanted):
        try:
            router = install_router(router_venv, _say)
            about["versions"]["vllm-router"] = router.version
        except NotInstallable as error:
            failures += [{"system": each.value, "error": str(error)} for each in wanted if each.vllm_router]
            wanted = [each for each in wanted if not each.vllm_router]
            _say(f"[red]{error}[/red]")

    runs = [(system, one) for system in wanted for one in chosen if system.knows_prefixes or one.name in _BLIND_RUN]
    rows: list[Row] = []
    raw: list[dict[str, Any]] = []

    def save() -> None:
        result = {
            "command": "make bench-real"
            if len(sys.argv) == 1
            else f"benchmarks/bench_real.py {' '.join(sys.argv[1:])}",
            "took_s": round(time.monotonic() - started_s),
            **about,
            "workload": {
                **asdict(size),
                "engines": ENGINES,
                "block_size": BLOCK_SIZE,
                "answer_tokens": ANSWER_TOKENS,
                "scenarios": titles,
                "notes": _NOTES,
            },
            "failures": failures,
            "rows": [asdict(each) for each in rows],
            "requests": raw,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
        output.with_suffix(".md").write_text(markdown(rows, titles))

    with environment() as folder, ExitStack() as shared, _progress(sum(len(one.asks()) for _, one in runs)) as progress:
        plain: PlainEngines | None = None
        for system in wanted:
            try:
                with ExitStack() as stack:
                    if system.vllm_router:
                        assert router is not None
                        plain = plain or PlainEngines(shared, model_path, size.kv_blocks, folder, _say)
                        fleet: Fleet = stack.enter_context(vllm_router_fleet(system, router, plain, folder))
                    else:
                        fleet = stack.enter_context(serve_fleet(system, model_path, size.kv_blocks, folder, _say))
                    for i, one in enumerate([one for each, one in runs if each is system]):
                        progress.describe(f"{system.value}, {one.name.value}")
                        if i:
                            fleet.restart_router()
                        outcome = run_scenario(fleet, system, one, progress.advance)
                        rows.append(row(outcome, best[one.name]))
                        raw.append(details(outcome))
                        _say(_brief(rows[-1]))
                        save()
            except (KVCacheError, NotReady, TimeoutError, ValueError, httpx.HTTPError, openai.OpenAIError) as error:
                # One system that fails shall not cost what the others have shown.
                _say(f"[red]{system.value} failed: {escape(str(error)[:600])}[/red]")
                failures.append({"system": system.value, "error": f"{type(error).__name__}: {error}"[-2000:]})
    save()
    print_report(console, rows, titles)
    _say(f"written: {output} and {output.with_suffix('.md')}")


def _brief(row: Row) -> str:
    return (
        f"{row.system}, {row.scenario}: mean {row.mean_ttft_s:.2f} s, cached {row.cached_share:.3f} "
        f"(oracle {row.oracle_share:.3f}), {row.wall_s:.0f} s"
    )


class _Progress:
    """Requests answered of all that will be sent."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._task = progress, progress.add_task("", total=total)

    def describe(self, what: str) -> None:
        self._progress.update(self._task, description=what)
        _say(what)

    def advance(self) -> None:
        self._progress.advance(self._task)


@contextmanager
def _progress(total: int) -> Iterator[_Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Progress(progress, total)


def _say(message: str) -> None:
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {message}")


if __name__ == "__main__":
    typer.run(main)
