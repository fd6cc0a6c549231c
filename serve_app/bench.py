"""`kvcache bench`: conversations that grow, at any OpenAI API. Is KV-cache-aware routing worth it there?

In: one URL or two. Out: time to first token, and the share of prompt tokens that the engines took from their caches, as
they say it themselves (`usage.prompt_tokens_details.cached_tokens`; vLLM: --enable-prompt-tokens-details).

Of two URLs the second gets the requests of the first to the byte: its conversations hold the first one's answers. Each
run begins every conversation with a number of its own (`seed`), so that no cache knows it from before.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from serve_app.audit.traffic import CHARS_PER_TOKEN, QUESTIONS
from serve_app.errors import ConfigError

TIMEOUT_S = 300.0
_WORDS = ("river", "engine", "garden", "signal", "winter", "paper", "market", "window", "letter", "stone", "answer")

History = dict[tuple[int, int], str]
"""Conversation and turn -> what was answered."""


@dataclass(frozen=True, slots=True)
class Load:
    """The conversations of one run; lengths are in tokens."""

    conversations: int = 8
    turns: int = 4
    tokens: int = 1500  # about; of a conversation's beginning
    answer_tokens: int = 32
    seed: int = 0

    @property
    def requests(self) -> int:
        return self.conversations * self.turns


@dataclass(slots=True)
class Result:
    """What one URL did. Seconds."""

    url: str
    ttft_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tells_cached: bool = False  # whether any answer had `cached_tokens`
    failed: list[str] = field(default_factory=list)  # why
    wall_s: float = 0.0

    def summary(self) -> dict[str, Any]:
        ttft = sorted(self.ttft_s)
        return {
            "url": self.url,
            "requests": len(ttft),
            "failed": len(self.failed),
            "mean_ttft_s": round(statistics.fmean(ttft), 4) if ttft else None,
            "p50_ttft_s": round(statistics.median(ttft), 4) if ttft else None,
            "p90_ttft_s": round(ttft[min(len(ttft) - 1, int(0.9 * len(ttft)))], 4) if ttft else None,
            "prompt_tokens": self.prompt_tokens,
            "cached_share": round(self.cached_tokens / self.prompt_tokens, 4)
            if self.tells_cached and self.prompt_tokens
            else None,
            "wall_s": round(self.wall_s, 2),
        }


def compare(urls: Sequence[str], model: str, key: str, load: Load) -> list[Result]:
    """Args:
    urls: one or two, of OpenAI APIs, with or without /v1 at the end.
    model: empty: the first that the first URL lists.
    key: its bearer token; empty: none.

    Raises:
        ConfigError: a URL does not answer as an OpenAI API.
    """
    return asyncio.run(_compare(urls, model, key, load))


async def _compare(urls: Sequence[str], model: str, key: str, load: Load) -> list[Result]:
    history: History = {}
    results = []
    for place, url in enumerate(urls):
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=base, headers=headers, timeout=TIMEOUT_S, limits=limits) as client:
            model = model or await _first_model(client, url)
            results.append(await _run(client, url, model, load, history, records=place == 0))
    return results


async def _first_model(client: httpx.AsyncClient, url: str) -> str:
    try:
        models = (await client.get("/v1/models")).raise_for_status().json()
        return str(models["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{url} does not list its models ({error!r}): give the URL of an OpenAI API; `kvcache up` starts one"
        ) from error


async def _run(
    client: httpx.AsyncClient, url: str, model: str, load: Load, history: History, *, records: bool
) -> Result:
    """All conversations at once, each one turn after the other."""
    result = Result(url)
    said: History = {}

    async def converse(number: int) -> None:
        messages: list[dict[str, str]] = [{"role": "system", "content": _document(load, number)}]
        for turn in range(load.turns):
            messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
            body = {
                "model": model,
                "messages": messages,
                "max_tokens": load.answer_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            said[number, turn] = await _ask(client, body, result)
            messages.append({"role": "assistant", "content": history.get((number, turn), said[number, turn])})

    started_s = time.perf_counter()
    await asyncio.gather(*(converse(number) for number in range(load.conversations)))
    result.wall_s = time.perf_counter() - started_s
    if records:
        history.update(said)
    return result


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], result: Result) -> str:
    """The answer's text; empty if there is none. What was measured goes into `result`."""
    started_s = time.perf_counter()
    first_s: float | None = None
    text = ""
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise ValueError(f"{response.status_code}: {(await response.aread())[:200].decode('utf-8', 'replace')}")
            async for chunk in _chunks(response):
                for choice in chunk.get("choices") or ():
                    if content := (choice.get("delta") or {}).get("content"):
                        first_s = first_s or time.perf_counter()
                        text += content
                _count(chunk.get("usage"), result)
    except (httpx.HTTPError, ValueError, AttributeError, TypeError) as error:
        result.failed.append(str(error) or type(error).__name__)
        return text
    result.ttft_s.append((first_s or time.perf_counter()) - started_s)
    return text


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events -> their JSON."""
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line.removeprefix("data:").strip()) != "[DONE]":
            chunk = json.loads(data)
            if "error" in chunk:
                raise ValueError(str(chunk["error"])[:200])
            yield chunk


def _count(usage: dict[str, Any] | None, result: Result) -> None:
    if not usage:
        return
    result.prompt_tokens += int(usage.get("prompt_tokens") or 0)
    details = usage.get("prompt_tokens_details")
    if details is not None and details.get("cached_tokens") is not None:
        result.tells_cached = True
        result.cached_tokens += int(details["cached_tokens"])


def _document(load: Load, number: int) -> str:
    """About `load.tokens` tokens, like no other conversation's from the first word on."""
    dice = random.Random(f"{load.seed}/{number}")
    length = int(load.tokens * CHARS_PER_TOKEN)
    words = " ".join(dice.choices(_WORDS, k=length // 5))
    return f"Notes {dice.getrandbits(64):x}.\n{words}"[:length]
