"""How far a pod's matches can be relied on, and what it costs when they cannot."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from serve_app.config import GraphArgs
from serve_app.deployments.graph import BlockIndex
from serve_app.errors import StoreError
from serve_app.index import mirror as mirror_module
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.routing.costs import tokens_to_compute
from serve_app.scoring import TRUST_WEIGHTS, score
from serve_app.types import GPU, DomainId, Epoch, PodId, PodMatch, Trust
from tests.helpers import MODEL, eventually, keys, pod
from tests.servers import Server

A, B = PodId("a"), PodId("b")
PROMPT = keys(*range(10))


def test_a_degraded_pod_and_a_silent_redis_show_in_every_match(tmp_path: Path) -> None:
    server = Server(tmp_path)
    writer, mirror = RedisWriter(server.url, MODEL, lease_ttl_s=60), Mirror(server.url, MODEL)
    for domain in (pod("a"), replace(pod("b"), degraded=True)):
        writer.join(domain)
        writer.add(domain.id, domain.epoch, GPU, PROMPT)
    writer.flush()
    for name in ("a", "b"):
        assert writer.heartbeat(DomainId(name), HeartbeatRecord(Epoch(1)))
    mirror.start()
    try:
        eventually(lambda: mirror.pods() == [A, B])

        def trusts() -> dict[PodId, Trust]:
            return {found: match.trust for found, match in mirror.match(PROMPT).items()}

        assert trusts() == {A: Trust.EXACT, B: Trust.DEGRADED}
        assert mirror.match(PROMPT)[B].total_tokens == mirror.match(PROMPT)[A].total_tokens
        server.send(signal.SIGSTOP)
        eventually(lambda: trusts() == {A: Trust.STALE, B: Trust.STALE}, mirror_module.STALE_AFTER_S + 3)
    finally:
        server.send(signal.SIGCONT)
        mirror.close()
        writer.close()
        server.kill()


def test_an_index_that_redis_has_left_serves_on_and_is_not_restarted(tmp_path: Path) -> None:
    server = Server(tmp_path)
    writer = RedisWriter(server.url, MODEL, lease_ttl_s=60)
    writer.join(pod("a"))
    writer.add(DomainId("a"), Epoch(1), GPU, PROMPT)
    writer.flush()
    assert writer.heartbeat(DomainId("a"), HeartbeatRecord(Epoch(1)))
    index = BlockIndex(GraphArgs(model=MODEL, redis_url=server.url), server.url)
    index.check_health()  # Serve asks before the first load, too
    eventually(lambda: asyncio.run(index.match(PROMPT, None, False)))
    server.kill()
    eventually(lambda: index._mirror.counters["errors"] >= 2)
    index._mirror._fresh_at_s = time.monotonic() - 3600
    index.check_health()
    match = asyncio.run(index.match(PROMPT, None, False))[A]
    assert (match.total_tokens, match.trust) == (40, Trust.STALE)
    index._mirror.close()
    with pytest.raises(StoreError, match="no longer follows"):
        index.check_health()
    writer.close()


@pytest.mark.parametrize("trust", list(Trust))
def test_what_is_not_trusted_counts_less(trust: Trust) -> None:
    match = PodMatch({GPU: 800}, trust=trust)
    assert score(match, 1000) == pytest.approx(800 * TRUST_WEIGHTS[trust])
    assert tokens_to_compute(1000, match, 0) == 1000 - int(800 * TRUST_WEIGHTS[trust])
