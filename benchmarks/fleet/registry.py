"""Policies by name.

`ours` is the slot for the policy that ships: put an adapter class here that keeps `RoutingPolicy`, and give it the
shipped classes. Until then it is the present Selector.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from benchmarks.fleet.policies import ConsistentHash, FleetInfo, LeastLoaded, PowerOfTwo, RoundRobin, RoutingPolicy
from benchmarks.fleet.policies_cache import SelectorPolicy
from benchmarks.fleet.policies_candidate import LeastWork
from benchmarks.fleet.policies_dynamo import DynamoKvRouter
from benchmarks.fleet.policies_ray import PrefixCacheAffinity

PolicyFactory = Callable[[FleetInfo, random.Random], RoutingPolicy]

ORACLE = "oracle"
"""Least loaded on replicas that share one infinite cache: no policy can hit more, or with less imbalance."""

POLICIES: Mapping[str, PolicyFactory] = {
    "ours": SelectorPolicy,
    "selector": SelectorPolicy,
    "least_work": LeastWork,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "consistent_hash": ConsistentHash,
    "prefix_cache_affinity": PrefixCacheAffinity,
    "dynamo": DynamoKvRouter,
    ORACLE: LeastLoaded,
}
