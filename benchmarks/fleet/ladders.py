"""Rate ladders: prompts drawn from a fixed set, at rates that climb step by step.

Out: workloads of llm-d's 73% and 37% capacity runs, SGLang's generated shared prefix, Zipf-skewed system prompts, and
prompts without reuse. As llm-d's load generator does, a step of a draining ladder begins when every request of the one
before is answered, so that one step's backlog is not the next one's; the ladder's time is then its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from benchmarks.fleet.requests import Record, Request
from benchmarks.fleet.traces import TraceSource
from benchmarks.fleet.workloads import NEVER_S, Builder, Keys, Stage, Workload, arrivals, wanted_stages, zipf_weights
from serve_app.types import BlockKey

PAUSE_S = 1.0  # between steps of a draining ladder

Draw = Callable[[float, int], Request]
"""(arrival in s, stage) -> next request."""


class Ladder:
    """Workload of steps. Without `drain`, a step begins at its time whatever is still unanswered."""

    def __init__(
        self, stages: Sequence[Stage], draw: Draw, rng: random.Random, *, poisson: bool = True, drain: bool = True
    ) -> None:
        self.stages = list(stages)
        self.min_think_s = PAUSE_S if drain else NEVER_S
        self._draw = draw
        self._rng = rng
        self._poisson = poisson
        self._drain = drain
        self._open = 0  # requests of the current step that are not answered
        self._current = 0

    def initial(self) -> Iterator[Request]:
        if self._drain:
            yield from self._step(0, 0.0)
            return
        start_s = 0.0
        for i, stage in enumerate(self.stages):
            yield from self._step(i, start_s)
            start_s += stage.duration_s

    def after(self, record: Record) -> Iterable[Request]:
        self._open -= 1
        if not self._drain or self._open or self._current + 1 >= len(self.stages):
            return ()
        self._current += 1
        return self._step(self._current, record.finished_s + PAUSE_S)

    def _step(self, index: int, start_s: float) -> list[Request]:
        times = arrivals(self._rng, self.stages[index], start_s, self._poisson)
        requests = [self._draw(at_s, index) for at_s in times]
        self._open += len(requests)
        return requests


def shared_prefix(
    seed: int,
    stages: Sequence[Stage],
    groups: int,
    prompts_per_group: int,
    system_tokens: int,
    question_tokens: int,
    output_tokens: int,
    *,
    poisson: bool = True,
) -> Workload:
    """Groups of prompts with one system prompt each. All are sent in turn, in one shuffled order, over and over.

    The session, for those who balance by session, is the group.
    """
    rng, keys = random.Random(seed), Keys()
    builder = Builder(keys)
    prompts: list[tuple[int, Sequence[BlockKey]]] = []
    for group in range(groups):
        system = keys.fresh(system_tokens // 16)
        whole = (system_tokens + question_tokens) // 16
        prompts += [(group, (*system, *keys.fresh(whole - len(system)))) for _ in range(prompts_per_group)]
    rng.shuffle(prompts)
    turn = 0

    def draw(at_s: float, stage: int) -> Request:
        nonlocal turn
        group, known = prompts[turn % len(prompts)]
        turn += 1
        return builder.request(at_s, known, system_tokens + question_tokens, output_tokens, group, stage)

    return Ladder(stages, draw, rng, poisson=poisson)


def zipf(
    seed: int,
    stages: Sequence[Stage],
    systems: int,
    exponent: float,
    system_tokens: int,
    question_tokens: int,
    output_tokens: int,
) -> Workload:
    """Shared system prompts of Zipf popularity, a new question each time. The session is the system prompt."""
    rng, keys = random.Random(seed), Keys()
    builder = Builder(keys)
    texts = [keys.fresh(system_tokens // 16) for _ in range(systems)]
    weights = zipf_weights(systems, exponent)

    def draw(at_s: float, stage: int) -> Request:
        tokens = system_tokens + max(1, round(rng.expovariate(1 / question_tokens)))
        out = max(1, round(rng.expovariate(1 / output_tokens)))
        system = rng.choices(range(systems), cum_weights=weights)[0]
        return builder.request(at_s, texts[system], tokens, out, system, stage)

    return Ladder(stages, draw, rng)


def no_reuse(seed: int, stages: Sequence[Stage], prompt_tokens: int, output_tokens: int) -> Workload:
    """Every prompt is new, of exponentially distributed length. Every session has one request."""
    rng = random.Random(seed)
    builder = Builder(Keys())
    session = 0

    def draw(at_s: float, stage: int) -> Request:
        nonlocal session
        session += 1
        tokens = max(16, round(rng.expovariate(1 / prompt_tokens)))
        return builder.request(at_s, (), tokens, max(1, round(rng.expovariate(1 / output_tokens))), session, stage)

    return Ladder(stages, draw, rng)


def with_rates(
    make: Callable[[int, Sequence[Stage]], Workload], stages: Sequence[Stage]
) -> Callable[[int, Sequence[float] | None, TraceSource], Workload]:
    """Scenario.make of a ladder."""
    return lambda seed, rates, _traces: make(seed, wanted_stages(stages, rates))
