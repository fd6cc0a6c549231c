"""An engine with several KV cache groups, end to end: vLLM's events -> publisher process -> Valkey -> mirror."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from serve_app.blocks import block_keys, namespace_key, pack_tokens
from serve_app.events.engine_groups import EngineGroup
from serve_app.events.publisher import PublisherConfig
from serve_app.index.keyspace import DomainRecord, HeartbeatRecord, Keyspace, decode_domain, encode
from serve_app.index.mirror import Mirror
from serve_app.index.redis_writer import RedisWriter
from serve_app.types import Trust
from tests.contract.test_hybrid_layouts import LAYOUTS, conversations
from tests.engine import MODEL, POD, Engine, PublisherProcess
from tests.helpers import eventually, following, pod
from tests.vllm_engine import BLOCK_SIZE, VLLMEngine

CAPACITY = 900
GEMMA = LAYOUTS["five sliding to one full"]
KEYS = Keyspace(MODEL)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.stop()


@pytest.fixture(params=[True, False], ids=["groups given", "groups from events"])
def config(request: pytest.FixtureRequest, engine: Engine, redis_url: str) -> PublisherConfig:
    known = VLLMEngine(GEMMA, CAPACITY).groups if request.param else ()
    return PublisherConfig(
        redis_url, MODEL, POD, engine.endpoint, engine.replay_endpoint, capacity=CAPACITY, groups=tuple(known)
    )


class Hybrid:
    """A VLLMEngine whose events go over the wire."""

    def __init__(self, wire: Engine) -> None:
        self.engine = VLLMEngine(GEMMA, CAPACITY)
        self._wire = wire

    def serve(self, tokens: list[int]) -> None:
        self.engine.serve(self.engine.request(tokens), lambda _: None, raw=lambda events: self._wire.send(*events))

    def is_known(self, mirror: Mirror, prompts: list[list[int]]) -> bool:
        """Whether the mirror predicts what the engine would reuse of each."""
        return all(predicted(mirror, tokens) == self.engine.reusable(tokens) for tokens in prompts)


def predicted(mirror: Mirror, tokens: list[int]) -> int:
    keys = block_keys(pack_tokens(tokens), BLOCK_SIZE, namespace_key(MODEL, BLOCK_SIZE))
    return mirror.match(keys, [POD], prompt_tokens=len(tokens))[POD].total_tokens


def test_a_hybrid_is_right_through_faults(
    engine: Engine, config: PublisherConfig, redis_url: str, mirror: Mirror
) -> None:
    hybrid, prompts = Hybrid(engine), list(conversations(9, 40))
    publisher = PublisherProcess(engine, redis_url, config=config)
    for tokens in prompts[:30]:
        hybrid.serve(tokens)
    eventually(lambda: hybrid.is_known(mirror, prompts[20:30]), 15)
    assert any(hybrid.engine.reusable(tokens) for tokens in prompts[20:30])
    assert mirror.trust(POD) is Trust.EXACT
    publisher.kill()  # another one replays what the engine has sent
    for tokens in prompts[30:]:
        hybrid.serve(tokens)
    publisher = PublisherProcess(engine, redis_url, config=config)
    eventually(lambda: hybrid.is_known(mirror, prompts[20:]), 20)
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    eventually(lambda: mirror.pods() == [POD] and hybrid.is_known(mirror, prompts[20:]), 20)
    with following(redis_url, MODEL) as new:  # and one that loads the sets
        eventually(lambda: new.pods() == [POD] and hybrid.is_known(new, prompts[20:]), 10)
    publisher.kill()


def test_an_engine_of_an_unknown_kind_is_named_and_never_exact(engine: Engine, redis_url: str, mirror: Mirror) -> None:
    groups = (EngineGroup("of next year", BLOCK_SIZE), EngineGroup("full_attention", BLOCK_SIZE))
    config = PublisherConfig(
        redis_url, MODEL, POD, engine.endpoint, engine.replay_endpoint, block_size=BLOCK_SIZE, groups=groups
    )
    publisher = PublisherProcess(engine, redis_url, config=config)
    hybrid, (tokens, *_) = Hybrid(engine), list(conversations(9, 1))
    hybrid.serve(tokens)
    eventually(lambda: mirror.pods() == [POD] and mirror.trust(POD) is Trust.DEGRADED, 15)
    ((domain, _, _),) = mirror.domains()
    assert "of next year" in domain.unindexed["gpu"]
    assert predicted(mirror, tokens) == 0
    eventually(lambda: (mirror.domains()[0][2] or HeartbeatRecord(0)).events_skipped.get("group_kind"))
    publisher.kill()


def test_old_records_are_read_and_those_of_the_future_left_out(redis_url: str, mirror: Mirror) -> None:
    writer = RedisWriter(redis_url, MODEL)
    old, future = pod("old"), pod("future")
    writer.join(old)
    writer.join(future)
    writer.flush()
    for domain in (old, future):
        writer.heartbeat(domain.id, HeartbeatRecord(domain.epoch))
    with redis.Redis.from_url(redis_url) as client:
        stored = client.hget(KEYS.domains, old.id)
        assert isinstance(stored, bytes)
        fields = msgspec.msgpack.decode(stored)
        client.hset(KEYS.domains, old.id, msgspec.msgpack.encode(fields[:14]))  # as before there were versions
        assert decode_domain(msgspec.msgpack.encode(fields[:14])).domain(old.id).layout is None
        newer = msgspec.structs.replace(DomainRecord.of(future), version=99)
        client.hset(KEYS.domains, future.id, encode(newer))
        client.hset(KEYS.domains, "junk", b"\xc1")
        client.hset(KEYS.seqs, "junk", b"\xc1")
        with following(redis_url, MODEL) as new:
            assert new.pods() == [old.pod]
            assert new.counters["left_out_version"] == 1
            assert new.counters["left_out_malformed"] == 1
            client.xadd(KEYS.log, {"r": b"\xc1"})
            client.xadd(KEYS.log, {"x": b"?"})
            eventually(lambda: new.counters["left_out_malformed"] == 3)
            assert new.counters["loads"] == 1
    writer.close()
