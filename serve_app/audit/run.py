"""The `kvcache audit` command: from a gateway, running or started for it, to a table and audit.json."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from serve_app import local_stack
from serve_app.audit.probe import Compared, Gateway, Skipped
from serve_app.audit.report import is_miss, print_result, result
from serve_app.audit.traffic import Plan, Source, generate, read_bodies, replay
from serve_app.errors import ConfigError

# Pauses before a request, one at random: at 0 s the blocks of the answer before are on their way to the index.
PAUSES_S = (0.0, 0.0, 0.01, 0.05, 0.2)
REPORT_EVERY = 20  # requests, where there is no terminal to draw a bar on

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Settings:
    """The command's options."""

    url: str  # "": the stack that runs, or that of `config`
    score_url: str  # "": the gateway's
    config: Mapping[str, Any] | None  # a Serve config to start
    config_name: str
    kv_blocks: int
    requests: Path | None  # JSONL
    plan: Plan  # of generated requests, if there is no file
    require: float  # share within one block
    output: Path


def run_audit(settings: Settings) -> bool:
    """Audit, print, write; whether enough was right."""
    bodies = read_bodies(settings.requests) if settings.requests else None
    with _gateway(settings) as gateway:
        model = gateway.model()
        source = generate(model, settings.plan) if bodies is None else replay(bodies, model)
        summary = audit(gateway, source, settings.plan.count if bodies is None else len(bodies))
    about = {
        "command": "kvcache audit",
        "model": model,
        "config": settings.config_name,
        "kv_blocks": settings.kv_blocks if settings.config else None,
        "requests_file": str(settings.requests or ""),
        "plan": asdict(settings.plan) if bodies is None else None,
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
    }
    print_result(summary, Console(highlight=False))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    settings.output.write_text(json.dumps({**about, **summary}, indent=2) + "\n")
    say(f"written to {settings.output}")
    right: float = summary.get("within_one_block", 0.0)
    if right < settings.require:
        say(f"[red]{right:.1%} within one block; {settings.require:.1%} are required[/red]")
    return right >= settings.require


def audit(gateway: Gateway, source: Source, total: int | None = None) -> dict[str, Any]:
    """Send the requests one at a time, and give the result. Ctrl-C ends it early, with what there is.

    Args:
        total: how many requests there are, for the progress shown.
    """
    compared: list[Compared] = []
    skipped: list[Skipped] = []
    dice = random.Random(0)
    started_s = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        contextlib.suppress(KeyboardInterrupt, StopIteration),
    ):
        task = progress.add_task("requests", total=total)
        request = next(source)
        while True:
            time.sleep(dice.choice(PAUSES_S))
            done, text = gateway.probe(len(compared) + len(skipped), request)
            if isinstance(done, Compared):
                compared.append(done)
            else:
                skipped.append(done)
            misses = sum(map(is_miss, compared))
            progress.update(task, advance=1, description=f"requests, {misses} missed")
            count = len(compared) + len(skipped)
            if not console.is_terminal and count % REPORT_EVERY == 0:
                say(f"{count}{f' of {total}' if total else ''} requests, {misses} missed")
            request = source.send(text)
    return {**result(compared, skipped), "wall_s": round(time.perf_counter() - started_s, 1)}


@contextlib.contextmanager
def _gateway(settings: Settings) -> Iterator[Gateway]:
    """The gateway at the URL, or one that is started for the audit, or the one that runs."""
    with contextlib.ExitStack() as stack:
        url, graph = settings.url, "/kvcache"
        if not url:
            running = stack.enter_context(_started(settings)) if settings.config else local_stack.current()
            if running is None:
                raise ConfigError("nothing is running: `kvcache up` first, or give --url or --config")
            url, graph = running.url, running.graph or graph
        url = url.rstrip("/").removesuffix("/v1")
        gateway = Gateway(url, settings.score_url or f"{url}{graph.rstrip('/')}/v1/score")
        stack.callback(gateway.close)
        yield gateway


@contextlib.contextmanager
def _started(settings: Settings) -> Iterator[local_stack.Running]:
    assert settings.config is not None
    say(f"starting {settings.config_name} with {settings.kv_blocks} KV blocks per replica")
    pressed = local_stack.with_kv_blocks(settings.config, settings.kv_blocks)
    running = local_stack.start(pressed, direct=True, on_progress=say, name=f"audit of {settings.config_name}")
    try:
        yield running
    finally:
        local_stack.stop(running, on_progress=say)


def say(message: str) -> None:
    console.print(f"[dim]kvcache[/dim] {message}")
