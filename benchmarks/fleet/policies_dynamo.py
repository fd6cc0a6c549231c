"""NVIDIA Dynamo's KV router: its documented cost, over an exact index.

In: cache events, and the router's own requests (sent, first token, end). Out: the replica of least cost,

    prefill blocks = (prompt tokens not answered with a first token yet, net of their hits + this one's) / block size
    decode blocks  = distinct prompt blocks of all active requests, this one's included
    cost           = prefill_load_scale * (prefill blocks - overlap_score_credit * blocks held here) + decode blocks

ties at random (`router_temperature` 0). Source: "Cost Calculation" of Dynamo's router documentation and the defaults of
`KvRouterConfig` in ai-dynamo-runtime 1.6.1. Not its code: `SelectionService` in that wheel takes cache events only from
a live ZMQ socket and tells its own time, so it cannot run in simulated time. The index is ours (MemoryIndex); prefix
matches are exact in either. Blocks of answers are not counted (`router_track_output_blocks` is off). Several routers
share their active requests at once, which `router_replica_sync` does a little later.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.fleet.policies import FleetInfo
from benchmarks.fleet.policies_cache import CacheAware
from benchmarks.fleet.requests import FleetView, Request
from serve_app.types import CPU, GPU, BlockKey


@dataclass(slots=True)
class ActiveRequests:
    """What one replica is at, as the router believes."""

    blocks: Counter[BlockKey] = field(default_factory=Counter)  # prompt blocks, by how many requests use them
    partial_blocks: int = 0  # prompts that end inside a block: one more block each, never shared
    prefill_tokens: dict[int, int] = field(default_factory=dict)  # by request, until its first token
    prefill_total: int = 0

    def new_blocks(self, keys: Sequence[BlockKey]) -> int:
        """How many of the keys are not active. Active blocks are whole prefixes, so the first missing one tells."""
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high) // 2
            if keys[middle] in self.blocks:
                low = middle + 1
            else:
                high = middle
        return len(keys) - low

    def add(self, request: Request, block_size: int, prefill_tokens: int) -> None:
        self.blocks.update(request.prompt_keys)
        self.partial_blocks += request.prompt_tokens % block_size > 0
        self.prefill_tokens[request.id] = prefill_tokens
        self.prefill_total += prefill_tokens

    def prefilled(self, request: Request) -> None:
        self.prefill_total -= self.prefill_tokens.pop(request.id, 0)

    def remove(self, request: Request, block_size: int) -> None:
        self.prefilled(request)
        self.partial_blocks -= request.prompt_tokens % block_size > 0
        blocks = self.blocks
        for key in request.prompt_keys:
            if blocks[key] == 1:
                del blocks[key]
            else:
                blocks[key] -= 1


class DynamoKvRouter(CacheAware):
    PREFILL_LOAD_SCALE = 1.0
    OVERLAP_SCORE_CREDIT = 1.0
    HOST_CACHE_HIT_WEIGHT = 0.75

    def __init__(self, fleet: FleetInfo, rng: random.Random) -> None:
        super().__init__(fleet, rng)
        self._active: list[ActiveRequests] = fleet.shared.setdefault(
            "dynamo active requests", [ActiveRequests() for _ in range(fleet.replicas)]
        )

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        size = self.fleet.block_size_tokens
        candidates = view.candidates()
        matches = self.index.match(request.packed_prompt_keys, [self.pods[replica] for replica in candidates])
        costs: dict[int, float] = {}
        uncached: dict[int, int] = {}
        for replica in candidates:
            active = self._active[replica]
            held = matches[self.pods[replica]].tokens
            credit = self.OVERLAP_SCORE_CREDIT * held.get(GPU, 0) + self.HOST_CACHE_HIT_WEIGHT * held.get(CPU, 0)
            uncached[replica] = max(request.prompt_tokens - held.get(GPU, 0) - held.get(CPU, 0), 0)
            prefill_blocks = max(active.prefill_total + request.prompt_tokens - credit, 0) / size
            decode_blocks = (
                len(active.blocks)
                + active.partial_blocks
                + active.new_blocks(request.prompt_keys)
                + (request.prompt_tokens % size > 0)
            )
            costs[replica] = self.PREFILL_LOAD_SCALE * prefill_blocks + decode_blocks
        least = min(costs.values())
        chosen = self.rng.choice([replica for replica, cost in costs.items() if cost == least])
        self._active[chosen].add(request, size, uncached[chosen])
        return chosen

    def on_first_token(self, replica: int, request: Request, now_s: float) -> None:
        self._active[replica].prefilled(request)

    def on_finished(self, replica: int, request: Request, now_s: float) -> None:
        self._active[replica].remove(request, self.fleet.block_size_tokens)
