"""The `cache_aware` policy of SGLang's gateway, and vLLM's router, which is a fork of it. Defaults of both commands.

- where the busiest has more than 64 requests more than the least and more than 1.5 times as many: the least loaded;
- where more than 0.3 of the prompt is in the prefix tree: the replica that first was sent what the match ends in;
- else the least loaded (the first of equals).

The tree holds what was routed, not what is cached. `VllmRouter` also keeps a session where it was last sent, by
exact key, before it looks at the tree; uneven load moves it. Sources: sgl-model-gateway/src/policies/cache_aware.rs
and tree.rs of sgl-project/sglang at 053b63f and 03744db; src/policies/cache_aware.rs of vllm-project/router at
16917f4 (v0.1.15). The trees forget above 67 million characters a replica; no run here comes to that. Each router
has its own tree, as theirs have.

A tree over chained keys needs no tree: a key stands for its whole prefix, so a dict from key to the first tenant is
the same.
"""

from __future__ import annotations

import random

from benchmarks.fleet.policies import FleetInfo, Policy
from benchmarks.fleet.requests import FleetView, Request
from serve_app.types import BlockKey


class SGLangCacheAware(Policy):
    def __init__(
        self,
        fleet: FleetInfo,
        rng: random.Random,
        cache_threshold: float = 0.3,
        balance_abs_threshold: int = 64,
        balance_rel_threshold: float = 1.5,
    ) -> None:
        super().__init__(fleet, rng)
        self._cache_threshold = cache_threshold
        self._balance_abs_threshold = balance_abs_threshold
        self._balance_rel_threshold = balance_rel_threshold
        self._tenants: dict[BlockKey, int] = {}

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        candidates = view.candidates()
        chosen = self._choose(request, candidates, view)
        for key in request.prompt_keys:
            self._tenants.setdefault(key, chosen)
        return chosen

    def _choose(self, request: Request, candidates: list[int], view: FleetView) -> int:
        least_loaded = min(candidates, key=view.in_flight.__getitem__)
        if self._imbalanced(candidates, view):
            return least_loaded
        return self._by_prefix(request, candidates, least_loaded)

    def _imbalanced(self, candidates: list[int], view: FleetView) -> bool:
        loads = [view.in_flight[replica] for replica in candidates]
        return max(loads) - min(loads) > self._balance_abs_threshold and max(loads) > self._balance_rel_threshold * min(
            loads
        )

    def _by_prefix(self, request: Request, candidates: list[int], least_loaded: int) -> int:
        matched, tenant = 0, -1
        for key in request.prompt_keys:
            known = self._tenants.get(key)
            if known is None:
                break
            matched, tenant = matched + 1, known
        if matched <= self._cache_threshold * len(request.prompt_keys):
            return least_loaded
        return tenant if tenant in candidates else candidates[0]


class VllmRouter(SGLangCacheAware):
    def __init__(self, fleet: FleetInfo, rng: random.Random) -> None:
        super().__init__(fleet, rng)
        self._sessions: dict[int, int] = {}

    def _choose(self, request: Request, candidates: list[int], view: FleetView) -> int:
        chosen = super()._choose(request, candidates, view)
        self._sessions[request.session] = chosen
        return chosen

    def _by_prefix(self, request: Request, candidates: list[int], least_loaded: int) -> int:
        known = self._sessions.get(request.session)
        return known if known in candidates else super()._by_prefix(request, candidates, least_loaded)
