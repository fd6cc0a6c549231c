"""Base of the policies that follow the replicas' cache events, on the index that ships."""

from __future__ import annotations

import random

from benchmarks.fleet.policies import FleetInfo, Policy
from serve_app.index.memory import MemoryIndex
from serve_app.types import CPU, GPU, BlockKeys, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId, Tier

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
