"""AIBrix's `prefix-cache` router with its defaults, on exact cache knowledge (its KV event synchronisation).

- where load is badly uneven, only the replicas with the fewest requests are candidates for a prefix match;
- of those that hold any of the prompt, the one that holds most (whole per cent) goes first, then the one with fewer
  requests; the first that has no more than the mean and one standard deviation of requests gets it;
- if there is none: the replica with the fewest requests, at random among equals.

"Badly uneven" is: the busiest has more than twice (the mean of the others and one) and at least 8 more than the
least. With two replicas only the second counts. Source: pkg/plugins/gateway/algorithms/prefix_cache.go of
vllm-project/aibrix at 01de8a5, and its tests, which are newer in this (the mean is that of the others). Left out:
blending with other strategies.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.fleet.policies_cache import CacheAware
from benchmarks.fleet.requests import FleetView, Request

IMBALANCE_FACTOR = 2.0
IMBALANCE_MIN_GAP = 8
DEVIATIONS = 1.0


def imbalanced(loads: Sequence[int]) -> bool:
    """Whether one replica has far more requests than the others."""
    if len(loads) < 2 or max(loads) - min(loads) < IMBALANCE_MIN_GAP:
        return False
    others = (sum(loads) - max(loads)) / (len(loads) - 1)
    return len(loads) == 2 or max(loads) > IMBALANCE_FACTOR * (others + 1)


def pick_matched(loads: dict[int, int], matched_percent: dict[int, int]) -> int | None:
    """The best match that is not overloaded."""
    most = statistics.fmean(loads.values()) + DEVIATIONS * statistics.pstdev(loads.values())
    for replica in sorted(matched_percent, key=lambda replica: (-matched_percent[replica], loads[replica])):
        if loads[replica] <= most:
            return replica
    return None


class AIBrixPrefixCache(CacheAware):
    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        loads = {replica: view.in_flight[replica] for replica in view.candidates()}
        least = min(loads.values())
        fewest = [replica for replica, load in loads.items() if load == least]
        eligible = fewest if imbalanced(list(loads.values())) else list(loads)
        total = max(len(request.prompt_keys), 1)
        held = self.held_blocks(request, eligible)
        percent = {replica: blocks * 100 // total for replica, blocks in held.items() if blocks}
        chosen = pick_matched(loads, percent)
        return self.rng.choice(fewest) if chosen is None else chosen
