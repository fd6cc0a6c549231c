"""Load while something breaks, and what came of it.

Two lanes. The *audit* lane holds conversations, one request at a time, and asks the Score API before each: so it knows
what was predicted, with which trust, and what the engine then took from its cache. The *steady* lane sends prompts of
less than a block, which change no cache, four a second, whatever happens to those before: so it knows who was refused.
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from serve_app.accounting import error_blocks, usable_tokens
from serve_app.audit.traffic import Plan, generate
from serve_app.config import REPLICA_HEADER
from serve_app.types import Tier

PLAN = Plan(count=10**9, conversations=10, tokens=400)
ANSWER_TOKENS = 4
PAUSE_S = 0.5  # for the blocks of the answer before to reach the index, on a machine that is busy
STEADY_EVERY_S = 0.25
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Request:
    """One that was answered or not. Times are monotonic."""

    started_s: float
    ended_s: float
    error: str = ""  # status or exception; empty: answered


@dataclass(frozen=True, slots=True)
class Probe:
    """One of the audit lane that was answered."""

    started_s: float
    trust: str  # of the replica that answered; empty: the Score API could not tell
    pods: int  # scored
    error_blocks: int  # above zero: too much was predicted

    @property
    def is_wrong(self) -> bool:
        return abs(self.error_blocks) > 1

    def is_right(self, pods: int) -> bool:
        return self.trust == "exact" and self.pods == pods and not self.is_wrong


@dataclass
class Lanes:
    """Runs between `start` and `stop`.

    Args:
        url: of the gateway.
        score_url: of the Score API.
        model: that is asked.
    """

    url: str
    score_url: str
    model: str
    requests: list[Request] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=lane, daemon=True) for lane in (self._audit, self._steady)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * TIMEOUT_S)

    def failed(self, since_s: float) -> list[Request]:
        return [request for request in list(self.requests) if request.error and request.ended_s >= since_s]

    def longest_s(self, since_s: float) -> float:
        return max((r.ended_s - r.started_s for r in list(self.requests) if r.ended_s >= since_s), default=0.0)

    def wrong(self, since_s: float) -> list[Probe]:
        """Of these the index said `exact`, and it was not so."""
        probes = [probe for probe in list(self.probes) if probe.started_s >= since_s]
        return [probe for probe in probes if probe.trust == "exact" and probe.is_wrong]

    def right_since_s(self, since_s: float, pods: int, in_a_row: int) -> float | None:
        """When the first of so many right probes in a row was sent; None: not yet."""
        run: list[Probe] = []
        for probe in [probe for probe in list(self.probes) if probe.started_s >= since_s]:
            run = [*run, probe] if probe.is_right(pods) else []
            if len(run) == in_a_row:
                return run[0].started_s
        return None

    # -- threads --------------------------------------------------------------------------------------------------

    def _audit(self) -> None:
        source = generate(self.model, PLAN)
        request = next(source)
        with httpx.Client(timeout=TIMEOUT_S) as http:
            while not self._stop.wait(PAUSE_S):
                body = {**request.body, "max_tokens": ANSWER_TOKENS}
                score = self._score(http, body)
                started_s = time.monotonic()
                answer = self._ask(http, body, started_s)
                if answer is not None:
                    self._compare(score, answer, started_s)
                text = None
                if answer is not None:
                    choice = answer.json()["choices"][0]
                    text = str((choice.get("message") or {}).get("content") or choice.get("text") or "")
                request = source.send(text)

    def _ask(self, http: httpx.Client, body: dict[str, Any], started_s: float) -> httpx.Response | None:
        path = "chat/completions" if "messages" in body else "completions"
        error = ""
        answer: httpx.Response | None = None
        try:
            answer = http.post(f"{self.url}/v1/{path}", json=body)
            error = "" if answer.is_success else f"status {answer.status_code}"
        except httpx.HTTPError as failure:
            error = type(failure).__name__
        self.requests.append(Request(started_s, time.monotonic(), error))
        return None if error else answer

    def _score(self, http: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = http.put(self.score_url, json=body, timeout=10)
            if answer.is_success:
                score: dict[str, Any] = answer.json()
                return score
        return {}

    def _compare(self, score: dict[str, Any], answer: httpx.Response, started_s: float) -> None:
        pods = score.get("pods", {})
        replica = answer.headers.get(REPLICA_HEADER)
        if replica not in pods:
            self.probes.append(Probe(started_s, "", len(pods), 0))
            return
        held = {Tier(tier): tokens for tier, tokens in pods[replica]["matched_tokens"].items()}
        size = score["block_size"]
        predicted = sum(usable_tokens(held, score["prompt_tokens"], size).values())
        actual = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        trust = pods[replica]["trust"]
        self.probes.append(Probe(started_s, trust, len(pods), error_blocks(predicted, actual, size)))

    def _steady(self) -> None:
        limits = httpx.Limits(max_connections=600)
        with httpx.Client(timeout=TIMEOUT_S, limits=limits) as http, ThreadPoolExecutor(512) as pool:
            while not self._stop.wait(STEADY_EVERY_S):
                body = {"model": self.model, "prompt": "Tell me", "max_tokens": 1}
                pool.submit(self._ask, http, body, time.monotonic())
