"""How unevenly the fleet's requests are spread: what each pod has in flight, beside the mean.

A request slows all that run with it for as long as it runs, and a pod that has twice its share makes twice as many wait
for every token. How many requests that is depends on the fleet: 40 more are a lot where 20 are in flight, and chance
where 400 are. So the difference counts as a share of the mean, and only what lies beyond a quarter of it:

    in flight   a 130, b 100, c 90, d 80   mean 100   beyond a quarter: a 0.05    ->   a 0.05, the others 0
    in flight   a 200, b 100, c 90, d 10              a 1.0 - 0.25, d -0.9 + 0.25 ->   a 1.4, b 0.65, c 0.65, d 0

A weight in tokens for every request in flight fits one fleet only: on the simulated fleets of docs/benchmarks.md 512
gave hits away where hundreds were in flight, and 64 left others unbalanced.
"""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.types import PodId

CHANCE = 0.25  # of the mean: differences up to this are chance
FEW = 16.0  # a mean below this counts as this


def imbalance(loads: Mapping[PodId, int]) -> dict[PodId, float]:
    """How far each pod is above the one with the least, in means of the fleet: 0 for all where they are about even.

    Args:
        loads: requests in flight.
    """
    if not loads:
        return {}
    mean = sum(loads.values()) / len(loads)
    unit = max(mean, FEW)
    if max(loads.values()) - mean <= CHANCE * unit >= mean - min(loads.values()):
        return dict.fromkeys(loads, 0.0)  # the usual case
    beyond = {pod: _beyond_chance((count - mean) / unit) for pod, count in loads.items()}
    least = min(beyond.values())
    return {pod: value - least for pod, value in beyond.items()}


def _beyond_chance(difference: float) -> float:
    return max(difference - CHANCE, 0.0) + min(difference + CHANCE, 0.0)
