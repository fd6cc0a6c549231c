"""Sticky sessions with spill: a session stays where it is, unless that replica has far too many requests.

A new session goes to the replica with the fewest sessions (`sticky_least_loaded` of vllm-project/router at 335c57e;
sessions expire after two hours there, which no run here lasts). It moves to the least loaded replica when its own
has more than twice the mean of requests and at least 8 more than the least: the defaults of AIBrix's load gate
(policies_aibrix.py). vLLM's router itself never moves a session. Ties go by hash of the session, as there.
"""

from __future__ import annotations

import random
from collections import Counter

import xxhash

from benchmarks.fleet.policies import FleetInfo, Policy
from benchmarks.fleet.policies_aibrix import imbalanced
from benchmarks.fleet.requests import FleetView, Request


class StickySessions(Policy):
    def __init__(self, fleet: FleetInfo, rng: random.Random) -> None:
        super().__init__(fleet, rng)
        self._home: dict[int, int] = fleet.shared.setdefault("sticky homes", {})
        self._sessions: Counter[int] = fleet.shared.setdefault("sticky sessions", Counter())

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        loads = {replica: view.in_flight[replica] for replica in view.candidates()}
        home = self._home.get(request.session)
        if home is not None:
            most = max(loads.values())
            if home in loads and not (loads[home] == most and imbalanced(list(loads.values()))):
                return home
            self._sessions[home] -= 1
            return self._settle(request.session, loads)
        return self._settle(request.session, {replica: self._sessions[replica] for replica in loads})

    def _settle(self, session: int, loads: dict[int, int]) -> int:
        least = min(loads.values())
        chosen = min(
            (replica for replica, load in loads.items() if load == least),
            key=lambda replica: xxhash.xxh3_64_intdigest(f"{session}:{replica}".encode()),
        )
        self._home[session] = chosen
        self._sessions[chosen] += 1
        return chosen
