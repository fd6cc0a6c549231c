"""Candidate for issue 5, not shipped yet: the replica with the least work for a request, in tokens.

    cost = COMPUTE x tokens to compute + LOAD x tokens to load + prefill queued there + IN_FLIGHT x requests there

In tokens, a slow fleet and a fast one are alike. A token that is computed weighs more than one that is waited for: it
also delays what decodes there, and pushes as much out of the cache, to be computed again. With a weight of 1 the
choice is the request's own time to first token, and greedy: hits are given up for every short queue, caches fill with
copies, and under load the hit rate falls (llmd-73: from 0.97 to 0.73). What is routed and not yet stored is in a
`Ledger`, as queued prefill and as speculative blocks.
"""

from __future__ import annotations

import random

from benchmarks.fleet.ledger import Ledger
from benchmarks.fleet.policies import FleetInfo
from benchmarks.fleet.policies_cache import CacheAware
from benchmarks.fleet.requests import FleetView, LoadReport, Request
from serve_app.selection import LoadLedger
from serve_app.types import CPU, GPU, BlockKeys, PodId, PodLoad


class LeastWork(CacheAware):
    COMPUTE = 2.0
    LOAD = 0.08  # of a token's prefill
    IN_FLIGHT_TOKENS = 256.0

    def __init__(self, fleet: FleetInfo, rng: random.Random) -> None:
        super().__init__(fleet, rng)
        self._ledger = Ledger()
        self._load = LoadLedger()
        self._loads: dict[PodId, PodLoad] = {}
        self._turn = rng.randrange(fleet.replicas)

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        size, keys = self.fleet.block_size_tokens, request.packed_prompt_keys
        pods = [self.pods[replica] for replica in view.candidates()]
        matches = self.index.match(keys, pods)
        self._ledger.settle(self._held, now_s)
        blocks = {pod: match.total_tokens // size for pod, match in matches.items()}
        soon = self._ledger.speculative_blocks(keys, blocks)
        self._turn += 1
        costs: dict[PodId, tuple[float, int]] = {}
        compute: dict[PodId, int] = {}
        for i, pod in enumerate(pods):
            compute[pod] = max(request.prompt_tokens - max(blocks[pod], soon.get(pod, 0)) * size, 1)
            cost = (
                self.COMPUTE * compute[pod]
                + self.LOAD * matches[pod].tokens.get(CPU, 0)
                + self._ledger.queued_tokens(pod)
                + self.IN_FLIGHT_TOKENS * self._load.in_flight(pod, self._loads.get(pod), now_s)
            )
            costs[pod] = cost, (i - self._turn) % len(pods)  # equal ones take turns
        chosen = min(costs, key=costs.__getitem__)
        self._ledger.sent(chosen, keys, compute[chosen], now_s)
        self._load.sent(chosen, now_s)
        return int(chosen)

    def on_load_report(self, replica: int, report: LoadReport, now_s: float) -> None:
        self._loads[self.pods[replica]] = PodLoad(report.in_flight, now_s)

    def _held(self, pod: PodId, keys: BlockKeys) -> list[bool]:
        return [
            bool(self.index.match(keys[at : at + 8], [pod])[pod].tokens.get(GPU, 0)) for at in range(0, len(keys), 8)
        ]
