"""What Redis itself says of a fleet: how many blocks each domain holds, and how many routers there are.

It keeps the sizes of its sets, so this costs one short question however large the index is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import redis

from serve_app.index.connection import leave_server
from serve_app.index.faults import store_error
from serve_app.index.keyspace import Keyspace
from serve_app.types import Domain, DomainId, ModelId, Tier


class Holdings(NamedTuple):
    """How many blocks each domain holds, by Redis' own count."""

    blocks: Mapping[DomainId, Mapping[Tier, int]]  # by tier; empty: not known
    routers: int
    answered_in_s: float
    error: str = ""  # why nothing is known, and what to do


class HoldingsReader:
    """Args: client: of the Redis that has the model's keys."""

    def __init__(self, client: redis.Redis, model: ModelId) -> None:
        self._redis = client
        self._keys = Keyspace(model)

    async def read(self, domains: Sequence[Domain], tiers: Sequence[Tier]) -> Holdings:
        """Off the event loop. Never fails: `error` says why nothing is known."""
        return await asyncio.to_thread(_read, self._redis, self._keys, domains, tiers)


def _read(client: redis.Redis, keys: Keyspace, domains: Sequence[Domain], tiers: Sequence[Tier]) -> Holdings:
    start_s = time.perf_counter()
    try:
        with client.pipeline(transaction=False) as pipeline:
            pipeline.zcard(keys.routers)
            for domain in domains:
                for tier in tiers:
                    pipeline.scard(keys.blocks(domain.id, domain.epoch, tier))
            routers, *counts = _whole(pipeline.execute())
    except (redis.RedisError, OSError) as error:
        leave_server(client, error)
        return Holdings({}, 0, 0.0, str(store_error(error, keys)))
    of_each = iter(counts)
    blocks = {domain.id: {tier: count for tier in tiers if (count := next(of_each))} for domain in domains}
    return Holdings(blocks, routers, time.perf_counter() - start_s)


def _whole(answers: Any) -> list[int]:
    return [int(answer) for answer in answers]
