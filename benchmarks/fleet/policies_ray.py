"""Ray Serve LLM's PrefixCacheAffinityRouter, on block keys instead of text.

Source: ray/llm/_internal/serve/routing_policies/prefix_aware/ of Ray 2.60, with its defaults. Its prefix tree holds
what was routed, not what is cached: it hears no events and, as `do_eviction` is off, forgets nothing. One tree (an
actor) serves all routers. A request goes

- if the longest and the shortest queue differ by more than `imbalanced_threshold` (infinite): to the shorter of two;
- if less than `match_rate_threshold` (0.1) of it is known: to the tenant with the least text in the tree;
- else to those who were sent the longest known prefix; of several, to the one with the shortest queue, then the first.

A tree over chained keys needs no tree: a key stands for its whole prefix, so a dict from key to tenants is the same
thing (tests/unit/test_fleet_policies.py compares it with Ray's own PrefixTree). Text shorter than a block is left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.fleet.policies import FleetInfo, Policy, PowerOfTwo
from benchmarks.fleet.requests import FleetView, Request
from serve_app.types import BlockKey


@dataclass(slots=True)
class PrefixTree:
    """Who was sent what."""

    sizes: list[int]  # blocks of each tenant
    tenants: dict[BlockKey, int] = field(default_factory=dict)  # as a bit mask

    def match(self, keys: Sequence[BlockKey]) -> tuple[int, list[int]]:
        """Blocks that anybody was sent, and who was sent all of those; nobody was for 0 blocks."""
        mask = length = 0
        for key in keys:
            known = self.tenants.get(key)
            if known is None:
                break
            mask = known
            length += 1
        return length, [tenant for tenant in range(len(self.sizes)) if mask >> tenant & 1]

    def insert(self, keys: Sequence[BlockKey], tenant: int) -> None:
        bit, tenants = 1 << tenant, self.tenants
        for key in keys:
            known = tenants.get(key, 0)
            if not known & bit:
                tenants[key] = known | bit
                self.sizes[tenant] += 1

    def smallest(self) -> list[int]:
        least = min(self.sizes)
        return [tenant for tenant, size in enumerate(self.sizes) if size == least]


class PrefixCacheAffinity(Policy):
    def __init__(
        self,
        fleet: FleetInfo,
        rng: random.Random,
        imbalanced_threshold: float = math.inf,
        match_rate_threshold: float = 0.1,
    ) -> None:
        super().__init__(fleet, rng)
        self._imbalanced_threshold = imbalanced_threshold
        self._match_rate_threshold = match_rate_threshold
        self._fallback = PowerOfTwo(fleet, rng)
        self.tree: PrefixTree = fleet.shared.setdefault("ray prefix tree", PrefixTree([0] * fleet.replicas))

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        chosen = self._choose(request, now_s, view)
        self.tree.insert(request.prompt_keys, chosen)
        return chosen

    def _choose(self, request: Request, now_s: float, view: FleetView) -> int:
        queues = [view.in_flight[replica] for replica in view.candidates()]
        if max(queues) - min(queues) <= self._imbalanced_threshold:
            length, tenants = self.tree.match(request.prompt_keys)
            if length / max(len(request.prompt_keys), 1) < self._match_rate_threshold:
                tenants = self.tree.smallest()
            tenants = [tenant for tenant in tenants if tenant not in view.closed]
            if tenants:
                return min(tenants, key=view.in_flight.__getitem__)
        return self._fallback.route(request, now_s, view)
