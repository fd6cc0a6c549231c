"""Preble's E2: exploit a prefix that is mostly known, explore where load is least; on what was routed, not what is
cached.

- more of the prompt is known than not: of the replicas that were sent the longest known part, the one of least
  load;
- else, of all replicas, the one of least load plus this prompt's own prefill there;
- load: of the requests routed there in the last three minutes, seconds of prefill that was not known, and of
  decoding;
- where the busiest carries more than twice the load of the idlest, that one gets a prompt which would have gone to
  it.

Source: "Preble: Efficient Distributed Prompt Scheduling" (arXiv 2407.00023) and
multi_node/global_scheduler_with_time.py of WukLab/preble at 0c962c4, whose defaults these are: a window of three
minutes, and no eviction in the cost. Its load of a prefix is summed over tree nodes; here over requests, which is
the same sum. The paper balances at a threshold that it leaves open; 2 is ours. Prefill and decode speeds are those
of the simulated engine, which Preble fits by profiling.
"""

from __future__ import annotations

import random
from collections import deque

from benchmarks.fleet.engine import Timing
from benchmarks.fleet.policies import FleetInfo, Policy
from benchmarks.fleet.policies_ray import PrefixTree
from benchmarks.fleet.requests import FleetView, Request

WINDOW_S = 180.0
BALANCE = 2.0


class WindowedLoad:
    """Seconds of work routed to one replica in the last `WINDOW_S`."""

    def __init__(self) -> None:
        self._entries: deque[tuple[float, float]] = deque()
        self._total_s = 0.0

    def add(self, now_s: float, work_s: float) -> None:
        self._entries.append((now_s, work_s))
        self._total_s += work_s

    def total_s(self, now_s: float) -> float:
        while self._entries and self._entries[0][0] < now_s - WINDOW_S:
            self._total_s -= self._entries.popleft()[1]
        return self._total_s


class Preble(Policy):
    def __init__(self, fleet: FleetInfo, rng: random.Random) -> None:
        super().__init__(fleet, rng)
        self._tree = PrefixTree([0] * fleet.replicas)
        self._loads = [WindowedLoad() for _ in range(fleet.replicas)]
        self._timing = Timing()
        self._output_tokens = 45.0  # Preble's first guess; then a running mean

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        candidates = view.candidates()
        loads = {replica: self._loads[replica].total_s(now_s) for replica in candidates}
        length, tenants = self._tree.match(request.prompt_keys)
        known = [replica for replica in tenants if replica in loads]
        exploit = bool(known) and length * 2 > len(request.prompt_keys)
        chosen = min(known if exploit else candidates, key=loads.__getitem__)
        if exploit:
            idlest = min(candidates, key=loads.__getitem__)
            if loads[chosen] == max(loads.values()) > BALANCE * loads[idlest] and self._is_settled(loads):
                chosen = idlest
        missing = request.prompt_tokens
        if chosen in known:
            missing -= length * self.fleet.block_size_tokens
        prefill_s = missing / self._timing.prefill_tokens_per_s
        self._loads[chosen].add(now_s, prefill_s + self._output_tokens * self._timing.base_s)
        self._tree.insert(request.prompt_keys, chosen)
        return chosen

    def on_finished(self, replica: int, request: Request, now_s: float) -> None:
        self._output_tokens += (request.output_tokens - self._output_tokens) / 64

    def _is_settled(self, loads: dict[int, float]) -> bool:
        """A fleet that has just begun is uneven in all cases."""
        return sum(loads.values()) > len(loads)
