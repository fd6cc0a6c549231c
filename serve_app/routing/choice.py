"""What a decision is: the candidates in order, what the order rests on, and the cost of each. Types only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from serve_app.types import PodId


class Policy(StrEnum):
    """How the router chooses a pod."""

    KV_AWARE = "kv_aware"  # by what the replicas hold, as the strategy weighs it
    LEAST_LOADED = "least_loaded"
    ROUND_ROBIN = "round_robin"
    SESSION = "session"  # consistent hash of the session, with bounded load


class Outcome(StrEnum):
    """What a decision rested on; a metric label."""

    HIT = "hit"  # a pod that holds a prefix of the prompt, or will before the request's turn comes
    MISS = "miss"  # a pod that holds none of it
    FALLBACK = "fallback"  # cache knowledge was missing, for the reason given
    BASELINE = "baseline"  # the policy does not ask


class Cost(NamedTuple):
    """What a request would cost at one pod, in seconds. `ttft_s` says which terms are its own time to first token.

    A token's prefill time is the pod's own (learning.py), so the terms of a slow and a fast pod can be compared.
    """

    compute_s: float = 0.0  # prefill of the tokens that are in no tier of the pod
    load_s: float = 0.0  # bringing matched tokens from slower tiers
    queue_s: float = 0.0  # prefill that was routed there before and is not done
    decode_s: float = 0.0  # requests that run there slow the prefill down
    balance_s: float = 0.0  # it has more than its share of the fleet's requests: all that run there wait longer
    displace_s: float = 0.0  # what the new blocks push out, and whom the prefill delays, must be made good later
    suspect_s: float = 0.0  # it does not answer as it should (suspicion.py)
    adapter_s: float = 0.0  # the request's LoRA adapter must be loaded first (adapters.py)

    @property
    def ttft_s(self) -> float:
        return self.compute_s + self.load_s + self.queue_s + self.decode_s + self.adapter_s

    @property
    def total_s(self) -> float:
        return sum(self)


@dataclass(frozen=True, slots=True)
class Choice:
    """All candidates, best first, and what the order rests on."""

    ranked: list[PodId]
    outcome: Outcome
    reason: str
    costs: Mapping[PodId, Cost] = field(default_factory=dict)  # empty: the order does not rest on costs
    held_tokens: Mapping[PodId, int] = field(default_factory=dict)  # of the prompts, speculative blocks included
    loads: Mapping[PodId, int] = field(default_factory=dict)  # requests in flight; empty: the policy does not ask
    adapter: str = ""  # that the request asks for, if it is one

    def with_last(self, pods: Collection[PodId]) -> Choice:
        """The same, but these pods come after all others."""
        return replace(self, ranked=sorted(self.ranked, key=pods.__contains__)) if pods else self
