"""The node's LMCache server over its life: first come, shared, killed, left. Real Ray and LMCache, no engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from serve_app.config import LMCacheSettings
from serve_app.deployments.lmcache import _HEARTBEAT_S, LMCacheAttachment
from serve_app.errors import ConfigError, StoreError
from serve_app.events.lmcache_server import LMCacheProcess
from serve_app.events.lmcache_source import chunk_size_of
from tests.helpers import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SETTINGS = LMCacheSettings(size_gb=0.01, chunk_size=64, linger_s=1)


@pytest.fixture(scope="module", autouse=True)
def a_ray_session() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def servers(attachment: LMCacheAttachment) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if attachment._node in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def port_of(kv_transfer_config: dict[str, Any]) -> int:
    port: int = kv_transfer_config["kv_connector_extra_config"]["lmcache.mp.port"]
    return port


def answers(port: int) -> bool:
    try:
        return chunk_size_of(f"tcp://127.0.0.1:{port}") == SETTINGS.chunk_size
    except StoreError:
        return False


def is_there(actor: str) -> bool:
    try:
        ray.get_actor(actor, namespace="kvcache")
    except ValueError:
        return False
    return True


async def test_the_life_of_a_server() -> None:
    first, second = LMCacheAttachment(SETTINGS, "first"), LMCacheAttachment(SETTINGS, "second")
    one, other = await asyncio.gather(first.start(32), second.start(32))
    assert one == other
    assert len(servers(first)) == 1
    port = port_of(one)

    # The actor dies, and the server with it: a replica that is still there brings it back, where engines look for it.
    holding = asyncio.create_task(first.hold())
    ray.kill(first._actor())
    await asyncio.to_thread(eventually, lambda: not servers(first), 15)
    await asyncio.to_thread(eventually, lambda: len(servers(first)) == 1 and answers(port), 60)

    # The server dies: it is back on its port, but only when every engine's heartbeat must have missed it.
    (server,) = servers(first)
    server.kill()
    killed_s = time.monotonic()
    await asyncio.to_thread(eventually, lambda: not servers(first))
    while time.monotonic() < killed_s + 2 * _HEARTBEAT_S:
        assert servers(first) == []
        await asyncio.sleep(0.1)
    await asyncio.to_thread(eventually, lambda: len(servers(first)) == 1 and answers(port), 60)

    # Nobody is left: it ends.
    holding.cancel()
    await asyncio.to_thread(eventually, lambda: not servers(first), 60)
    await asyncio.to_thread(eventually, lambda: not is_there(f"lmcache-{first._node}"), 15)


async def test_attaching_to_a_server_that_runs_already(tmp_path: Path) -> None:
    theirs = LMCacheProcess(size_gb=0.01, chunk_size=64, eviction_policy="LRU", instance="theirs", log=tmp_path / "log")
    try:
        attachment = LMCacheAttachment(LMCacheSettings(attach=f"127.0.0.1:{theirs.port}", linger_s=0), "pod")
        assert port_of(await attachment.start(32)) == theirs.port
        assert servers(attachment) == []
        with pytest.raises(ConfigError, match=r"64 is no multiple of the engine's block size 48"):
            await LMCacheAttachment(LMCacheSettings(attach=f"127.0.0.1:{theirs.port}"), "pod").start(48)
    finally:
        theirs.stop()
