"""What the cache-aware policies share: the index that ships, and what a router remembers of its own requests."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.fleet.policies import FleetInfo, Policy
from benchmarks.fleet.requests import Request
from serve_app.index.memory import MemoryIndex
from serve_app.types import CPU, GPU, BlockKey, BlockKeys, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId, Tier

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

    def held_blocks(self, request: Request, replicas: Sequence[int]) -> dict[int, int]:
        """Leading blocks of the prompt that each replica holds, in any tier."""
        matches = self.index.match(request.packed_prompt_keys, [self.pods[replica] for replica in replicas])
        size = self.fleet.block_size_tokens
        return {replica: matches[self.pods[replica]].total_tokens // size for replica in replicas}


class Speculative(CacheAware):
    """Base: what was routed lately counts as held, so that a burst with one new prefix is not spread.

    llm-d's `speculativeIndexing`. Its entries live for two seconds; in these two tables, which take turns, for two to
    four.
    """

    SPECULATE_S = 2.0

    def __init__(self, fleet: FleetInfo, rng: random.Random) -> None:
        super().__init__(fleet, rng)
        self._tables: tuple[dict[BlockKey, int], dict[BlockKey, int]] = ({}, {})  # new and old; replicas as a bit mask
        self._turn_at_s = 0.0

    def expected_blocks(self, request: Request, replicas: Sequence[int], now_s: float) -> dict[int, int]:
        """Leading blocks of the prompt that each replica holds, or will soon."""
        self._turn(now_s)
        new, old = self._tables
        keys = request.prompt_keys
        blocks = self.held_blocks(request, replicas)
        for replica in replicas:
            at, bit = blocks[replica], 1 << replica
            while at < len(keys) and (new.get(keys[at], 0) | old.get(keys[at], 0)) & bit:
                at += 1
            blocks[replica] = at
        return blocks

    def routed(self, replica: int, request: Request, now_s: float) -> None:
        self._turn(now_s)
        table, bit = self._tables[0], 1 << replica
        for key in request.prompt_keys:
            table[key] = table.get(key, 0) | bit

    def _turn(self, now_s: float) -> None:
        late_s = now_s - self._turn_at_s
        if late_s >= 0:
            self._turn_at_s = now_s + self.SPECULATE_S
            self._tables = ({}, self._tables[0] if late_s < self.SPECULATE_S else {})


class PendingPrefill:
    """Prompt tokens that one replica has to compute, by request, until its first token is there."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}
        self.total = 0

    def add(self, request: Request, tokens: int) -> None:
        self._tokens[request.id] = tokens
        self.total += tokens

    def done(self, request: Request) -> None:
        self.total -= self._tokens.pop(request.id, 0)
