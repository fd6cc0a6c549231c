"""What other routers have sent a moment ago and this one cannot know yet, and how it keeps them from crowding.

A route takes `UNSEEN_S` or so from one router to the next. Until then all of them see the same pod as the cheapest, and
each sends its next cold prompt there: the pod's queue is soon worth more than a hit, prefixes are copied, and the
copies push out what is wanted. So while others route too, a pod's cost is made uncertain by as much as one unseen
request may add to it, and every prompt draws the pods' places for itself, by rendezvous hashing (Thaler, Ravishankar
1998):

    others route 40 requests/s of 2,000 tokens   4 are unseen   a pod may cost up to 2,000 tokens more than is known
    new prefix P, a and b idle                   hash(P, a) < hash(P, b): a, at every router
    new prefix Q                                 b, perhaps

Equal prompts agree without a word, and a pod that is cheaper by more than an unseen request stays the first. With one
router nothing is unseen, and nothing is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import xxhash

from serve_app.types import BlockKey, PodId

UNSEEN_S = 0.1  # from a router's decision to the others' ledgers: writing every 20 ms, Redis, following the log
_AVERAGE_S = 5.0  # time constant of the average
_HASHES = 2.0**64


class Unseen:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._requests = 0.0  # of other routers, each the less the older
        self._tokens = 0.0
        self._at_s = 0.0

    def routed(self, tokens: float, now_s: float) -> None:
        """Another router has sent a request that costs a pod so many tokens."""
        kept = self._kept(now_s)
        self._requests = self._requests * kept + 1.0
        self._tokens = self._tokens * kept + tokens
        self._at_s = max(now_s, self._at_s)

    def tokens(self, now_s: float) -> float:
        """What an unseen request may add to a pod's cost: its size, or less when there is hardly ever one."""
        if not self._requests:
            return 0.0
        unseen = self._requests * self._kept(now_s) / _AVERAGE_S * UNSEEN_S
        return min(unseen, 1.0) * self._tokens / self._requests

    def _kept(self, now_s: float) -> float:
        return math.exp(min(self._at_s - now_s, 0.0) / _AVERAGE_S)


def places(key: BlockKey, pods: Iterable[PodId]) -> dict[PodId, float]:
    """Between 0 and 1: the same at every router, different for every key."""
    return {pod: xxhash.xxh3_64_intdigest(key + pod.encode()) / _HASHES for pod in pods}
