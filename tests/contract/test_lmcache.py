"""The real `lmcache server`, stored into as an engine does -> our publisher, as its own process -> Valkey -> mirror."""

from __future__ import annotations

import itertools
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey, RegisterEngineDrivenContextPayload
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

from serve_app.blocks import block_keys, namespace_key, pack_tokens
from serve_app.errors import StoreError
from serve_app.events.lmcache_server import LMCacheProcess
from serve_app.events.lmcache_source import chunk_size_of, reports_changes
from serve_app.events.publisher import LMCacheStream, PublisherConfig
from serve_app.index.keyspace import HeartbeatRecord
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.types import GPU, LMCACHE, Domain, DomainId, EngineSpec, Epoch, ModelId, PodId, Tier
from tests.helpers import eventually, following

MODEL = ModelId("test-model")
ENGINE_MODEL = "org/test-model"
POD, NODE = PodId("pod-1"), "node:test"
BLOCK, CHUNK = 16, 64
HIDDEN = 1024  # so that a chunk is 256 KiB and the server holds some 40
SIZE_GB = 0.01


class Engine:
    """The part of an engine that LMCache sees, with LMCache's own client."""

    def __init__(self, endpoint: str) -> None:
        self._client: Any = RequestClientFactory.create(endpoint)
        self._requests = itertools.count()
        payload = RegisterEngineDrivenContextPayload(
            instance_id=7,
            model_name=ENGINE_MODEL,
            world_size=1,
            block_size=BLOCK,
            num_layers=1,
            hidden_dim_size=HIDDEN,
            dtype_str="bfloat16",
            use_mla=False,
            num_physical_slots=CHUNK,
        )
        self._client.register_kv_cache_engine_driven_context(payload).result(timeout=10)

    def store(self, tokens: range, start: int = 0, salt: str = "") -> None:
        """Store the whole chunks of a prompt, those from token `start` on."""
        end = len(tokens) // CHUNK * CHUNK
        key = self._key(tokens, start, end, worker=0, salt=salt)
        chunks = [torch.zeros(2, 1, CHUNK, HIDDEN, dtype=torch.bfloat16) for _ in range(start, end, CHUNK)]
        self._client.prepare_store(key, 7).result(timeout=10)
        self._client.commit_store(key, 7, pickle.dumps(chunks)).result(timeout=10)
        self._client.end_session(key.request_id).result(timeout=10)

    def can_load(self, tokens: range, salt: str = "") -> int:
        """Tokens of the prompt that the server would give an engine."""
        end = len(tokens) // CHUNK * CHUNK
        key = self._key(tokens, 0, end, worker=None, salt=salt)
        self._client.lookup(key, 1).result(timeout=10)
        found: int = self._client.wait_prefetch_status(key.request_id, 10.0).result(timeout=20)
        self._client.free_lookup_locks(key, 1).result(timeout=10)
        return found * CHUNK

    def clear(self) -> None:
        self._client.clear(False).result(timeout=10)

    def close(self) -> None:
        self._client.close()

    def _key(self, tokens: range, start: int, end: int, worker: int | None, salt: str = "") -> IPCCacheServerKey:
        request = f"request-{next(self._requests)}"
        return IPCCacheServerKey(
            ENGINE_MODEL, 1, worker, tuple(tokens), start, end, request, cache_salt=salt, num_kv_readers=1
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LMCacheProcess]:
    log = tmp_path_factory.mktemp("lmcache") / "log"
    server = LMCacheProcess(size_gb=SIZE_GB, chunk_size=CHUNK, eviction_policy="LRU", instance="test", log=log)
    yield server
    server.stop()


@pytest.fixture
def engine(server: LMCacheProcess) -> Iterator[Engine]:
    engine = Engine(server.endpoint)
    engine.clear()
    yield engine
    engine.close()


class PublisherProcess:
    """`python -m serve_app.events`, as replicas and the node's actor run it."""

    def __init__(self, config: PublisherConfig) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "serve_app.events"], stdin=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(config) + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        assert self.process.stdin is not None
        self.process.stdin.close()


def of_node(endpoint: str, redis_url: str) -> PublisherConfig:
    return PublisherConfig(
        redis_url=redis_url,
        model=MODEL,
        pod=NODE,
        endpoint=endpoint,
        block_size=BLOCK,
        lmcache=LMCacheStream(ENGINE_MODEL, CHUNK),
    )


@pytest.fixture
def publisher(server: LMCacheProcess, engine: Engine, redis_url: str) -> Iterator[PublisherProcess]:
    publisher = PublisherProcess(of_node(server.endpoint, redis_url))
    yield publisher
    publisher.kill()


@pytest.fixture
def mirror(redis_url: str) -> Iterator[Mirror]:
    """With one pod, attached to the node's server, that holds the first block of every prompt that begins at 0."""
    writer = RedisWriter(redis_url, MODEL, lease_ttl_s=600)
    spec = EngineSpec(MODEL, BLOCK, "none")
    domain = Domain(DomainId(POD), Epoch(1), spec, POD, attached=(DomainId(NODE),))
    writer.join(domain)
    writer.add(domain.id, domain.epoch, GPU, prompt(range(BLOCK)))
    writer.flush()
    writer.heartbeat(domain.id, HeartbeatRecord(domain.epoch))
    with following(redis_url, MODEL, tier_order=(GPU, LMCACHE)) as mirror:
        yield mirror
    writer.close()


def prompt(tokens: range, salt: str = "") -> bytes:
    return block_keys(pack_tokens(tokens), BLOCK, namespace_key(MODEL, BLOCK, None, salt or None))


def matched(mirror: Mirror, tokens: range, salt: str = "") -> dict[Tier, int]:
    return dict(mirror.match(prompt(tokens, salt), [POD])[POD].tokens)


def node_epoch(mirror: Mirror) -> int:
    return max((d.epoch for d, live, _ in mirror.domains() if d.id == NODE and live), default=0)


def test_the_server_says_what_it_is(server: LMCacheProcess) -> None:
    assert chunk_size_of(server.endpoint) == CHUNK
    assert reports_changes(server.endpoint)


def test_stores_of_any_engine_count_for_the_attached_pod(
    engine: Engine, publisher: PublisherProcess, mirror: Mirror
) -> None:
    engine.store(range(200))
    eventually(lambda: matched(mirror, range(200)) == {GPU: 16, LMCACHE: 176}, 15)
    assert matched(mirror, range(180)) == {GPU: 16, LMCACHE: 112}  # the third chunk is longer than this prompt
    engine.store(range(330), start=192)  # goes on where the first store ended
    eventually(lambda: matched(mirror, range(330)) == {GPU: 16, LMCACHE: 304})
    engine.clear()
    eventually(lambda: matched(mirror, range(330)) == {GPU: 16})
    engine.store(range(200))
    eventually(lambda: matched(mirror, range(200)) == {GPU: 16, LMCACHE: 176})


def test_what_a_salted_request_stored_is_its_salts_and_nobody_elses(
    engine: Engine, publisher: PublisherProcess, mirror: Mirror
) -> None:
    tokens = range(50_000, 50_330)
    engine.store(tokens[:200], salt="tenant")
    engine.store(tokens, start=192, salt="tenant")  # goes on where the first store ended
    eventually(lambda: matched(mirror, tokens, "tenant") == {LMCACHE: 320}, 15)
    for other in ("", "other"):
        assert matched(mirror, tokens, other) == {}
        assert engine.can_load(tokens, other) == 0
    assert engine.can_load(tokens, "tenant") == 320


def test_each_salt_has_its_own_chunks_of_the_same_tokens(
    engine: Engine, publisher: PublisherProcess, mirror: Mirror
) -> None:
    """They have the same hash in LMCache, and are stored and evicted one by one."""
    salts = ("", "tenant", "other", "last")
    first, *others = [range(start, start + 4 * CHUNK) for start in range(70_000, 76_000, 1000)]
    for salt in salts:
        engine.store(first, salt=salt)
    eventually(lambda: all(matched(mirror, first, salt) == {LMCACHE: 4 * CHUNK} for salt in salts), 15)
    for tokens in others:  # twice what the server holds
        for salt in salts:
            engine.store(tokens, salt=salt)

    def agree() -> bool:
        asked = [(tokens, salt) for tokens in (first, *others) for salt in salts]
        loadable = [engine.can_load(tokens, salt) for tokens, salt in asked]
        assert 0 in loadable
        assert max(loadable) == 4 * CHUNK
        return [matched(mirror, tokens, salt).get(LMCACHE, 0) for tokens, salt in asked] == loadable

    eventually(agree, 30)


def test_what_an_attached_engine_repeats_of_its_server_is_left_out(redis_url: str, tmp_path: Path) -> None:
    """LMCacheMPConnector has each engine publish the server's stores and evictions as well, `medium: CPU`."""
    vllm = ZmqEventPublisher(0, f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay")
    common = {"parent_block_hash": None, "lora_id": None, "lora_name": None}
    events = [
        BlockStored([b"g0"], token_ids=list(range(BLOCK)), block_size=BLOCK, medium="GPU", **common),
        BlockStored([b"c0"], token_ids=list(range(CHUNK)), block_size=CHUNK, medium="CPU", **common),
        BlockRemoved([b"c0"], medium="CPU"),
        BlockStored([b"c0"], token_ids=list(range(CHUNK)), block_size=CHUNK, medium="CPU", **common),
    ]
    vllm.publish(KVEventBatch(ts=0.0, events=events))
    publisher = PublisherProcess(
        PublisherConfig(
            redis_url=redis_url,
            model=MODEL,
            pod=POD,
            endpoint=f"ipc://{tmp_path}/events",
            replay_endpoint=f"ipc://{tmp_path}/replay",
            block_size=BLOCK,
            attached=(NODE,),
        )
    )
    mirror = Mirror(redis_url, MODEL)
    mirror.start()
    eventually(lambda: mirror.pods() == [POD], 15)
    assert matched(mirror, range(CHUNK)) == {GPU: BLOCK}
    eventually(lambda: mirror.domains()[0][2] is not None)
    ((domain, _, heartbeat),) = mirror.domains()
    assert domain.attached == (NODE,)
    assert heartbeat is not None
    assert heartbeat.events_skipped == {}
    mirror.close()
    publisher.kill()
    vllm.shutdown()


def test_evictions_leave_the_index(engine: Engine, publisher: PublisherProcess, mirror: Mirror) -> None:
    """Twice what the server holds: of every prompt, the index knows what the server itself would give an engine."""
    prompts = [range(first, first + 4 * CHUNK) for first in range(1000, 1000 + 20 * 1000, 1000)]
    for tokens in prompts:
        engine.store(tokens)

    def agree() -> bool:
        loadable = [engine.can_load(tokens) for tokens in prompts]
        assert 0 in loadable
        assert max(loadable) == 4 * CHUNK
        return [matched(mirror, tokens).get(LMCACHE, 0) for tokens in prompts] == loadable

    eventually(agree, 30)


def test_a_publisher_that_starts_late_reads_the_log(
    server: LMCacheProcess, engine: Engine, publisher: PublisherProcess, mirror: Mirror, redis_url: str
) -> None:
    engine.store(range(200))
    eventually(lambda: matched(mirror, range(200)).get(LMCACHE) == 176, 15)
    publisher.kill()
    eventually(lambda: matched(mirror, range(200)) == {GPU: 16}, 5)  # its lease ends
    late = PublisherProcess(of_node(server.endpoint, redis_url))
    eventually(lambda: matched(mirror, range(200)).get(LMCACHE) == 176, 15)
    late.kill()


def test_a_server_that_hangs_is_void(
    server: LMCacheProcess, engine: Engine, publisher: PublisherProcess, mirror: Mirror
) -> None:
    engine.store(range(200))
    eventually(lambda: matched(mirror, range(200)).get(LMCACHE) == 176, 15)
    epoch = node_epoch(mirror)
    server.process.send_signal(signal.SIGSTOP)
    eventually(lambda: matched(mirror, range(200)) == {GPU: 16}, 15)
    server.process.send_signal(signal.SIGCONT)
    eventually(lambda: matched(mirror, range(200)).get(LMCACHE) == 176, 15)
    assert node_epoch(mirror) > epoch


def test_a_killed_server_is_void_at_once_and_a_new_one_is_followed(
    publisher: PublisherProcess, mirror: Mirror, server: LMCacheProcess, engine: Engine, tmp_path: Path
) -> None:
    """Last in the module: it kills the server."""
    engine.store(range(200))
    eventually(lambda: matched(mirror, range(200)).get(LMCACHE) == 176, 15)
    epoch, port = node_epoch(mirror), server.port
    server.process.kill()
    server.process.wait(10)
    eventually(lambda: matched(mirror, range(200)) == {GPU: 16}, 2)

    again = LMCacheProcess(
        size_gb=SIZE_GB, chunk_size=CHUNK, eviction_policy="LRU", instance="again", log=tmp_path / "log", port=port
    )
    try:
        eventually(lambda: node_epoch(mirror) > epoch, 15)
        assert matched(mirror, range(200)) == {GPU: 16}  # it has begun empty
        other = Engine(again.endpoint)
        other.store(range(130))
        eventually(lambda: matched(mirror, range(200)) == {GPU: 16, LMCACHE: 112})
        other.close()
    finally:
        again.stop()


def test_ports_that_are_taken_are_survived(server: LMCacheProcess, tmp_path: Path) -> None:
    """A server that is given a port which somebody else listens on says so, and does not take the other for itself."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StoreError, match="did not start"):
            LMCacheProcess(
                size_gb=SIZE_GB,
                chunk_size=CHUNK,
                eviction_policy="LRU",
                instance="taken",
                log=tmp_path / "log",
                port=taken.getsockname()[1],
            )
