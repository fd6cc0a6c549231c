"""LMetric: the product of what must be computed and how many requests run there. No weights.

    P = uncached prompt tokens: those queued at the replica, and this request's        1,200 + 800
    B = requests at the replica, this one included                                     5
    cost = P x B                                                                       10,000; the least wins

Source: "LMetric: Simple is Better" (arXiv 2603.15202, OSDI 2026). `queued=False` is llm-d's `lmetric-scorer`
(llm-d-router at 1fee9c8), which counts this request's tokens only; tests/unit/test_fleet_peers.py has its own cases.
Ties are broken at random. Blocks that were just routed count as held, as in llm-d's guide for it.
"""

from __future__ import annotations

import random

from benchmarks.fleet.policies import FleetInfo
from benchmarks.fleet.policies_cache import PendingPrefill, Speculative
from benchmarks.fleet.requests import FleetView, Request


def lmetric(uncached_tokens: int, queued_tokens: int, requests: int) -> int:
    """Cost of a replica that has so many requests besides this one."""
    return (queued_tokens + uncached_tokens) * (requests + 1)


class LMetric(Speculative):
    def __init__(self, fleet: FleetInfo, rng: random.Random, queued: bool = True) -> None:
        super().__init__(fleet, rng)
        self._queued = queued
        self._pending: list[PendingPrefill] = fleet.shared.setdefault(
            "lmetric pending prefill", [PendingPrefill() for _ in range(fleet.replicas)]
        )

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        candidates = view.candidates()
        size = self.fleet.block_size_tokens
        blocks = self.expected_blocks(request, candidates, now_s)
        uncached = {replica: request.prompt_tokens - blocks[replica] * size for replica in candidates}
        costs = {
            replica: lmetric(
                uncached[replica], self._pending[replica].total if self._queued else 0, view.in_flight[replica]
            )
            for replica in candidates
        }
        least = min(costs.values())
        chosen = self.rng.choice([replica for replica, cost in costs.items() if cost == least])
        self._pending[chosen].add(request, uncached[chosen])
        self.routed(chosen, request, now_s)
        return chosen

    def on_first_token(self, replica: int, request: Request, now_s: float) -> None:
        self._pending[replica].done(request)
