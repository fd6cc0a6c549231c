"""Sends a scenario's phase through the `openai` client and notes what comes back.

In: chains, where to send them. Out: one `Answered` per request, failed ones too.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import openai

from benchmarks.real.workload import ANSWER_TOKENS, Ask, Chain
from serve_app.config import REPLICA_HEADER

TIMEOUT_S: Final = 90.0


@dataclass(slots=True)
class Answered:
    """One request, as the client saw it. Times in seconds."""

    phase: int
    document: int
    turn: int
    direct: bool  # past the router
    sent_s: float  # after the phase had begun
    ttft_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    engine: str = "?"
    request_id: str = ""
    error: str = ""


async def send_phase(
    phase: int,
    chains: Sequence[Chain],
    routers: Sequence[str],
    engines: Sequence[str],
    model: str,
) -> list[Answered]:
    """All chains side by side. `routers` take turns; `engines` are asked directly, where a request says so."""
    clients = {url: _client(url) for url in {*routers, *engines}}
    turn = itertools.cycle(routers)
    began_s = time.perf_counter()

    async def run(chain: Chain) -> list[Answered]:
        await asyncio.sleep(chain.start_s)
        answers = []
        for ask in chain.asks:
            url = next(turn) if ask.engine is None else engines[ask.engine]
            answers.append(await _ask(clients[url], model, phase, ask, began_s))
        return answers

    try:
        return [answer for answers in await asyncio.gather(*map(run, chains)) for answer in answers]
    finally:
        for client in clients.values():
            await client.close()


async def say(url: str, model: str, messages: list[dict[str, str]]) -> Answered:
    """One request outside of any scenario.

    Raises:
        openai.OpenAIError: it was not answered.
    """
    client = _client(url)
    try:
        answer = await _ask(client, model, 0, Ask(0, 0, messages), time.perf_counter())
    finally:
        await client.close()
    if answer.error:
        raise openai.OpenAIError(answer.error)
    return answer


def _client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0)


async def _ask(client: openai.AsyncOpenAI, model: str, phase: int, ask: Ask, began_s: float) -> Answered:
    sent_s = time.perf_counter()
    answer = Answered(phase, ask.document, ask.turn, ask.engine is not None, round(sent_s - began_s, 3))
    messages: list[Any] = list(ask.messages)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            response = await client.chat.completions.with_raw_response.create(
                model=model,
                messages=messages,
                max_tokens=ANSWER_TOKENS,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            answer.engine = response.headers.get(REPLICA_HEADER, "?")
            async for chunk in response.parse():
                answer.request_id = chunk.id
                if not answer.ttft_s and chunk.choices and chunk.choices[0].delta.content:
                    answer.ttft_s = round(time.perf_counter() - sent_s, 4)
                if chunk.usage is not None:
                    answer.prompt_tokens = chunk.usage.prompt_tokens
                    details = chunk.usage.prompt_tokens_details
                    answer.cached_tokens = (details.cached_tokens or 0) if details else 0
        if not answer.ttft_s or not answer.prompt_tokens:
            answer.error = "the answer ended without text or without usage"
    except (openai.OpenAIError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:300]
    return answer
