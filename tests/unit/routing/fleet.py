"""A router and what it can know: the classes that ship, an index in memory, and a clock that the test holds."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from serve_app.blocks import KEY_BYTES
from serve_app.index.memory import MemoryIndex
from serve_app.routing.choice import Choice, Policy
from serve_app.routing.chooser import Chooser, Sent
from serve_app.routing.costs import CostWeights
from serve_app.scoring import Strategy
from serve_app.types import (
    GPU,
    BlockKeys,
    Domain,
    DomainId,
    EncodedKeys,
    EngineSpec,
    Epoch,
    Found,
    ModelId,
    PodId,
    PodLoad,
    Served,
    Tier,
)

BLOCK_SIZE = 16
A, B, C, D = (PodId(name) for name in "abcd")
START_S = 1000.0


def text(name: str, blocks: int) -> BlockKeys:
    """Keys of so many blocks of a text; texts of different names share none."""
    return b"".join(xxhash.xxh3_64_digest(f"{name} {i}".encode()) for i in range(blocks))


def prompt(keys: BlockKeys, rest_tokens: int = 5, *, complete: bool = True) -> EncodedKeys:
    """Full blocks, and a few tokens that are in none."""
    tokens = len(keys) // KEY_BYTES * BLOCK_SIZE + rest_tokens
    return EncodedKeys(keys, tokens, tokens, "" if complete else "tokens_late")


class Router:
    """Args: index: shared by the routers that see the same events."""

    def __init__(
        self,
        pods: Sequence[PodId] = (A, B, C, D),
        index: MemoryIndex | None = None,
        policy: Policy = Policy.KV_AWARE,
        strategy: Strategy = Strategy.EXPECTED_TTFT,
        weights: CostWeights | None = None,
    ) -> None:
        self.pods = list(pods)
        self.index = index or MemoryIndex()
        for pod in pods:
            self.index.join(Domain(DomainId(pod), Epoch(1), EngineSpec(ModelId("m"), BLOCK_SIZE, ""), pod))
        self.chooser = Chooser(self.index.held, policy, strategy, weights)

    def found(self, *prompts: EncodedKeys) -> Found:
        return Found(prompts, [self.index.match(one.keys, self.pods) for one in prompts], BLOCK_SIZE)

    def choose(self, keys: BlockKeys, now_s: float = START_S) -> Choice:
        return self.chooser.choose(self.pods, self.found(prompt(keys)), now_s)

    def send(self, *prompts: EncodedKeys, now_s: float = START_S) -> tuple[Sent, Found]:
        """Choose, and send there."""
        found = self.found(*prompts)
        choice = self.chooser.choose(self.pods, found, now_s)
        return self.chooser.sent(choice.ranked[0], found, choice, now_s), found

    def route(self, keys: BlockKeys, now_s: float = START_S) -> PodId:
        """Who gets a request with this prompt."""
        return self.send(prompt(keys), now_s=now_s)[0].pod

    def stored(self, pod: PodId, keys: BlockKeys, tier: Tier = GPU) -> None:
        """The pod's events have said so."""
        self.index.add(DomainId(pod), Epoch(1), tier, keys)

    def reported(self, pod: PodId, in_flight: int, now_s: float, unused_blocks: int = 0) -> None:
        self.chooser.loaded(pod, PodLoad(in_flight, now_s, unused_blocks))

    def answered(self, keys: BlockKeys, now_s: float) -> PodId:
        """A request that is served before the next one comes, on a fleet that has nothing else to do."""
        pod = self.route(keys, now_s)
        self.stored(pod, keys)
        self.reported(pod, 0, now_s + 1.0)
        return pod


def served(computed: int, prefill_s: float, cached: int = 0) -> Served:
    return Served("id", computed + cached, cached, 0.0, prefill_s)
