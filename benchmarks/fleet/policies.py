"""How a router chooses a replica: the protocol, and the baselines that look at load or session only.

In: requests, and what one router gets to know: cache events, load reports, its own requests' progress. Out: a
replica. Those of other projects are in policies_<name>.py, one file each; registry.py knows all of them by name.
Each router of a run has its own policy object.
"""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass, field
from typing import Any, Protocol

import xxhash

from benchmarks.fleet.requests import FleetView, LoadReport, Request
from serve_app.types import GPU, BlockKeys, Tier


@dataclass(frozen=True, slots=True)
class FleetInfo:
    """What a router is told at its start."""

    replicas: int
    block_size_tokens: int
    kv_blocks: int  # of one replica
    max_num_batched_tokens: int
    routers: int = 1
    router: int = 0  # which of them this is
    shared: dict[str, Any] = field(default_factory=dict)  # the same object for all routers: what they share at once


class RoutingPolicy(Protocol):
    wants_events: bool  # cache events cost time; who does not look at them does not get them
    outbox: list[Any]  # messages to the other routers' `on_peer`, which get them an event delay later

    def route(self, request: Request, now_s: float, view: FleetView) -> int | None:
        """One of `view.candidates()`; None: the request waits at the router, and this is asked again a little later.

        Called again with fewer candidates if that one refuses.
        """
        ...

    def on_stored(self, replica: int, keys: BlockKeys, now_s: float, tier: Tier = GPU) -> None: ...
    def on_removed(self, replica: int, keys: BlockKeys, now_s: float, tier: Tier = GPU) -> None: ...
    def on_load_report(self, replica: int, report: LoadReport, now_s: float) -> None: ...
    def on_first_token(self, replica: int, request: Request, now_s: float) -> None: ...
    def on_finished(self, replica: int, request: Request, now_s: float) -> None: ...
    def on_peer(self, router: int, message: Any, now_s: float) -> None: ...


class Policy:
    """Base: ignores everything it may get to know. First tokens and ends are told only of the router's own requests."""

    wants_events = False

    def __init__(self, fleet: FleetInfo, rng: random.Random) -> None:
        self.fleet = fleet
        self.rng = rng
        self.outbox: list[Any] = []

    def route(self, request: Request, now_s: float, view: FleetView) -> int | None:
        raise NotImplementedError

    def on_stored(self, replica: int, keys: BlockKeys, now_s: float, tier: Tier = GPU) -> None:
        pass

    def on_removed(self, replica: int, keys: BlockKeys, now_s: float, tier: Tier = GPU) -> None:
        pass

    def on_load_report(self, replica: int, report: LoadReport, now_s: float) -> None:
        pass

    def on_first_token(self, replica: int, request: Request, now_s: float) -> None:
        pass

    def on_finished(self, replica: int, request: Request, now_s: float) -> None:
        pass

    def on_peer(self, router: int, message: Any, now_s: float) -> None:
        pass


class RoundRobin(Policy):
    def __init__(self, fleet: FleetInfo, rng: random.Random) -> None:
        super().__init__(fleet, rng)
        self._turn = rng.randrange(fleet.replicas)

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        candidates = view.candidates()
        self._turn += 1
        return candidates[self._turn % len(candidates)]


class LeastLoaded(Policy):
    """Fewest requests in flight; ties at random."""

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        candidates = view.candidates()
        least = min(view.in_flight[replica] for replica in candidates)
        return self.rng.choice([replica for replica in candidates if view.in_flight[replica] == least])


class PowerOfTwo(Policy):
    """The less loaded of two at random: Ray Serve's default."""

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        candidates = view.candidates()
        two = self.rng.sample(candidates, min(2, len(candidates)))
        return min(two, key=view.in_flight.__getitem__)


class ConsistentHash(Policy):
    """A ring of hashed points, 100 for each replica; a session goes to the next point's replica."""

    POINTS = 100

    def __init__(self, fleet: FleetInfo, rng: random.Random) -> None:
        super().__init__(fleet, rng)
        self._ring = sorted(
            (xxhash.xxh3_64_intdigest(f"{replica}/{point}".encode()), replica)
            for replica in range(fleet.replicas)
            for point in range(self.POINTS)
        )

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        start = bisect.bisect(self._ring, (xxhash.xxh3_64_intdigest(b"session %d" % request.session), 0))
        for i in range(len(self._ring)):
            replica = self._ring[(start + i) % len(self._ring)][1]
            if replica not in view.closed:
                return replica
        raise ValueError("no candidate")
