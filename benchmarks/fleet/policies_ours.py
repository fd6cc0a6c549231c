"""The policy that ships, on the index that ships: serve_app.routing.Chooser, fed as the request router feeds it.

A simulated first token or end is not told to it: a router of ours learns of both through what the replicas publish.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.fleet.policies import FleetInfo
from benchmarks.fleet.policies_cache import CacheAware
from benchmarks.fleet.requests import FleetView, LoadReport, Request
from serve_app.routing.chooser import Chooser, Sent
from serve_app.routing.costs import CostWeights
from serve_app.scoring import Strategy
from serve_app.types import BlockKeys, EncodedKeys, Found, PodId, PodLoad

Route = tuple[int, BlockKeys, int]
"""What one router tells the others: replica, block keys, tokens to compute."""


class ChooserPolicy(CacheAware):
    """Args: strategy, weights: as in RouterSettings."""

    def __init__(
        self,
        fleet: FleetInfo,
        rng: random.Random,
        strategy: Strategy = Strategy.EXPECTED_TTFT,
        weights: CostWeights | None = None,
    ) -> None:
        super().__init__(fleet, rng)
        self.chooser = Chooser(self._held, strategy=strategy, weights=weights)
        self._sent: Sent | None = None

    def route(self, request: Request, now_s: float, view: FleetView) -> int:
        if view.closed and self._sent is not None:  # the replica of the call before has refused
            self.chooser.withdraw(self._sent)
        pods = [self.pods[replica] for replica in view.candidates()]
        keys = request.packed_prompt_keys
        prompt = EncodedKeys(keys, request.prompt_tokens, request.prompt_tokens)
        found = Found(
            [prompt],
            [self.index.match(keys, pods, count_hits=self.chooser.strategy.counts_hits)],
            self.fleet.block_size_tokens,
        )
        choice = self.chooser.choose(pods, found, now_s)
        pod = choice.ranked[0]
        self._sent = self.chooser.sent(pod, found, choice, now_s)
        if self.fleet.routers > 1:
            compute = request.prompt_tokens - choice.held_tokens.get(pod, 0)
            self.outbox.append((int(pod), keys, compute))
        return int(pod)

    def on_load_report(self, replica: int, report: LoadReport, now_s: float) -> None:
        self.chooser.loaded(self.pods[replica], PodLoad(report.in_flight, now_s, report.unused_blocks))

    def on_peer(self, router: int, message: Route, now_s: float) -> None:
        replica, keys, tokens = message
        self.chooser.routed(self.pods[replica], keys, tokens, now_s)

    def _held(self, pods: Sequence[PodId], keys: BlockKeys) -> list[bool]:
        return self.index.held(pods, keys)
