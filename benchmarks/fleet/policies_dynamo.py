"""NVIDIA Dynamo's KV router: its documented cost, over an exact index.

In: cache events, and the router's own requests (sent, first token, end). Out: the replica of least cost,

    prefill blocks = (prompt tokens not answered with a first token yet, net of their hits + this one's) / block size
    decode blocks  = distinct prompt blocks of all active requests, this one's included
    cost           = prefill_load_scale * (prefill blocks - overlap_score_credit * blocks held here) + decode blocks

ties at random (`router_temperature` 0); blocks in CPU memory count 0.75 of the credit. The credit on the GPU is
divided by 1 + decay x (prefill queued here beyond the least) / prompt; the decay is 0 unless asked for. While every
replica has more than 16 x max_num_batched_tokens of prefill queued, requests wait at the router, first come, first
served. Source: "Cost Calculation" of Dynamo's router documentation,
lib/kv-router/src/scheduling/selector/default.rs at 07a6c9c with its tests, and the defaults of `KvRouterConfig` in
ai-dynamo-runtime 1.6.1. Not its code: `SelectionService` in that wheel takes cache events only from a live ZMQ
socket and tells its own time, so it cannot run in simulated time. The index is ours (MemoryIndex); prefix matches
are exact in either. Blocks of answers are not counted (`router_track_output_blocks` is off). Several routers share
their active requests at once, which `router_replica_sync` does a little later.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.fleet.policies import FleetInfo
from benchmarks.fleet.policies_cache import CacheAware, PendingPrefill
from benchmarks.fleet.requests import FleetView, Request
from serve_app.types import CPU, GPU, BlockKey


@dataclass(slots=True)
class ActiveRequests:
    """What one replica is at, as the router believes."""

    blocks: Counter[BlockKey] = field(default_factory=Counter)  # prompt blocks, by how many requests use them
    partial_blocks: int = 0  # prompts that end inside a block: one more block each, never shared
    prefill: PendingPrefill = field(default_factory=PendingPrefill)

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
        self.prefill.add(request, prefill_tokens)

    def remove(self, request: Request, block_size: int) -> None:
        self.prefill.done(request)
        self.partial_blocks -= request.prompt_tokens % block_size > 0
        blocks = self.blocks
        for key in request.prompt_keys:
            if blocks[key] == 1:
                del blocks[key]
            else:
                blocks[key] -= 1


class DynamoKvRouter(CacheAware):
    """Args: overlap_credit_decay: how fast the credit for blocks on the GPU falls with the prefill queued there."""

    PREFILL_LOAD_SCALE = 1.0
    OVERLAP_SCORE_CREDIT = 1.0
    HOST_CACHE_HIT_WEIGHT = 0.75
    QUEUE_THRESHOLD = 16.0  # of max_num_batched_tokens

    def __init__(self, fleet: FleetInfo, rng: random.Random, overlap_credit_decay: float = 0.0) -> None:
        super().__init__(fleet, rng)
        self._decay = overlap_credit_decay
        self._active: list[ActiveRequests] = fleet.shared.setdefault(
            "dynamo active requests", [ActiveRequests() for _ in range(fleet.replicas)]
        )
        self._held: deque[int] = deque()  # requests that wait at this router

    def route(self, request: Request, now_s: float, view: FleetView) -> int | None:
        if self._must_wait(request, view.candidates()):
            return None
        costs, uncached = self._costs(request, view.candidates())
        least = min(costs.values())
        chosen = self.rng.choice([replica for replica, cost in costs.items() if cost == least])
        self._active[chosen].add(request, self.fleet.block_size_tokens, uncached[chosen])
        return chosen

    def on_first_token(self, replica: int, request: Request, now_s: float) -> None:
        self._active[replica].prefill.done(request)

    def on_finished(self, replica: int, request: Request, now_s: float) -> None:
        self._active[replica].remove(request, self.fleet.block_size_tokens)

    def _must_wait(self, request: Request, candidates: Sequence[int]) -> bool:
        """Every replica has more prefill queued than the threshold, or others wait longer: first come, first served."""
        most = self.QUEUE_THRESHOLD * self.fleet.max_num_batched_tokens
        is_first = not self._held or self._held[0] == request.id
        if not is_first or all(self._active[replica].prefill.total > most for replica in candidates):
            if request.id not in self._held:
                self._held.append(request.id)
            return True
        if self._held:
            self._held.popleft()
        return False

    def _costs(self, request: Request, candidates: Sequence[int]) -> tuple[dict[int, float], dict[int, int]]:
        """Cost in blocks at each replica, and the prompt tokens that it holds in no tier."""
        size = self.fleet.block_size_tokens
        matches = self.index.match(request.packed_prompt_keys, [self.pods[replica] for replica in candidates])
        costs: dict[int, float] = {}
        uncached: dict[int, int] = {}
        lightest = min(self._active[replica].prefill.total for replica in candidates)
        for replica in candidates:
            active = self._active[replica]
            held = matches[self.pods[replica]].tokens
            excess = (active.prefill.total - lightest) / max(request.prompt_tokens, 1)
            gpu_credit = self.OVERLAP_SCORE_CREDIT / (1.0 + self._decay * excess)
            credit = gpu_credit * held.get(GPU, 0) + self.HOST_CACHE_HIT_WEIGHT * held.get(CPU, 0)
            uncached[replica] = max(request.prompt_tokens - held.get(GPU, 0) - held.get(CPU, 0), 0)
            prefill_blocks = max(active.prefill.total + request.prompt_tokens - credit, 0) / size
            decode_blocks = (
                len(active.blocks)
                + active.partial_blocks
                + active.new_blocks(request.prompt_keys)
                + (request.prompt_tokens % size > 0)
            )
            costs[replica] = self.PREFILL_LOAD_SCALE * prefill_blocks + decode_blocks
        return costs, uncached
