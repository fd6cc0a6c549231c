"""Policies by name. `ours` is the one that ships; `longest_prefix` is the same router with that strategy."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial

from benchmarks.fleet.policies import ConsistentHash, FleetInfo, LeastLoaded, PowerOfTwo, RoundRobin, RoutingPolicy
from benchmarks.fleet.policies_aibrix import AIBrixPrefixCache
from benchmarks.fleet.policies_dynamo import DynamoKvRouter
from benchmarks.fleet.policies_llmd import LLMD_ACTIVE, LLMDScorers
from benchmarks.fleet.policies_lmetric import LMetric
from benchmarks.fleet.policies_ours import ChooserPolicy
from benchmarks.fleet.policies_preble import Preble
from benchmarks.fleet.policies_ray import PrefixCacheAffinity
from benchmarks.fleet.policies_sglang import SGLangCacheAware, VllmRouter
from benchmarks.fleet.policies_sticky import StickySessions
from serve_app.scoring import Strategy

PolicyFactory = Callable[[FleetInfo, random.Random], RoutingPolicy]

ORACLE = "oracle"
"""Least loaded on replicas that share one infinite cache: no policy can hit more, or with less imbalance."""

POLICIES: Mapping[str, PolicyFactory] = {
    "ours": ChooserPolicy,
    "longest_prefix": partial(ChooserPolicy, strategy=Strategy.LONGEST_PREFIX),
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "consistent_hash": ConsistentHash,
    "prefix_cache_affinity": PrefixCacheAffinity,
    "dynamo": DynamoKvRouter,
    "dynamo_decay": partial(DynamoKvRouter, overlap_credit_decay=1.0),
    "lmetric": LMetric,
    "lmetric_llmd": partial(LMetric, queued=False),
    "sticky": StickySessions,
    "llmd": LLMDScorers,
    "llmd_active": partial(LLMDScorers, weights=LLMD_ACTIVE),
    "sglang": SGLangCacheAware,
    "vllm_router": VllmRouter,
    "aibrix": AIBrixPrefixCache,
    "preble": Preble,
    ORACLE: LeastLoaded,
}
