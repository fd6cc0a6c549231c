"""Policies that follow the replicas' cache events, on the index that ships.

`CacheAware` keeps a serve_app MemoryIndex up to date; `SelectorPolicy` is the router as it was before issue 5 (longest
prefix, ties by requests in flight), built from its own classes, in the order in which the request router calls them.
"""

from __future__ import annotations

import random

from benchmarks.fleet.policies import FleetInfo, Policy
from benchmarks.fleet.requests import FleetView, LoadReport, Request
from serve_app.index.memory import MemoryIndex
from serve_app.scoring import Strategy, score
from serve_app.selection import LoadLedger, Selector
from serve_app.types import CPU, GPU, BlockKeys, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId, PodLoad, Tier

EPOCH = Epoch(1)


class CacheAware(Policy):
    """Base: an index that follows the events. Pods are named by their number, domains too."""

    wants_events = True

    def __init__(self, fleet: FleetInfo, rng: random.Random) -> None:
        super().__init__(fleet, rng)
        self.index = MemoryIndex(tier_order=(GPU, CPU))
        self.pods = [PodId(str(replica)) for replica in range(fleet.replicas)]
        self._domains = [DomainId(str(replica)) for replica in range(fleet.replicas)]
        spec = EngineSpec(ModelId("simulated"), fleet.block_size_tokens, "none")
        for domain, pod in zip(self._domains, self.pods, strict=True):
            self.index.join(Domain(domain, EPOCH, spec, pod))

    def on_stored(self, replica: int, keys: BlockKeys, now_s: float, tier: Tier = GPU) -> None:
        self.index.add(self._domains[replica], EPOCH, tier, keys)

    def on_removed(self, replica: int, keys: BlockKeys, now_s: float, tier: Tier = GPU) -> None:
        self.index.remove(self._domains[replica], EPOCH, tier, keys)


class SelectorPolicy(CacheAware):
    """serve_app.selection.Selector over serve_app.scoring.score, loads by serve_app.selection.LoadLedger."""

    def __init__(self, fleet: FleetInfo, rng: random.Random, strategy: Strategy = Strategy.LONGEST_PREFIX) -> None:
        super().__init__(fleet, rng)
        self._selector = Selector()
        self._ledger = LoadLedger()
        self._strategy = strategy
        self._loads: dict[PodId, PodLoad] = {}

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        pods = [self.pods[replica] for replica in view.candidates()]
        matches = self.index.match(request.packed_prompt_keys, pods, count_hits=self._strategy.counts_hits)
        scores = {pod: score(match, request.prompt_tokens, self._strategy) for pod, match in matches.items()}
        in_flight = {pod: self._ledger.in_flight(pod, self._loads.get(pod), now_s) for pod in pods}
        chosen = self._selector.choose(pods, in_flight, scores).ranked[0]
        self._ledger.sent(chosen, now_s)
        return int(chosen)

    def on_load_report(self, replica: int, report: LoadReport, now_s: float) -> None:
        self._loads[self.pods[replica]] = PodLoad(report.in_flight, now_s)
