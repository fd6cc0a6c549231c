"""How well a pod's match suits a prompt, as one number. Pure functions; larger is better, 0 is no match.

prompt of 6 blocks of 16 tokens; a pod holds blocks 0 1 2 in GPU, 3 in CPU memory, and block 5
longest_prefix     3 * 16 * 1.0 + 1 * 16 * 0.8 = 60.8    tokens that need no prefill, by what loading them costs
highest_block_hit  5                                     blocks held anywhere
coverage           64 / 100 = 0.64                       share of the prompt's (100) tokens that need no prefill
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from serve_app.types import CPU, GPU, LMCACHE, Found, PodId, PodMatch, Tier, Trust


class Strategy(StrEnum):
    EXPECTED_TTFT = "expected_ttft"  # by the load of the pods too: serve_app/routing
    LONGEST_PREFIX = "longest_prefix"
    HIGHEST_BLOCK_HIT = "highest_block_hit"
    COVERAGE = "coverage"

    @property
    def counts_hits(self) -> bool:
        """Whether the index must look beyond the first gap."""
        return self is Strategy.HIGHEST_BLOCK_HIT


TIER_WEIGHTS: Mapping[Tier, float] = MappingProxyType({GPU: 1.0, CPU: 0.8, LMCACHE: 0.75, Tier("storage"): 0.5})
UNKNOWN_TIER_WEIGHT = 0.5

TRUST_WEIGHTS: Mapping[Trust, float] = MappingProxyType(
    {Trust.EXACT: 1.0, Trust.DEGRADED: 0.9, Trust.STALE: 0.8, Trust.UNKNOWN: 0.8}
)
"""What a matched token is worth, by the trust in its pod. A bounded part of a degraded pod is in doubt, so it loses
only against equals; of a stale one any block may have gone unheard, for a second or two: then its lease ends.
"""


def score_all(found: Found, strategy: Strategy) -> dict[PodId, float]:
    """Score of every pod that was looked up, summed over the request's prompts."""
    scores: dict[PodId, float] = {}
    for prompt, matches in zip(found.prompts, found.matches, strict=True):
        for pod, match in matches.items():
            scores[pod] = scores.get(pod, 0.0) + score(match, prompt.token_count, strategy)
    return scores


def score(
    match: PodMatch,
    prompt_tokens: int,
    strategy: Strategy = Strategy.LONGEST_PREFIX,
    tier_weights: Mapping[Tier, float] = TIER_WEIGHTS,
) -> float:
    """Score of one pod for a prompt of `prompt_tokens` tokens; what is not trusted counts less."""
    return TRUST_WEIGHTS[match.trust] * _score(match, prompt_tokens, strategy, tier_weights)


def _score(match: PodMatch, prompt_tokens: int, strategy: Strategy, tier_weights: Mapping[Tier, float]) -> float:
    match strategy:
        case Strategy.LONGEST_PREFIX | Strategy.EXPECTED_TTFT:
            total = 0.0
            for tier, count in match.tokens.items():
                total += count * tier_weights.get(tier, UNKNOWN_TIER_WEIGHT)
            return total
        case Strategy.HIGHEST_BLOCK_HIT:
            return float(match.hit_blocks)
        case Strategy.COVERAGE:
            return match.total_tokens / prompt_tokens if prompt_tokens else 0.0
