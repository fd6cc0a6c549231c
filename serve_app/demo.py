"""`kvcache demo`: the case that this project is for, measured on this machine.

Conversations about long documents, more of them than one replica's KV cache holds and no more than both hold together,
sent at the same time through the `openai` client to two real vLLM replicas: once routed round robin, once KV-aware,
with the same requests, each time on freshly started engines. The answers of the first run are the history that both
runs send, so that the requests are the same to the byte.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import openai
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from serve_app import local_stack
from serve_app.config import REPLICA_HEADER

BLOCK_SIZE = 32
ANSWER_TOKENS = 24
CHARS_PER_TOKEN = 4.0  # of SmolLM2 on the documents used here
CACHE_SLACK = 1.25  # a replica's KV cache, over half of what all the conversations need at their end

_REPORT_EVERY = 8  # requests, where there is no terminal to draw a bar on

QUESTIONS = (
    "What is this text about?",
    "Which terms does it define?",
    "Give one example from it.",
    "What does it say about errors?",
    "What should a beginner remember?",
    "Which part is the most important?",
    "What is left open?",
    "Sum it up in one sentence.",
)

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Workload:
    """The demo's conversations: each asks about a document of its own."""

    documents: int = 8
    turns: int = 6
    document_tokens: int = 1500
    start_every_s: float = 2.5  # conversations begin so far apart: about what it takes to prefill one document

    @property
    def kv_blocks_per_replica(self) -> int:
        """KV cache of each of the two replicas, in blocks."""
        conversation = self.document_tokens + self.turns * (ANSWER_TOKENS + 32)
        return int(CACHE_SLACK * self.documents * conversation / 2 / BLOCK_SIZE)


@dataclass(slots=True)
class Answered:
    """One request, as the client saw it."""

    document: int
    turn: int
    replica: str
    ttft_s: float
    prompt_tokens: int
    cached_tokens: int
    text: str


@dataclass(slots=True)
class Run:
    policy: str
    wall_s: float = 0.0
    answers: list[Answered] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        ttft = sorted(answer.ttft_s for answer in self.answers)
        prompt = sum(answer.prompt_tokens for answer in self.answers)
        return {
            "requests": len(self.answers),
            "mean_ttft_s": round(statistics.fmean(ttft), 4),
            "p50_ttft_s": round(statistics.median(ttft), 4),
            "p90_ttft_s": round(ttft[min(len(ttft) - 1, int(0.9 * len(ttft)))], 4),
            "prompt_tokens": prompt,
            "cached_tokens": sum(answer.cached_tokens for answer in self.answers),
            "cached_token_share": round(sum(answer.cached_tokens for answer in self.answers) / prompt, 4),
            "requests_per_replica": dict(sorted(Counter(answer.replica for answer in self.answers).items())),
            "wall_s": round(self.wall_s, 2),
        }


def run_demo(workload: Workload, quickstart: Mapping[str, Any], output: Path) -> None:
    """Both runs, the table, and the result as JSON."""
    documents = _documents(workload)
    console.print(
        f"[bold]{workload.documents} conversations of {workload.turns} turns[/bold] about documents of about "
        f"{workload.document_tokens} tokens; two vLLM replicas with {workload.kv_blocks_per_replica} KV blocks "
        f"of {BLOCK_SIZE} tokens each"
    )
    runs: dict[str, Run] = {}
    history: dict[tuple[int, int], str] = {}
    for policy in ("round_robin", "kv_aware"):
        config = _config(quickstart, workload, policy)
        console.print(f"\n[bold]{policy}[/bold]")
        running = local_stack.start(config, direct=True, on_progress=_say, name=f"demo, {policy}")
        try:
            runs[policy] = asyncio.run(_converse(f"{running.url}/v1", policy, workload, documents, history))
        finally:
            local_stack.stop(running, on_progress=_say)
        history = {(answer.document, answer.turn): answer.text for answer in runs["round_robin"].answers}

    result = _result(workload, runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    _print_table(result)
    console.print(f"[dim]written to {output}[/dim]")


def _config(quickstart: Mapping[str, Any], workload: Workload, policy: str) -> dict[str, Any]:
    """The quickstart config with the policy, and a KV cache sized for the workload."""
    config = local_stack.with_kv_blocks(quickstart, workload.kv_blocks_per_replica)
    (llm,) = (app["args"] for app in config["applications"] if app["import_path"].endswith(":build_llm"))
    llm["routing"]["policy"] = policy
    return config


def _documents(workload: Workload) -> list[str]:
    """Long English texts that are on every machine: the topics of Python's own help."""
    length = int(workload.document_tokens * CHARS_PER_TOKEN)
    texts = sorted((" ".join(text.split()) for text in topics.values()), key=lambda text: (-len(text), text))
    return [
        f"Document {i}.\n{texts[i % len(texts)][(i // len(texts)) * length :][:length]}"
        for i in range(workload.documents)
    ]


async def _converse(
    url: str, policy: str, workload: Workload, documents: list[str], history: Mapping[tuple[int, int], str]
) -> Run:
    """All conversations side by side, each one turn after the other."""
    client = openai.AsyncOpenAI(base_url=url, api_key="none", timeout=300, max_retries=0)
    model = (await client.models.list()).data[0].id
    await _warm_up(client, model)
    run = Run(policy)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=workload.documents * workload.turns)

        async def conversation(number: int) -> None:
            await asyncio.sleep(number * workload.start_every_s)
            messages: list[Any] = [{"role": "system", "content": documents[number]}]
            for turn in range(workload.turns):
                messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
                answer = await _ask(client, model, messages, number, turn)
                run.answers.append(answer)
                messages.append({"role": "assistant", "content": history.get((number, turn), answer.text)})
                progress.advance(task)
                if not console.is_terminal and len(run.answers) % _REPORT_EVERY == 0:
                    _say(f"{len(run.answers)} of {workload.documents * workload.turns} requests answered")

        started_s = time.perf_counter()
        await asyncio.gather(*(conversation(number) for number in range(workload.documents)))
        run.wall_s = time.perf_counter() - started_s
    await client.close()
    return run


async def _warm_up(client: openai.AsyncOpenAI, model: str) -> None:
    """First requests compile kernels and open connections; these have nothing in common with the documents."""
    await asyncio.gather(
        *(client.completions.create(model=model, prompt=[i + 100] * 40, max_tokens=2) for i in range(4))
    )


async def _ask(client: openai.AsyncOpenAI, model: str, messages: list[Any], document: int, turn: int) -> Answered:
    started_s = time.perf_counter()
    first_s: float | None = None
    text = ""
    usage = None
    response = await client.chat.completions.with_raw_response.create(
        model=model,
        messages=messages,
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in response.parse():
        if chunk.choices and chunk.choices[0].delta.content:
            first_s = first_s or time.perf_counter()
            text += chunk.choices[0].delta.content
        usage = chunk.usage or usage
    assert usage is not None
    details = usage.prompt_tokens_details
    return Answered(
        document,
        turn,
        response.headers.get(REPLICA_HEADER, "?"),
        (first_s or time.perf_counter()) - started_s,
        usage.prompt_tokens,
        (details.cached_tokens or 0) if details else 0,
        text,
    )


def _result(workload: Workload, runs: Mapping[str, Run]) -> dict[str, Any]:
    summaries = {policy: run.summary() for policy, run in runs.items()}
    return {
        "command": "make demo",
        "mean_ttft_ratio": round(summaries["kv_aware"]["mean_ttft_s"] / summaries["round_robin"]["mean_ttft_s"], 4),
        **summaries,
        "workload": {
            **asdict(workload),
            "answer_tokens": ANSWER_TOKENS,
            "replicas": 2,
            "kv_blocks_per_replica": workload.kv_blocks_per_replica,
            "block_size": BLOCK_SIZE,
        },
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "python": platform.python_version(),
        },
        "answers": {policy: [asdict(a) for a in run.answers] for policy, run in runs.items()},
    }


def _print_table(result: Mapping[str, Any]) -> None:
    table = Table(
        "routing",
        *("mean TTFT", "p50", "p90", "cached tokens", "requests per replica"),
        title="time to first token",
    )
    for policy in ("round_robin", "kv_aware"):
        row = result[policy]
        table.add_row(
            policy,
            *(f"{row[name]:.2f} s" for name in ("mean_ttft_s", "p50_ttft_s", "p90_ttft_s")),
            f"{row['cached_token_share']:.0%}",
            " / ".join(str(count) for count in row["requests_per_replica"].values()),
        )
    out = Console(highlight=False)
    out.print(table)
    out.print(f"KV-aware mean time to first token is [bold]{result['mean_ttft_ratio']:.2f}x[/bold] round robin's")


def _say(message: str) -> None:
    console.print(f"[dim]  {message}[/dim]")
