"""Choose a replica: which one first, which next, and why. Pure; the clock is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from serve_app.types import PodId, PodLoad


class Policy(StrEnum):
    KV_AWARE = "kv_aware"  # highest score, then least in flight
    LEAST_LOADED = "least_loaded"
    ROUND_ROBIN = "round_robin"


class Outcome(StrEnum):
    """What a decision rested on; a metric label."""

    HIT = "hit"  # a pod that holds a prefix of the prompt
    MISS = "miss"  # no pod holds any of it: least loaded
    FALLBACK = "fallback"  # cache knowledge was missing, for the reason given: least loaded
    BASELINE = "baseline"  # the policy does not ask


@dataclass(frozen=True, slots=True)
class Choice:
    """All candidates, best first, and what the order rests on."""

    ranked: list[PodId]
    outcome: Outcome
    reason: str


class Selector:
    """Orders candidates. Equal ones take turns, so that ties never always go to the first."""

    def __init__(self, policy: Policy = Policy.KV_AWARE) -> None:
        self.policy = policy
        self._turn = 0

    def choose(
        self,
        pods: Sequence[PodId],
        in_flight: Mapping[PodId, int],
        scores: Mapping[PodId, float] | None = None,
        why: str = "",
    ) -> Choice:
        """Rank `pods`.

        Args:
            pods: candidates, in a stable order.
            in_flight: requests at each pod; a missing pod has none.
            scores: score by pod; None if they could not be had.
            why: why they could not, or why they are of a part of the prompt only; the decision's reason.
        """
        self._turn += 1
        count = max(len(pods), 1)
        turn = {pod: (i - self._turn) % count for i, pod in enumerate(pods)}
        if self.policy is Policy.ROUND_ROBIN:
            return Choice(sorted(pods, key=turn.__getitem__), Outcome.BASELINE, self.policy.value)

        def by_load(pod: PodId) -> tuple[int, int]:
            return in_flight.get(pod, 0), turn[pod]

        if self.policy is Policy.LEAST_LOADED:
            return Choice(sorted(pods, key=by_load), Outcome.BASELINE, self.policy.value)
        if scores is None:
            return Choice(sorted(pods, key=by_load), Outcome.FALLBACK, why)
        ranked = sorted(pods, key=lambda pod: (-scores.get(pod, 0.0), *by_load(pod)))
        if ranked and scores.get(ranked[0], 0.0) > 0:
            return Choice(ranked, Outcome.HIT, why or "prefix")
        return Choice(ranked, Outcome.MISS, why or "no_prefix")


class LoadLedger:
    """Requests in flight at each pod: what the pod said last, and what was sent to it since.

    A report is at least `REPORT_DELAY_S` old when it arrives, so a request counts on top of a report that came less
    than that after it was sent. A request that no report followed is forgotten after `FORGET_S`.
    """

    REPORT_DELAY_S = 0.15  # the replica looks every 20 ms, its publisher reports every 50 ms
    FORGET_S = 30.0

    def __init__(self) -> None:
        self._sent: dict[PodId, deque[float]] = {}

    def sent(self, pod: PodId, now_s: float) -> None:
        self._sent.setdefault(pod, deque()).append(now_s)

    def in_flight(self, pod: PodId, report: PodLoad | None, now_s: float) -> int:
        """Best estimate for one pod."""
        sent = self._sent.get(pod)
        if sent:
            known_until_s = now_s - self.FORGET_S
            if report is not None:
                known_until_s = max(known_until_s, report.received_at_s - self.REPORT_DELAY_S)
            while sent and sent[0] <= known_until_s:
                sent.popleft()
        return (report.in_flight if report is not None else 0) + len(sent or ())

    def keep_only(self, pods: Sequence[PodId]) -> None:
        for pod in self._sent.keys() - set(pods):
            del self._sent[pod]
