"""What the tests of the write path and of the router share.

No publisher outlives its test: it would publish into the next one's Valkey.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID

from serve_app.client import AsyncKVCacheClient
from serve_app.deployments import routed
from serve_app.deployments.request_router import KVCacheAwareRouter
from serve_app.index import mirror as mirror_module
from serve_app.index.mirror import Mirror
from tests.contract import serve_router
from tests.contract.score_server import Service
from tests.engine import MODEL, PublisherProcess
from tests.helpers import following
from tests.unit.prompts.conftest import write_model


@pytest.fixture
def a_stop_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror whose machine stands still for a second calls all `stale` for ten more: here for half of one."""
    monkeypatch.setattr(mirror_module, "LATE_LASTS_S", 0.5)


@pytest.fixture
def mirror(redis_url: str) -> Iterator[Mirror]:
    with following(redis_url, MODEL) as mirror:
        yield mirror


@pytest.fixture(autouse=True)
def publishers_end_with_their_test() -> Iterator[None]:
    yield
    while PublisherProcess.started:
        PublisherProcess.started.pop().kill()


@pytest.fixture
def fleet(redis_url: str, tmp_path: Path) -> Iterator[serve_router.Fleet]:
    fleet = serve_router.Fleet(redis_url, write_model(tmp_path))
    yield fleet
    fleet.writer.close()


@pytest.fixture
async def router(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KVCacheAwareRouter]:
    """Ray's request router class, as a process has it that HAProxy or Serve asks."""
    monkeypatch.setattr(routed, "_router", None)
    router = KVCacheAwareRouter(DeploymentID("llm", "app"), DeploymentHandleSource.REPLICA)  # type: ignore[no-untyped-call]  # Ray's
    router.initialize_state(model=serve_router.MODEL, redis_url=redis_url, decision_deadline_s=5)
    router.update_replicas([serve_router.Replica("a"), serve_router.Replica("b")])
    yield router
    await router.decider.close()


@pytest.fixture
async def service(redis_url: str, fleet: serve_router.Fleet) -> AsyncIterator[Service]:
    """Pods a (holds 6 blocks of 10), b (2) and c (none)."""
    for pod, holds in (("a", 6), ("b", 2), ("c", 0)):
        fleet.join_plain(pod, holds=holds, address=f"10.0.0.{ord(pod)}:8000")
    service = Service(redis_url)
    await service.ready(pods=3)
    yield service
    await service.close()


@pytest.fixture
async def kv(service: Service) -> AsyncIterator[AsyncKVCacheClient]:
    async with AsyncKVCacheClient(service.url) as client:
        yield client
