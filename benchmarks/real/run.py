"""One scenario on one fleet: engines warm and provably empty, then the phases.

In: a fleet, a scenario. Out: `Outcome`, with every answer and, from this project, the receipts of its decisions.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import openai

from benchmarks.real.client import Answered, say, send_phase
from benchmarks.real.systems import MODEL, Engine, Fleet, System
from benchmarks.real.workload import Between, Scenario

_RESET_TIMEOUT_S: Final = 30.0
_ROUTER_TIMEOUT_S: Final = 120.0
_PROBE_WORDS: Final = 30  # two engine blocks or more, and less than a chunk of LMCache
_WARM_WORDS: Final = 400  # as long as it takes for an engine to run its kernels at the sizes of the documents
_SETTLE_S: Final = 1.0  # for events on their way: ten times what a publisher takes


class NotReady(Exception):
    """A fleet could not be brought into the state that a scenario starts from."""


@dataclass(slots=True)
class Outcome:
    system: System
    scenario: Scenario
    answers: list[Answered] = field(default_factory=list)
    receipts: list[dict[str, Any]] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)  # documents that only the engine held whose cache was reset
    wall_s: float = 0.0  # of the phases, without what happens in between
    between_s: float = 0.0


def run_scenario(fleet: Fleet, system: System, scenario: Scenario) -> Outcome:
    """Raises NotReady, or httpx.HTTPError: the fleet does not do what is needed."""
    return asyncio.run(_run(fleet, system, scenario))


async def warm_up(fleet: Fleet) -> None:
    """Kernels, connections, tokenizers: every engine directly, then through the router."""
    for engine in fleet.engines:
        for length in (_WARM_WORDS, 20):
            await say(engine.url, MODEL, _prompt(f"warm {engine.name}", length))
    await router_answers(fleet)


async def router_answers(fleet: Fleet) -> None:
    """Three good answers in a row from each router, to prompts that are new each time."""
    deadline_s = time.monotonic() + _ROUTER_TIMEOUT_S
    for url in fleet.urls:
        good = 0
        while good < 3:
            if time.monotonic() > deadline_s:
                raise NotReady(f"{url} does not answer")
            try:
                await say(url, MODEL, _prompt(f"router {time.monotonic_ns()}", 40))
                good += 1
            except openai.OpenAIError:
                good = 0
                await asyncio.sleep(0.5)


async def reset_engine(engine: Engine) -> None:
    """Empty its prefix cache. What it has just been asked is then no longer cached, or it is not believed."""
    probe = _prompt(f"probe {engine.name}", _PROBE_WORDS)
    await say(engine.url, MODEL, probe)
    if (await say(engine.url, MODEL, probe)).cached_tokens == 0:
        raise NotReady(f"{engine.name} does not cache at all")
    deadline_s = time.monotonic() + _RESET_TIMEOUT_S
    async with httpx.AsyncClient(timeout=_RESET_TIMEOUT_S) as client:
        while True:
            (await client.post(f"{engine.url}/reset_prefix_cache")).raise_for_status()
            if (await say(engine.url, MODEL, probe)).cached_tokens == 0:
                break
            if time.monotonic() > deadline_s:
                raise NotReady(f"{engine.name} keeps its cache")
            await asyncio.sleep(0.2)
        (await client.post(f"{engine.url}/reset_prefix_cache")).raise_for_status()  # the probe itself


async def _run(fleet: Fleet, system: System, scenario: Scenario) -> Outcome:
    outcome = Outcome(system, scenario)
    await warm_up(fleet)
    for engine in fleet.engines:
        await reset_engine(engine)
    await asyncio.sleep(_SETTLE_S)
    for i, phase in enumerate(scenario.phases):
        if i:
            began_s = time.monotonic()
            await _between(fleet, scenario.between)
            if scenario.between is Between.RESET_ENGINE:
                outcome.lost = _only_on(fleet.engines[0], outcome.answers)
            outcome.between_s += time.monotonic() - began_s
        began_s = time.monotonic()
        outcome.answers += await send_phase(i, phase, fleet.urls, [e.url for e in fleet.engines], MODEL)
        outcome.wall_s += time.monotonic() - began_s
    await asyncio.sleep(_SETTLE_S)
    outcome.receipts = _of_these(fleet.receipts(), outcome.answers)
    routers = {receipt["router"] for receipt in outcome.receipts}
    if routers and len(routers) < scenario.shape.routers:
        raise NotReady(f"{len(routers)} of {scenario.shape.routers} routers were asked")
    return outcome


async def _between(fleet: Fleet, what: Between) -> None:
    match what:
        case Between.NOTHING:
            pass
        case Between.RESET_ENGINE:
            await reset_engine(fleet.engines[0])
            # vLLM tells of a reset with its next step: somebody else's request comes first, as on an engine in use.
            await say(fleet.engines[0].url, MODEL, _prompt("after the reset", 1))
        case Between.RESTART_ROUTER:
            await asyncio.to_thread(fleet.restart_routers)
            await router_answers(fleet)
    await asyncio.sleep(_SETTLE_S)


def _only_on(engine: Engine, answers: list[Answered]) -> list[int]:
    where: dict[int, set[str]] = defaultdict(set)
    for answer in answers:
        where[answer.document].add(answer.engine)
    return [document for document, engines in where.items() if engines == {engine.name}]


def _prompt(name: str, words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{name}: " + " ".join(f"word{i}" for i in range(words))}]


def _of_these(receipts: list[dict[str, Any]], answers: list[Answered]) -> list[dict[str, Any]]:
    ids = {answer.request_id.partition("-")[2] for answer in answers}
    return [receipt for receipt in receipts if receipt["request_id"] in ids]
