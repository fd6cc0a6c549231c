"""llm-d's router: weighted scorers, each between 0 and 1; the highest sum wins, at random among equals.

    precise prefix cache   leading blocks held / blocks of the prompt
    KV cache utilization   1 - share of the blocks that running requests hold
    queue                  waiting requests, 1 for the fewest to 0 for the most; 1 where all are equal
    no-hit LRU             if nobody holds any of the prompt: 1 for who got such a one longest ago, down to 0; else 0.5
    active requests        1 - requests in flight / the most of any

`LLMD` has the weights of llm-d's guide for precise prefix cache routing (llm-d/llm-d at 076e65d): 3, 2, 2, 2.
`LLMD_ACTIVE` has active requests in place of utilization and queue, with their weight: a composition of ours out of
its scorers, for they know a request as soon as it is sent. Sources: pkg/epp/framework/plugins/scheduling/scorer of
llm-d/llm-d-router (nohitlru at 0b59e4e, activerequest at 2b0e757, queuedepth at 2342697). Utilization and queue are
as old as the load report.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from benchmarks.fleet.policies import FleetInfo
from benchmarks.fleet.policies_cache import Speculative
from benchmarks.fleet.requests import FleetView, Request

Scores = dict[int, float]
"""By replica."""

LLMD = {"prefix": 3.0, "utilization": 2.0, "queue": 2.0, "no_hit_lru": 2.0}
LLMD_ACTIVE = {"prefix": 3.0, "active": 2.0, "no_hit_lru": 2.0}


def queue_scores(waiting: Mapping[int, int]) -> Scores:
    least, most = min(waiting.values()), max(waiting.values())
    if least == most:
        return dict.fromkeys(waiting, 1.0)
    return {replica: (most - count) / (most - least) for replica, count in waiting.items()}


def active_scores(in_flight: Mapping[int, int]) -> Scores:
    most = max(in_flight.values())
    return {replica: 1.0 - count / most if count else 1.0 for replica, count in in_flight.items()}


class NoHitLru:
    """Who got a prompt without hits, and in which order."""

    def __init__(self) -> None:
        self._used: dict[int, None] = {}  # the longest ago first

    def scores(self, replicas: Sequence[int], is_cold: bool) -> Scores:
        if not is_cold:
            return dict.fromkeys(replicas, 0.5)
        if len(replicas) == 1:
            return {replicas[0]: 1.0}
        never = [replica for replica in replicas if replica not in self._used]
        ranked = [*never, *(replica for replica in self._used if replica in replicas)]
        return {replica: 1.0 - rank / (len(replicas) - 1) for rank, replica in enumerate(ranked)}

    def sent(self, replica: int) -> None:
        self._used.pop(replica, None)
        self._used[replica] = None


class LLMDScorers(Speculative):
    """Args: weights: by the scorers' names above."""

    def __init__(self, fleet: FleetInfo, rng: random.Random, weights: Mapping[str, float] = LLMD) -> None:
        super().__init__(fleet, rng)
        self._weights = weights
        self._lru = NoHitLru()

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        replicas = view.candidates()
        blocks = self.expected_blocks(request, replicas, now_s)
        is_cold = not any(blocks.values())
        scorers: Mapping[str, Callable[[], Scores]] = {
            "prefix": partial(_prefix_scores, blocks, len(request.prompt_keys)),
            "utilization": partial(_utilization_scores, replicas, view),
            "queue": lambda: queue_scores({replica: _waiting(replica, view) for replica in replicas}),
            "no_hit_lru": partial(self._lru.scores, replicas, is_cold),
            "active": lambda: active_scores({replica: view.in_flight[replica] for replica in replicas}),
        }
        totals = dict.fromkeys(replicas, 0.0)
        for name, weight in self._weights.items():
            for replica, score in scorers[name]().items():
                totals[replica] += weight * score
        best = max(totals.values())
        chosen = self.rng.choice([replica for replica, total in totals.items() if total == best])
        if is_cold:
            self._lru.sent(chosen)
        self.routed(chosen, request, now_s)
        return chosen


def _prefix_scores(blocks: Mapping[int, int], total: int) -> Scores:
    return {replica: held / max(total, 1) for replica, held in blocks.items()}


def _utilization_scores(replicas: Sequence[int], view: FleetView) -> Scores:
    reports = {replica: view.reports[replica] for replica in replicas}
    return {replica: 1.0 - (report.kv_used_share if report else 0.0) for replica, report in reports.items()}


def _waiting(replica: int, view: FleetView) -> int:
    report = view.reports[replica]
    return report.waiting if report else 0
