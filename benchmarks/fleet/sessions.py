"""Conversations: each request's prompt begins with the one before and its answer, and comes after that answer.

Out: workloads of chat and of agents in tool loops.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.fleet.requests import BLOCK_SIZE_TOKENS, Record, Request
from benchmarks.fleet.workloads import Builder, Keys, Stage, arrivals, zipf_weights


@dataclass(frozen=True, slots=True)
class Talk:
    """Shape of a conversation. Means of exponential distributions, unless said otherwise."""

    systems: int  # different system prompts, chosen with Zipf popularity
    zipf: float
    system_tokens: int  # exact
    first_tokens: float  # what the user adds to the system prompt in the first turn
    turn_tokens: float  # what is added in every further turn: a question, or what a tool returned
    answer_tokens: float
    turns: float  # geometric
    think_s: float  # from the end of an answer to the next request, on top of `min_think_s`
    min_think_s: float
    max_tokens: int = 32_000  # a conversation ends before its prompt is longer


class Conversations:
    """Workload: conversations begin as a Poisson process with the stages' rates, and go on at their own pace.

    A request belongs to the stage in which its conversation began. The session is the conversation, and what is said in
    it depends on the seed alone, not on when it is answered: every policy gets the same conversations.
    """

    def __init__(self, seed: int, stages: Sequence[Stage], talk: Talk) -> None:
        self.stages = list(stages)
        self.min_think_s = talk.min_think_s
        self._talk = talk
        self._seed = seed
        keys = Keys()
        self._builder = Builder(keys)
        self._systems = [keys.fresh(talk.system_tokens // BLOCK_SIZE_TOKENS) for _ in range(talk.systems)]
        self._weights = zipf_weights(talk.systems, talk.zipf)
        self._turns_left: dict[int, int] = {}  # by session
        self._random: dict[int, random.Random] = {}  # by session
        self._sessions = 0

    def initial(self) -> Iterator[Request]:
        start_s, rng = 0.0, random.Random(self._seed)
        for i, stage in enumerate(self.stages):
            for at_s in arrivals(rng, stage, start_s, poisson=True):
                yield self._begin(at_s, i)
            start_s += stage.duration_s

    def after(self, record: Record) -> Iterable[Request]:
        request, talk, rng = record.request, self._talk, self._random[record.request.session]
        left = self._turns_left[request.session] - 1
        tokens = request.prompt_tokens + request.output_tokens + _length(rng, talk.turn_tokens)
        if left <= 0 or tokens > talk.max_tokens:
            del self._turns_left[request.session], self._random[request.session]
            return
        self._turns_left[request.session] = left
        at_s = record.finished_s + talk.min_think_s + rng.expovariate(1 / talk.think_s)
        known = (*request.prompt_keys, *request.answer_keys)
        yield self._builder.request(
            at_s, known, tokens, _length(rng, talk.answer_tokens), request.session, request.stage
        )

    def _begin(self, at_s: float, stage: int) -> Request:
        talk = self._talk
        self._sessions += 1
        rng = self._random[self._sessions] = random.Random(f"{self._seed} {self._sessions}")
        turns = 1
        while rng.random() > 1 / talk.turns:
            turns += 1
        self._turns_left[self._sessions] = turns
        system = rng.choices(self._systems, cum_weights=self._weights)[0]
        tokens = talk.system_tokens + _length(rng, talk.first_tokens)
        return self._builder.request(at_s, system, tokens, _length(rng, talk.answer_tokens), self._sessions, stage)


def _length(rng: random.Random, mean_tokens: float) -> int:
    return max(1, round(rng.expovariate(1 / mean_tokens)))


CHAT = Talk(
    systems=20,
    zipf=1.0,
    system_tokens=1_024,
    first_tokens=300,
    turn_tokens=150,
    answer_tokens=250,
    turns=8,
    think_s=15,
    min_think_s=1,
)
AGENTS = Talk(
    systems=12,
    zipf=1.0,
    system_tokens=8_192,
    first_tokens=1_500,
    turn_tokens=900,
    answer_tokens=120,
    turns=15,
    think_s=1.5,
    min_think_s=0.2,
)
