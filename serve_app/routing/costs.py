"""What a request would cost at a pod: see `Cost` for the terms, `CostWeights` for what can be set.

prompt of 1,000 tokens; the pod holds 600 in GPU blocks and 200 in CPU memory, has 3 requests in flight, and 500 tokens
of prefill were routed to it that it has not done; its prefill takes 0.1 ms a token
compute   200 * 0.1 ms                20 ms
load      200 * 0.08 * 0.1 ms        1.6 ms
queue     500 * 0.1 ms                50 ms
decode    3 * 8 * 0.1 ms             2.4 ms
balance   0.02 * 16384 * 0.1 ms     32.8 ms      where the fleet's imbalance is 0.02
displace  200 * 1.0 * 0.1 ms          20 ms      where turnover is 1, and no other pod has more room left

Weights are in tokens of prefill, so that they fit a slow fleet as well as a fast one. The last two terms are no part of
the request's own time to first token; they make the choice unselfish. `balance` is for the requests that run there
(imbalance.py). `displace` is for those that come later: computing what another pod holds delays what decodes there, and
pushes as many tokens out of a full cache, to be computed again where they were still wanted (turnover.py). Without it
hits are given up for every short queue, caches fill with copies, and under load the hit rate falls; docs/benchmarks.md
has the figures. Tokens that no pod holds count in it once more where they would push others out, while another pod's
cache has room left for them: an engine that was reset or has just come gets what is new, and what it lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from serve_app.routing.adapters import LOAD_S
from serve_app.routing.choice import Cost
from serve_app.scoring import TRUST_WEIGHTS
from serve_app.types import CPU, GPU, LMCACHE, PodMatch, Tier

TIER_LOAD: Mapping[Tier, float] = MappingProxyType({GPU: 0.0, CPU: 0.08, LMCACHE: 0.12, Tier("storage"): 0.3})


@dataclass(frozen=True, slots=True)
class CostWeights:
    """What counts how much."""

    tier_load: Mapping[Tier, float] = field(default_factory=lambda: TIER_LOAD)  # of a token's prefill
    unknown_tier_load: float = 0.3
    in_flight_tokens: float = 8.0  # tokens of prefill by which one request in flight slows another's
    imbalance_tokens: float = 16_384.0  # what having twice the fleet's mean in flight costs, beyond chance
    displace: float = 1.0  # of the tokens to compute
    adapter_load_s: float = LOAD_S  # seconds that loading a LoRA adapter takes


def tokens_to_compute(prompt_tokens: int, match: PodMatch, soon_tokens: int) -> int:
    """What a pod has to compute of a prompt; at least one token, to have an answer from.

    Args:
        match: what it holds; what is not trusted counts less.
        soon_tokens: how much it will hold when what was routed there before is done; at most that is speculative.
    """
    held = int(match.total_tokens * TRUST_WEIGHTS[match.trust]) if match.tokens else 0
    return max(prompt_tokens - max(held, soon_tokens), 1)


def cost(
    compute_tokens: int,
    match: PodMatch,
    queued_tokens: float,
    in_flight: int,
    imbalance: float,
    s_per_token: float,
    turnover: float,
    evicted_tokens: float,
    weights: CostWeights,
) -> Cost:
    """The cost at one pod.

    Args:
        compute_tokens: what it has to compute.
        match: what it holds of the prompt.
        queued_tokens: prefill that it has not done yet.
        in_flight: requests that it has.
        imbalance: how many too many, in means of the fleet (imbalance.py).
        s_per_token: its time of prefill.
        turnover: how much was computed there lately, beside the pod where it was most: 0 to 1.
        evicted_tokens: what this pod must push out for it, beyond what the pod with most room must.
    """
    load = 0.0
    for tier, tokens in match.tokens.items():
        load += tokens * weights.tier_load.get(tier, weights.unknown_tier_load)
    displaced = compute_tokens * turnover + evicted_tokens
    return Cost(
        compute_tokens * s_per_token,
        load * s_per_token,
        queued_tokens * s_per_token,
        in_flight * weights.in_flight_tokens * s_per_token,
        imbalance * weights.imbalance_tokens * s_per_token,
        displaced * weights.displace * s_per_token,
    )
