"""Ray's request router class on a Valkey, and the fleet that publishes to it: what its tests share."""

from __future__ import annotations

import asyncio
import time

from ray.serve._private.common import DeploymentID, ReplicaID, RunningReplicaInfo
from ray.serve._private.request_router.replica_wrapper import RunningReplica

from serve_app.blocks import block_keys, namespace_key, pack_tokens
from serve_app.deployments.request_router import KVCacheAwareRouter
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.redis_writer import RedisWriter
from serve_app.types import GPU, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId, pod_of_rank

MODEL = ModelId("test-model")
SIZE = 4
MAX_ONGOING = 8
TOKENS = list(range(20, 20 + 10 * SIZE))  # a prompt


class Replica(RunningReplica):
    """Ray's, of an actor that is not there."""

    def __init__(self, name: str) -> None:
        identity = ReplicaID(name, DeploymentID("llm", "app"))
        self._replica_info = RunningReplicaInfo(identity, None, None, None, name, MAX_ONGOING)
        self._multiplexed_model_ids = set()


class Fleet:
    """What publishers of replicas with ranks write."""

    def __init__(self, redis_url: str, tokenizer: str) -> None:
        self.writer = RedisWriter(redis_url, MODEL, lease_ttl_s=60)
        self._spec = EngineSpec(MODEL, SIZE, tokenizer)

    def join(self, replica: str, rank: int, *, holds: int = 0, address: str = "") -> Domain:
        """A rank that holds so many blocks of the prompt."""
        pod = pod_of_rank(replica, rank)
        epoch = Epoch(time.time_ns() // 1_000_000)
        domain = Domain(DomainId(pod), epoch, self._spec, pod, rank=rank, replica=replica, address=address)
        self.publish(domain, holds)
        return domain

    def join_plain(
        self, replica: str, *, holds: int = 0, adapters: tuple[str, ...] = (), slots: int = 0, address: str = ""
    ) -> Domain:
        """A replica without ranks."""
        epoch = Epoch(time.time_ns() // 1_000_000)
        of_adapters = {"adapters": adapters, "adapter_slots": slots, "address": address}
        domain = Domain(DomainId(replica), epoch, self._spec, PodId(replica), **of_adapters)  # type: ignore[arg-type]
        self.publish(domain, holds)
        return domain

    def publish(self, domain: Domain, holds: int = 0) -> None:
        self.writer.join(domain)
        if holds:
            keys = block_keys(pack_tokens(TOKENS[: holds * SIZE]), SIZE, namespace_key(MODEL, SIZE))
            self.writer.add(domain.id, domain.epoch, GPU, keys)
        self.writer.flush()
        self.writer.heartbeat(domain.id, HeartbeatRecord(domain.epoch))


async def know(router: KVCacheAwareRouter, pods: int) -> None:
    """Until the router's mirror has so many pods, and the tokenizer is there."""
    deadline = time.monotonic() + 10
    mirror = router.decider.mirror
    assert mirror is not None
    while len(mirror.pods()) != pods or mirror.spec() is None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
