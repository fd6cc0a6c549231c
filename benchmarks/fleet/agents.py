"""Coding-agent sessions from a trace, played by so many users at a time (closed loop).

A user plays one session after the other. The next request of a session comes when the last one is answered and the
agent has thought, as long as in the trace, so a slow fleet gets its requests later, not more at once. The rules are
those of kv-cache-tester's replay, where the sessions are from (docs/trace_replay_tester.md, its defaults):

- a pause is no longer than 60 s, and a session ends before a prompt of more than 128,000 tokens;
- a session's subagents begin together, after the request they follow in the trace, each with its own conversation;
  the parent goes on when all of them have ended.

Blocks of the system prompt and the tools have the same keys in all sessions of a client; sessions whose system
prompt and tools are of the same lengths are taken to be of one client. Everything else is the session's own.
Answers are not hit again: the trace's ids show prompts only, and the file's known bound (96.2% of the tokens) is
counted that way.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.fleet.requests import Record, Request
from benchmarks.fleet.traces import AgentRequest, AgentSession
from benchmarks.fleet.workloads import Stage, numbered_keys
from serve_app.types import BlockKey

MAX_THINK_S = 60.0
MIN_THINK_S = 0.5  # the trace has whole seconds: 0 is anything below one
MAX_CONTEXT_TOKENS = 128_000
START_S = 60.0  # users begin within this time
_ID_BITS = 24
_CLIENTS = 1 << 20  # owners from here on are clients
_ANSWERS = 1 << (_ID_BITS - 1)  # a session's answers have ids from here on


@dataclass(slots=True)
class _Agent:
    """Somebody who sends one request after the other: the session's main loop, or a subagent."""

    requests: Sequence[AgentRequest]
    is_main: bool
    at: int = -1  # of the request that was sent last

    @property
    def next(self) -> AgentRequest | None:
        return self.requests[self.at + 1] if self.at + 1 < len(self.requests) else None


@dataclass(slots=True)
class _Play:
    """A session that a user is at."""

    number: int
    trace: AgentSession
    main: _Agent
    subagents: list[tuple[float, _Agent]]  # not begun yet, with their times
    keys: Sequence[BlockKey]  # by id
    answer_blocks: int = 0  # so far
    running: int = 0  # subagents
    due_s: float = 0.0  # when the main loop would go on if no subagent were running


@dataclass(slots=True)
class _Sent:
    play: _Play
    agent: _Agent


@dataclass
class AgentSessions:
    """Workload.

    Args:
        sessions: of the trace.
        seed: shuffles them, and draws when users begin.
        users: sessions at a time.
        max_requests: of a session; what comes later is left out.
    """

    sessions: Sequence[AgentSession]
    seed: int
    users: int
    max_requests: int = 40
    min_think_s: float = MIN_THINK_S
    _count: int = 0
    _open: dict[int, _Sent] = field(default_factory=dict)  # by request id
    _clients: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self.stages = [Stage(self.users, 0.0)]
        order = list(enumerate(self.sessions, 1))
        for session in self.sessions:  # before the shuffle: the same client has the same keys with every seed
            self._clients.setdefault((session.system_tokens, session.tool_tokens), _CLIENTS + len(self._clients))
        rng.shuffle(order)
        self._queue = iter(order)
        self._starts_s = sorted(rng.uniform(0.0, START_S) for _ in range(self.users))

    def initial(self) -> Iterator[Request]:
        for start_s in self._starts_s:
            yield from self._begin(start_s)

    def after(self, record: Record) -> Iterable[Request]:
        sent = self._open.pop(record.request.id)
        play, agent, now_s = sent.play, sent.agent, record.finished_s
        following = agent.next
        if not agent.is_main:
            if following is not None:
                yield self._send(play, agent, now_s + _pause_s(following))
                return
            play.running -= 1
        else:
            play.due_s = now_s + (_pause_s(following) if following else 0.0)
            yield from self._subagents(play, now_s, following)
        if play.running:
            return
        if play.main.next is not None:
            yield self._send(play, play.main, max(play.due_s, now_s + MIN_THINK_S))
        else:
            yield from self._begin(now_s + MIN_THINK_S)

    def _subagents(self, play: _Play, now_s: float, following: AgentRequest | None) -> Iterator[Request]:
        """Those that begin before the main loop's next request in the trace."""
        until_s = following.t if following else float("inf")
        while play.subagents and play.subagents[0][0] < until_s:
            _, agent = play.subagents.pop(0)
            play.running += 1
            yield self._send(play, agent, now_s + MIN_THINK_S)

    def _begin(self, at_s: float) -> Iterator[Request]:
        """The first request of the next session, if there is one."""
        for number, trace in self._queue:
            requests = _within_context(trace.requests[: self.max_requests])
            if not requests:
                continue
            last_s = requests[-1].t
            subagents = [
                (agent.t, _Agent(own, is_main=False))
                for agent in sorted(trace.subagents, key=lambda agent: agent.t)
                if agent.t <= last_s and (own := _within_context(agent.requests))
            ]
            play = _Play(number, trace, _Agent(requests, is_main=True), subagents, self._keys(number, trace))
            yield self._send(play, play.main, at_s)
            return

    def _keys(self, owner: int, trace: AgentSession) -> Sequence[BlockKey]:
        requests = (*trace.requests, *(request for agent in trace.subagents for request in agent.requests))
        highest = max((first + count for request in requests for first, count in request.ids), default=0)
        ids = np.arange(highest, dtype=np.uint64)
        client = self._clients[trace.system_tokens, trace.tool_tokens]
        owners = np.where((ids > 0) & (ids <= trace.shared_blocks), np.uint64(client), np.uint64(owner))
        return numbered_keys((owners << np.uint64(_ID_BITS)) | ids)

    def _send(self, play: _Play, agent: _Agent, at_s: float) -> Request:
        agent.at += 1
        traced = agent.requests[agent.at]
        prompt = tuple(key for first, count in traced.ids for key in play.keys[first : first + count])
        output = max(traced.output_tokens, 1)
        answers = (traced.tokens + output - 1) // play.trace.block_tokens - len(prompt)
        start = (play.number << _ID_BITS) + _ANSWERS + play.answer_blocks
        play.answer_blocks += answers
        request = Request(
            self._count,
            at_s,
            prompt,
            b"".join(prompt),
            numbered_keys(np.arange(start, start + answers, dtype=np.uint64)),
            max(traced.tokens, 1),
            output,
            play.number,
        )
        self._open[self._count] = _Sent(play, agent)
        self._count += 1
        return request


def _pause_s(request: AgentRequest) -> float:
    return min(max(request.think_s, MIN_THINK_S), MAX_THINK_S)


def _within_context(requests: Sequence[AgentRequest]) -> Sequence[AgentRequest]:
    for i, request in enumerate(requests):
        if request.tokens > MAX_CONTEXT_TOKENS:
            return requests[:i]
    return requests
