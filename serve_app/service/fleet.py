"""A fleet as the page shows it: the index, Redis, and what a decision would see of each replica's load.

Looked at when somebody asks, and once a second at most however many ask. Nothing of it is on a decision's way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from serve_app.index.description import ages_s
from serve_app.index.holdings import Holdings, HoldingsReader
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.mirror import Mirror
from serve_app.routing.desk import Standing
from serve_app.service import views
from serve_app.types import Domain, PodId, Trust

REPLICAS_MAX = 256
LOOK_S = 1.0

_Known = tuple[Domain, bool, HeartbeatRecord | None]
_IDLE = Standing(0, 0, 0)


class FleetView:
    """Used on one event loop.

    Args:
        holdings: of the Redis that the mirror follows.
        standing: what each of these pods has to do.
        loops: what else runs in this process -> what is wrong with it.
    """

    def __init__(
        self,
        mirror: Mirror,
        holdings: HoldingsReader,
        standing: Callable[[Sequence[PodId]], Mapping[PodId, Standing]],
        loops: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._mirror = mirror
        self._holdings = holdings
        self._standing = standing
        self._loops = loops
        self._lock = asyncio.Lock()
        self._seen: views.Fleet | None = None
        self._look_at_s = 0.0

    async def look(self) -> views.Fleet:
        """As it was a second ago at most."""
        async with self._lock:
            if self._seen is None or time.monotonic() >= self._look_at_s:
                self._seen = await self._look()
                self._look_at_s = time.monotonic() + LOOK_S
            return self._seen

    async def _look(self) -> views.Fleet:
        mirror = self._mirror
        known = mirror.domains()
        tiers = [tier for tier in mirror.block_counts() if "/" not in tier]  # those are of further KV cache groups
        pods, left_out = _most_telling(mirror, [one for one in known if one[0].pod is not None])
        stores = [one for one in known if one[0].pod is None][:REPLICAS_MAX]
        held = await self._holdings.read([domain for domain, _, _ in (*pods, *stores)], tiers)
        ages, standing = ages_s(mirror), self._standing(mirror.pods())
        spec = mirror.spec()
        return views.Fleet(
            [self._replica(one, held, ages, standing) for one in pods],
            left_out,
            [_store(one, held) for one in stores],
            {str(tier): count for tier, count in mirror.block_counts().items() if count},
            spec.block_size if spec is not None else 0,
            held.routers,
            self._redis_health(held),
            {"index": mirror.fault, **self._loops()},
        )

    def _replica(
        self, one: _Known, held: Holdings, ages: Mapping[str, float], standing: Mapping[PodId, Standing]
    ) -> views.Replica:
        domain, live, heartbeat = one
        assert domain.pod is not None
        pod = domain.pod
        age_s, work = ages.get(pod), standing.get(pod, _IDLE)
        return views.Replica(
            pod,
            domain.replica or pod,
            live,
            str(self._mirror.trust(pod)),
            domain.address,
            domain.rank,
            self._mirror.cause(domain.id) or domain.doubt,
            _blocks(domain, heartbeat, held),
            domain.capacity or None,
            work.in_flight,
            work.waiting,
            work.queued_tokens,
            None if age_s is None else round(age_s, 3),
            heartbeat.events_applied if heartbeat else 0,
            heartbeat.events_lost if heartbeat else 0,
            sum(heartbeat.events_skipped.values()) if heartbeat else 0,
        )

    def _redis_health(self, held: Holdings) -> views.Redis:
        stale_s = self._mirror.stale_for_s()
        return views.Redis(
            None if stale_s == float("inf") else round(stale_s, 3),
            round(self._mirror.lag_s, 3),
            None if held.error else round(held.answered_in_s, 6),
            held.error,
        )


def _most_telling(mirror: Mirror, pods: list[_Known]) -> tuple[list[_Known], int]:
    """So many as are shown, by name, and how many more there are."""
    if len(pods) > REPLICAS_MAX:
        pods.sort(key=lambda one: one[1] and mirror.trust(one[0].pod or PodId("")) is Trust.EXACT)
    shown = sorted(pods[:REPLICAS_MAX], key=lambda one: (one[0].replica or one[0].id, one[0].rank or 0))
    return shown, len(pods) - len(shown)


def _blocks(domain: Domain, heartbeat: HeartbeatRecord | None, held: Holdings) -> dict[str, int]:
    if not held.error:
        return {str(tier): count for tier, count in held.blocks[domain.id].items()}
    return {"all": heartbeat.blocks} if heartbeat and heartbeat.blocks else {}


def _store(one: _Known, held: Holdings) -> views.Store:
    domain, live, heartbeat = one
    lost = heartbeat.events_lost if heartbeat else 0
    return views.Store(domain.id, live, domain.address, _blocks(domain, heartbeat, held), lost)
